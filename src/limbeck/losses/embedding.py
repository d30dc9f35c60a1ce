"""One vector against another: embeddings, or hidden states behind the student's projector.

`mse` and `cosine` give one value per position (...) of vectors (..., D) and serve hidden states as
well. The teacher never receives a gradient; none of the values but `similarity_kl` is in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.numerics import (
    NEVER,
    at_least_fp32,
    check_shapes,
    counted_rows,
    finite_log_softmax,
    put_back,
    unit,
    without_autocast,
)

_PROJECT = "project the student to the teacher's width first"


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over D of the squared difference (FitNets, Romero et al. 2015, 1412.6550, with mean).

    (..., D), (..., D) -> (...). Raises ValueError where the shapes differ.
    """
    check_shapes(student, teacher, _PROJECT)
    return (at_least_fp32(student) - at_least_fp32(teacher.detach())).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, in [0, 2] (DistilBERT, Sanh et al. 2019, 1910.01108). As `mse`.

    Beside a zero vector it is 1, without a gradient worth the name.
    """
    check_shapes(student, teacher, _PROJECT)
    return 1 - (unit(student) * unit(teacher.detach())).sum(-1)


def similarity_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    """KL between softmaxes of cosine similarities to the batch's other examples, in nats.

    The student's width is free and no projector is needed (CompRess, Abbasi Koohpayegani et al.
    2020, 2010.14713, with the batch in place of its memory bank). (B, D_student), (B, D_teacher),
    mask (B,) bool -> (B,). The value depends on what is in the batch; one example alone gives 0.
    """
    a, b = counted_rows(mask, student, teacher.detach())
    with without_autocast(a):
        log_q, log_p = _log_neighbours(a, temperature), _log_neighbours(b, temperature)
    return put_back((log_p.exp() * (log_p - log_q)).sum(-1), mask)


def _log_neighbours(vectors: Tensor, temperature: float) -> Tensor:
    similarity = unit(vectors) @ unit(vectors).T  # (n, n)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    return finite_log_softmax((similarity / temperature).masked_fill(itself, NEVER))
