"""The teacher's order of its best classes, without its confidence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from limbeck.losses.numerics import at_least_fp32, check_shapes


def ranking(
    student_logits: Tensor, teacher_logits: Tensor, *, top_k: int = 8, temperature: float = 1.0
) -> Tensor:
    """Mean over pairs of the teacher's `top_k` classes of KL(which is likelier, says p || says q).

    P(i before j) = sigmoid((z_i - z_j) / T): RankNet (Burges et al. 2005, eq. 3) with the teacher's
    probability as the target and its entropy subtracted, so that equals give 0. In nats.
    (..., C), (..., C) -> (...). Classes that either side rules out (-inf) make no pair; without a
    pair (C = 1) the value is 0. Raises ValueError where the shapes differ.
    """
    check_shapes(student_logits, teacher_logits, "never pad a vocabulary with zeros")
    k = min(top_k, teacher_logits.shape[-1])
    teacher, ids = at_least_fp32(teacher_logits.detach()).topk(k, dim=-1)  # (..., k)
    student = at_least_fp32(student_logits.gather(-1, ids))
    counted = teacher.isfinite() & student.isfinite()
    first, second = torch.triu_indices(k, k, offset=1, device=ids.device)  # (k (k - 1) / 2,) each
    pair = counted[..., first] & counted[..., second]
    log_p, log_not_p = _log_before(teacher.masked_fill(~counted, 0), first, second, temperature)
    log_q, log_not_q = _log_before(student.masked_fill(~counted, 0), first, second, temperature)
    kl = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
    return kl.masked_fill(~pair, 0).sum(-1) / pair.sum(-1).clamp_min(1)


def _log_before(
    logits: Tensor, first: Tensor, second: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)  # one per position
    difference = (logits[..., first] - logits[..., second]) / temperature
    return logsigmoid(difference), logsigmoid(-difference)
