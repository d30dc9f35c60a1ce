"""A loss that compares examples with each other: its value depends on what is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.numerics import check_shapes, counted_rows, finite_log_softmax, put_back


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DIST: 1 - Pearson correlation, between classes and within (Huang et al. 2022, 2205.10536).

        inter: over the classes of an example;  intra: over the examples, per class, mean over C

    For teachers much stronger than the student: only relations are matched, not values. Not in
    nats. (B, C), (B, C), mask (B,) bool -> (B,): an example's share, such that the *mean over the
    counted examples* is the paper's loss; `inter_weight` is its beta, `intra_weight` its gamma.
    A share of `intra` alone can be negative; either mean is in [0, 2]. Since the statistics are
    those of the batch, this loss does depend on the micro-batch size; uncounted rows take no part.
    Where the teacher is constant (one class, one example) there is no relation to learn: 0.
    Raises ValueError for any other shape.
    """
    check_shapes(student_logits, teacher_logits, "never pad a vocabulary with zeros")
    if student_logits.ndim != 2:
        raise ValueError(f"logits {tuple(student_logits.shape)} must be (B, C)")
    student, teacher = counted_rows(mask, student_logits, teacher_logits.detach())
    q = finite_log_softmax(student, temperature).exp()  # (n, C)
    p = finite_log_softmax(teacher, temperature).exp()
    across_q, across_p = _standard(q, -1), _standard(p, -1)
    inter = across_p.square().sum(-1) - (across_q * across_p).sum(-1)  # (n,)
    within_q, within_p = _standard(q, 0), _standard(p, 0)
    varies = within_p.square().sum(0)  # (C,): 1, or 0 where the teacher is constant
    # the correlation is a sum over examples and 1 is not: each example bears 1/n of the 1
    intra = (varies - len(q) * within_q * within_p).mean(-1)  # (n,)
    return put_back(inter_weight * inter + intra_weight * intra, mask)


def _standard(values: Tensor, dim: int) -> Tensor:
    """Centred along `dim` and of length 1; 0 where constant up to fp32's rounding."""
    centred = values - values.mean(dim, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    # 1e-6: some tens of roundings; what is left of a constant would be correlated noise
    constant = length <= 1e-6 * torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return centred.masked_fill(constant, 0) / length.masked_fill(constant, 1)
