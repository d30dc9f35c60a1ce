"""What every loss does before its mathematics: enough precision, and no infinities.

An infinity times zero is NaN, in the value or, worse, only in the gradient. So -inf ends here: a
log-probability is never below `NEVER`, and exp(NEVER) is exactly 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEVER = -1e30  # exp() of it is 0; 1e8 of it still add up in fp32
# 87.3 nats. What fp32 rounds to 0 counts as its smallest normal number where a loss must take
# the logarithm of a teacher's zero.
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def check_shapes(student: Tensor, teacher: Tensor, advice: str) -> None:
    """Raises ValueError where they differ: broadcasting would give a number all the same."""
    if student.shape != teacher.shape:
        ours, theirs = tuple(student.shape), tuple(teacher.shape)
        raise ValueError(f"student {ours} and teacher {theirs} must match; {advice}")


def at_least_fp32(values: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp64 stays, so that gradients can be checked. (...) -> (...)."""
    return values if values.dtype == torch.float64 else values.float()


def finite_log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities in nats, -inf replaced by `NEVER`, which takes no gradient.

    (..., C), and a number or one temperature per position (...) -> (..., C).
    """
    log_probs = tempered(logits, temperature).log_softmax(-1)
    if log_probs.requires_grad:
        return log_probs.clamp_min(NEVER)
    return log_probs.clamp_min_(NEVER)


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """(logits - max) / temperature in fp32, or the logits themselves at 1. As above."""
    logits = at_least_fp32(logits)
    if not isinstance(temperature, Tensor):
        if temperature == 1:  # saves two passes over the vocabulary
            return logits
    else:
        temperature = temperature.unsqueeze(-1)
    # 1e4 / 3 is wrong by 1e-4 in fp32, the difference of two logits by nothing
    return (logits - logits.detach().amax(-1, keepdim=True)) / temperature


def without_autocast(values: Tensor) -> torch.autocast:
    """Inside, matmuls keep their inputs' precision; autocast would round them to bf16."""
    return torch.autocast(values.device.type, enabled=False)


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1; a zero vector stays zero, with a finite gradient. (..., D)."""
    vectors = at_least_fp32(vectors)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1)


def counted_rows(mask: Tensor | None, *rows: Tensor) -> list[Tensor]:
    """The rows that count, in fp32. (N,) bool, (N, ...) each -> (n, ...) each.

    Taken out rather than multiplied by 0: NaN in a padded row then reaches neither value nor
    gradient.
    """
    return [at_least_fp32(r if mask is None else r[mask]) for r in rows]


def put_back(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values of `counted_rows` at their places, 0 elsewhere. (n,), (N,) bool -> (N,)."""
    if mask is None:
        return values
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
