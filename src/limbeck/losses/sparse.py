"""Losses from a few of the teacher's classes: top-k with a tail, or an unbiased sample.

    ids (..., K) int64    probs (..., K) float    tail (...) float, the teacher's mass outside `ids`

Both sides are seen through K + 1 outcomes: the classes in `ids`, and "any other". The student's
mass outside is thereby penalised, and every f-divergence of the outcomes is at most the dense one
(data-processing inequality). `ids` of one position are distinct.

A student's logits (..., V) are read once and no second tensor of their size is held between
forward and backward; the gradient, which has that size, is formed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses.numerics import NEVER, at_least_fp32, tempered

# What a loss may hold of (positions x V) fp32 at once, by the kind of device. CPU: glibc hands
# every block above 32 MiB back to the kernel, and its next use faults in each page again: a copy
# then took 9 times as long. GPU: enough that launches do not dominate.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}


def rows_per_chunk(num_classes: int, device: str = "cpu") -> int:
    """Positions whose fp32 logits fit `CHUNK_BYTES`; at least 16, so that a matmul stays one."""
    return max(16, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * num_classes))


def sparse_divergence(
    divergence: Callable[..., Tensor],
    student_logits: Tensor,
    ids: Tensor,
    probs: Tensor,
    tail: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Any of `divergence`'s functions over K + 1 outcomes. (..., V), teacher as above -> (...).

    `divergence` is `forward_kl`, `reverse_kl`, `tvd`, `partial(jsd, beta=0.3)`, ... `probs` and
    `tail` were taken at `temperature`: a tail cannot be brought to another one. Where K = V and
    the tail is 0 it is the dense divergence. Mind that the teacher's top k are a biased target:
    the best student is right on `ids` and free outside.
    """
    outcomes = coarse_log_probs(student_logits, ids, temperature=temperature)
    teacher = at_least_fp32(torch.cat([probs, tail.unsqueeze(-1)], -1).detach()).log()
    # log-probabilities are logits; normalising again also mends probabilities stored in fp16
    return divergence(outcomes, teacher.to(outcomes.dtype))


def coarse_log_probs(student_logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The student's log-probabilities of `ids` and of all else together, in nats.

    (..., V), (..., K) int64 -> (..., K + 1). The last is a sum over the classes outside, not
    log(1 - sum): exact also where `ids` hold all but 1e-9.
    """
    flat_ids = ids.reshape(-1, ids.shape[-1])
    flat = student_logits.reshape(-1, student_logits.shape[-1])
    outcomes = _CoarseLogProbs.apply(flat, flat_ids, temperature)
    return outcomes.view(*ids.shape[:-1], -1)


def sampled_cross_entropy(
    student_logits: Tensor, ids: Tensor, weights: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """-sum of weights * log q[ids]: unbiased for the teacher's cross-entropy, and its gradient.

    (..., V), (..., K) int64, (..., K) -> (...). With E[weights on class v] = p[v] (importance
    sampling, "Sparse Logit Sampling", 2503.16870) the gradient q * sum(weights) - weights has
    the dense forward KL's expectation. The teacher's entropy is unknown and left out: the value
    never reaches 0 and is no KL. `ids` may repeat. Weight 1 on a label is its cross-entropy.
    """
    flat_ids = ids.reshape(-1, ids.shape[-1])
    flat = student_logits.reshape(-1, student_logits.shape[-1])
    flat_weights = at_least_fp32(weights.detach()).reshape(flat_ids.shape)
    return _SampledCrossEntropy.apply(flat, flat_ids, flat_weights, temperature).view(
        ids.shape[:-1]
    )


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = rows_per_chunk(logits.shape[-1], logits.device.type)
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _shifted(logits: Tensor, temperature: float) -> Tensor:
    """(logits - max) / temperature, always a new tensor: near 1e4 a logsumexp is wrong by 1e-3."""
    logits = at_least_fp32(logits)
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted if temperature == 1 else shifted.div_(temperature)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax, logsumexp as a column), with one exponential per element; 0 and NEVER if empty."""
    top = logits.amax(-1, keepdim=True)
    probs = logits.softmax(-1)
    log_sum = top - probs.amax(-1, keepdim=True).log()  # the largest is exp(top - log_sum)
    empty = top == -torch.inf
    if empty.any():
        probs.masked_fill_(empty, 0)
        log_sum = log_sum.masked_fill(empty, NEVER)
    return probs, log_sum


def _outside(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over the classes outside `ids` (n, V), its logsumexp (n, 1), logits of `ids`."""
    scaled = _shifted(logits, temperature)
    inside = scaled.gather(-1, ids)
    probs, log_sum = _softmax(scaled.scatter_(-1, ids, -torch.inf))
    return probs, log_sum, inside


class _CoarseLogProbs(torch.autograd.Function):
    """out[k] = z[ids[k]] - L, out[K] = L_outside - L, with L the logsumexp over all."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        parts, kept = [], None
        for rows in _chunks(logits):
            probs, log_outside, inside = _outside(logits[rows], ids[rows], temperature)
            both = torch.cat([inside, log_outside], -1)
            parts.append(both.log_softmax(-1).clamp_min(NEVER))
            # one chunk is all there is, as in `fused`: keep its softmax, save an exponential
            kept = probs if len(probs) == len(logits) else None
        out = torch.cat(parts) if parts else logits.new_zeros((0, ids.shape[-1] + 1)).float()
        ctx.temperature = temperature
        ctx.save_for_backward(logits, ids, out, *([] if kept is None else [kept]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, out, *kept = ctx.saved_tensors
        # a class at -inf takes no gradient, as in `finite_log_softmax`
        g = grad_out.masked_fill(out <= NEVER, 0)
        # d out[k] / d z[v] = [v is ids[k]] - q[v]; of the last: [v outside] r[v] - q[v], with r
        # the softmax over the classes outside, so that q[v] = r[v] exp(out[K]) there
        per_class = (g - out.exp() * g.sum(-1, keepdim=True)) / ctx.temperature  # (n, K + 1)
        if kept:  # not in place: a graph may be walked twice
            grad = kept[0] * per_class[:, -1:]
            return grad.scatter_(-1, ids, per_class[:, :-1]).to(logits.dtype), None, None
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = _outside(logits[rows], ids[rows], ctx.temperature)[0]
            part.mul_(per_class[rows, -1:])
            grad[rows] = part.scatter_(-1, ids[rows], per_class[rows, :-1])
        return grad, None, None


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, weights: Tensor, temperature: float
    ) -> Tensor:
        parts, kept = [], None
        for rows in _chunks(logits):
            scaled = _shifted(logits[rows], temperature)
            probs, log_sum = _softmax(scaled)
            log_q = (scaled.gather(-1, ids[rows]) - log_sum).clamp_min(NEVER)
            parts.append(-(weights[rows] * log_q).sum(-1))
            kept = probs if len(probs) == len(logits) else None
        out = torch.cat(parts) if parts else logits.new_zeros(0).float()
        ctx.temperature = temperature
        ctx.save_for_backward(logits, ids, weights, *([] if kept is None else [kept]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, weights, *kept = ctx.saved_tensors
        w = weights * grad_out.unsqueeze(-1) / ctx.temperature  # (n, K)
        mass = w.sum(-1, keepdim=True)
        if kept:
            grad = kept[0] * mass
            return grad.scatter_add_(-1, ids, -w).to(logits.dtype), None, None, None
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = tempered(logits[rows], ctx.temperature).softmax(-1)
            grad[rows] = part.mul_(mass[rows]).scatter_add_(-1, ids[rows], -w[rows])
        return grad, None, None, None
