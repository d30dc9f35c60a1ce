"""Divergences between a teacher's and a student's categorical distribution.

Every function takes logits (..., C) and returns one value per position (...), in nats, in fp32
(fp64 for fp64). Nothing here masks, averages, weighs or multiplies by the temperature's square:
`objective` does. The teacher never receives a gradient.

    p  teacher      q  student      C  classes or vocabulary

A teacher may rule classes out with -inf. Where a divergence needs the logarithm of such a zero
(`reverse_kl`, and `akl` through it), it counts as fp32's smallest normal number: 87.3 nats. A
class that only the student rules out has no gradient to come back by; `forward_kl` then returns
about 1e30 times the teacher's probability: loud, and finite. Rounding may leave a divergence of
equals at -1e-7 instead of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.losses.numerics import (
    LOG_TINY,
    NEVER,
    at_least_fp32,
    check_shapes,
    finite_log_softmax,
)


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """KL(p || q): mass-covering, the classic soft-target loss (Hinton et al. 2015, 1503.02531).

    (..., C), (..., C) -> (...). Raises ValueError where the shapes differ.
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """KL(q || p): mode-seeking (MiniLLM, Gu et al. 2024, 2306.08543). As `forward_kl`."""
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_q, log_p.clamp_min(LOG_TINY))


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, 2306.13649).

    `beta` is the teacher's share. At most H(beta), the entropy of a coin: ln 2 at 0.5. As
    `forward_kl`; ValueError unless 0 < beta < 1: at either end the value is 0 for every student.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}, allowed is 0 < beta < 1; the limits that the literature names "
            "beta = 0 and beta = 1 are forward_kl and reverse_kl"
        )
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, Ko et al. 2024, 2402.03898).

    At most -ln(alpha). As `forward_kl`; ValueError unless 0 < alpha < 1.
    """
    _check_alpha(alpha, "forward_kl")
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, 2402.03898). As `skew_kl`."""
    _check_alpha(alpha, "reverse_kl")
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def tvd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """Total variation distance, half of sum |p - q|, at most 1 and the only one not in nats.

    (Wen et al. 2023, f-distill, 2307.15190.) As `forward_kl`.
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def akl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    head_mass: float = 0.5,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Adaptive KL: forward and reverse KL, each weighted by where the student is wrong.

    The teacher's head is the fewest classes that hold `head_mass`; with g the sum of |p - q| over
    it and over the rest, g_head / (g_head + g_tail) KL(p || q) + g_tail / (...) KL(q || p)
    (Wu et al. 2024, 2404.02657). The weights take no gradient. Equal teacher
    probabilities at the head's edge are taken in the order of their indices. As `forward_kl`.
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p, order = log_p.exp().sort(stable=True, dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        # exclusive sum: the class that crosses `head_mass` still belongs to the head
        head = gap.masked_fill(p.cumsum(-1) - p >= head_mass, 0).sum(-1)
        share = head / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    forward, reverse = _kl(log_p, log_q), _kl(log_q, log_p.clamp_min(LOG_TINY))
    return share * forward + (1 - share) * reverse


def dkd_parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """(target part, non-target part) of forward KL; KL = target + (1 - p[label]) * non-target.

    The target part is the KL of "the label or not", the non-target part the KL among the other
    classes (Zhao et al. 2022, 2203.08679). (..., C), (..., C), (...) int64 -> (...), (...).
    Where the teacher rules out every other class there is nothing to compare: 0.
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    if log_q.shape[-1] == 1:
        return log_q.sum(-1), log_q.sum(-1)  # zeros, with the student's graph
    at = labels.unsqueeze(-1)
    others_q = log_q.scatter(-1, at, NEVER)
    others_p = log_p.scatter(-1, at, NEVER)
    # log(1 - p[label]) as a sum over the others: exact where p[label] rounds to 1
    binary_q = torch.cat([log_q.gather(-1, at), others_q.logsumexp(-1, keepdim=True)], -1)
    binary_p = torch.cat([log_p.gather(-1, at), others_p.logsumexp(-1, keepdim=True)], -1)
    comparable = others_p.amax(-1, keepdim=True) > NEVER / 2
    others = _kl(finite_log_softmax(others_p), finite_log_softmax(others_q))
    return _kl(binary_p, binary_q), others.masked_fill(~comparable.squeeze(-1), 0)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Decoupled KD: the two `dkd_parts` with weights of their own, by default the paper's.

    (2203.08679: 1 and 8 on CIFAR-100; tune the second.)
    """
    target, others = dkd_parts(student_logits, teacher_logits, labels, temperature=temperature)
    return target_weight * target + non_target_weight * others


def standardize(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes, for student and teacher alike.

    The student then learns the teacher's relations and not its range (Sun et al. 2024,
    2403.01427). (..., C) -> (..., C). Classes at -inf stay there and do not count. Use it before
    any divergence: `forward_kl(standardize(s), standardize(t), temperature=2.0)`.
    """
    logits = at_least_fp32(logits)
    counted = logits.isfinite()
    finite = logits.masked_fill(~counted, 0)
    count = counted.sum(-1, keepdim=True).clamp_min(1)
    centred = (finite - finite.sum(-1, keepdim=True) / count).masked_fill(~counted, 0)
    variance = centred.square().sum(-1, keepdim=True) / count
    # 1e-12: equal logits become 0 and not 0/0; below a deviation of 1e-6 all logits are equal
    return (centred * (variance + 1e-12).rsqrt()).masked_fill(~counted, -math.inf)


def cross_entropy(student_logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-log q[label], with hard labels. (..., C), (...) int64 -> (...).

    Of each label the share `smoothing` is spread over all classes, the label's own among them
    (Szegedy et al. 2016, 1512.00567, sec. 7).
    """
    log_q = at_least_fp32(student_logits).log_softmax(-1)
    own = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return own if smoothing == 0 else (1 - smoothing) * own - smoothing * log_q.mean(-1)


def _log_probs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    check_shapes(student_logits, teacher_logits, "never pad a vocabulary with zeros")
    log_q = finite_log_softmax(student_logits, temperature)
    return log_q, finite_log_softmax(teacher_logits.detach(), temperature)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of finite log-probabilities. (..., C) -> (...)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b): of the probabilities, never of their logarithms."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _check_alpha(alpha: float, limit: str) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, allowed is 0 < alpha < 1; for alpha = 0 use {limit}")
