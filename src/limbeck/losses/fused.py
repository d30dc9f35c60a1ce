"""The head's matmul and the losses behind it, in chunks over positions.

    P positions      D width      V vocabulary      c positions of one chunk

Logits (P, V) are the largest tensor of a language model's step. Here a chunk (c, V) is made, its
losses and their gradient taken, both multiplied back to (c, D) and (V, D), and forgotten: nothing
of size (P, V) exists, and no matmul is done twice.

Why the weights come in and a sum goes out: the head's gradient is sum_i u_i dl_i/dz_i (x) h_i,
with u the gradient from above. Once the chunks are summed, a u_i that arrives later cannot be
multiplied in; to wait for it means to hold the chunks or to do a fourth matmul. A mask,
temperature squared and 1 / count are all known before the forward, so they are arguments, and only
one number is left to arrive from above, which multiplies what is stored.

Any loss of `divergence` and `sparse` takes part unchanged: a chunk's gradient is autograd's own, so
this path cannot optimise something else than the plain one does. Where all terms are linear in
log-probabilities (`Picked`: labels, a teacher's sample; `Whole`: its distribution) their gradient
is the softmax less the targets: it is made in the place of the chunk's logits, for all terms at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses.divergence import cross_entropy, forward_kl
from limbeck.losses.numerics import NEVER, at_least_fp32, without_autocast
from limbeck.losses.sparse import rows_per_chunk, sampled_cross_entropy, sparse_divergence

Rows = slice | Tensor  # some of the P positions
Loss = Callable[[Tensor, Rows], Tensor]  # student logits (c, V), which positions -> (c,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), as transformers has it.

    Cohere's `logit_scale` multiplies; for Granite's `logits_scaling`, which divides, pass 1 / it.
    Tied or not makes no difference: autograd adds the gradients of a weight that is used twice.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None  # `final_logit_softcapping`

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in fp32, whatever came in: bf16 logits are wrong by 0.2 %."""
        with without_autocast(hidden):
            # the scale on the small side of the matmul
            scaled = at_least_fp32(hidden) * self.logit_scale
            logits = scaled @ at_least_fp32(self.weight).T
            if self.bias is not None:
                logits = logits + at_least_fp32(self.bias) * self.logit_scale
            return _capped(logits, self.softcap)


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One loss and what each position counts: mask * weight * temperature^2 / count, say."""

    loss: Loss
    weight: Tensor  # (P,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """`total` carries the gradient; `values` are for reporting and carry none."""

    total: Tensor  # (): sum over terms and positions of weight * value
    values: tuple[Tensor, ...]  # per term (P,), in nats, unweighted; 0 where no term counts


@dataclass(frozen=True, slots=True)
class Against:
    """A loss that knows how many positions its teacher has: of too many, a slice tells nothing."""

    num_positions: int
    loss: Loss

    def __call__(self, logits: Tensor, rows: Rows) -> Tensor:
        return self.loss(logits, rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked(Against):
    """-factor * sum of weights * log q[ids], q at one temperature: linear in log-probabilities.

    `loss` says the same of any logits.
    """

    at: Callable[[Rows], tuple[Tensor, Tensor]]  # ids (c, K) int64, weights (c, K)
    temperature: float = 1.0
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole(Against):
    """factor * KL(p || q) at one temperature, of a teacher's logits. As `Picked`."""

    at: Callable[[Rows], Tensor]  # logits (c, V)
    temperature: float = 1.0
    factor: float = 1.0


def against_logits(
    divergence: Callable[..., Tensor], teacher_logits: Tensor, *, temperature: float = 1.0
) -> Loss:
    """A divergence from dense teacher logits (P, V)."""
    if divergence is forward_kl:
        return Whole(
            num_positions=len(teacher_logits), temperature=temperature,
            at=lambda rows: teacher_logits[rows],
            loss=lambda logits, rows: forward_kl(
                logits, teacher_logits[rows], temperature=temperature
            ),
        )  # fmt: skip
    return Against(
        len(teacher_logits),
        lambda logits, rows: divergence(logits, teacher_logits[rows], temperature=temperature),
    )


def against_head(
    divergence: Callable[..., Tensor],
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
) -> Loss:
    """A divergence from a teacher's last hidden states (P, D_teacher) through its own head."""

    def loss(logits: Tensor, rows: Rows) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head.logits(teacher_hidden[rows])  # (c, V)
        return divergence(logits, teacher_logits, temperature=temperature)

    return Against(len(teacher_hidden), loss)


def against_sparse(
    divergence: Callable[..., Tensor],
    ids: Tensor,
    probs: Tensor,
    tail: Tensor,
    *,
    temperature: float = 1.0,
) -> Loss:
    """`sparse_divergence` from (P, K), (P, K), (P,), taken at `temperature`."""
    return Against(
        len(ids),
        lambda logits, rows: sparse_divergence(
            divergence, logits, ids[rows], probs[rows], tail[rows], temperature=temperature
        ),
    )


def against_sample(ids: Tensor, weights: Tensor, *, temperature: float = 1.0) -> Loss:
    """`sampled_cross_entropy` from (P, K), (P, K)."""
    return Picked(
        num_positions=len(ids), temperature=temperature,
        at=lambda rows: (ids[rows], weights[rows]),
        loss=lambda logits, rows: sampled_cross_entropy(
            logits, ids[rows], weights[rows], temperature=temperature
        ),
    )  # fmt: skip


def against_labels(labels: Tensor) -> Loss:
    """Cross-entropy with hard labels (P,) int64, valid wherever any of the terms counts."""
    ones = torch.ones(len(labels), 1, device=labels.device)
    return Picked(
        num_positions=len(labels), at=lambda rows: (labels[rows].unsqueeze(-1), ones[rows]),
        loss=lambda logits, rows: cross_entropy(logits, labels[rows]),
    )  # fmt: skip


def fused_loss(hidden: Tensor, head: Head, terms: Sequence[Term], *, retain: bool = False) -> Fused:
    """Sum of the terms for hidden (P, D), with gradients for hidden, head weight and bias.

    Terms share the head's matmul. A position at which every weight is 0 is left out before the
    matmul: it costs nothing, its gradient is exactly zero, and NaN there does not spread. Memory:
    some chunks of `CHUNK_BYTES` and a gradient like each input, which the backward hands over
    without a copy; `retain` copies it, for a graph that is walked more than once. Raises ValueError
    where a weight's shape is not (P,) or a teacher has other than P positions, RuntimeError for a
    second walk without `retain` and for a second derivative.
    """
    for term in terms:
        if term.weight.shape != hidden.shape[:1]:
            raise ValueError(
                f"weights {tuple(term.weight.shape)} must be one per position, hidden is "
                f"{tuple(hidden.shape)}"
            )
        loss = term.loss
        if isinstance(loss, Against) and loss.num_positions != len(hidden):
            raise ValueError(
                f"the teacher has {loss.num_positions} positions, hidden {len(hidden)}: are "
                "both from the same tokens?"
            )
    inputs = (hidden, head.weight, head.bias)
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs
    ]
    run = _Run(head, tuple(terms), wanted, retain)
    total, *values = _FusedLoss.apply(*inputs, run)
    return Fused(total=total, values=tuple(values))


@dataclass(frozen=True, slots=True)
class _Run:
    head: Head
    terms: tuple[Term, ...]
    wanted: list[bool]  # gradients of hidden, weight, bias
    retain: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, run: _Run
    ) -> tuple[Tensor, ...]:
        with without_autocast(hidden):
            ctx.gradients, total, values = _forward(hidden, weight, bias, run)
        ctx.retain = run.retain
        ctx.mark_non_differentiable(*values)
        return (total, *values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("fused_loss(..., retain=True) is needed to walk its graph twice")
        if ctx.retain:
            gradients = [g if g is None else g.clone() for g in gradients]
        else:
            ctx.gradients = None
        return (*(g if g is None else g.mul_(grad_total) for g in gradients), None)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, run: _Run
) -> tuple[list[Tensor | None], Tensor, list[Tensor]]:
    """Gradients for (hidden, weight, bias) where wanted, the weighted sum, values per term."""
    w = at_least_fp32(weight)  # (V, D), once for all chunks
    b = None if bias is None else at_least_fp32(bias) * run.head.logit_scale
    scale = run.head.logit_scale
    weights = [at_least_fp32(term.weight.detach()) for term in run.terms]
    values = [w.new_zeros(len(hidden)) for _ in run.terms]
    # sums over chunks are fp32, whatever the parameters are
    grad_hidden, grad_weight, grad_bias = sums = [
        torch.zeros_like(of, dtype=w.dtype) if of is not None and want else None
        for of, want in zip((hidden, weight, bias), run.wanted, strict=True)
    ]
    total = w.new_zeros(())
    for rows in _chunks(weights, len(hidden), rows_per_chunk(len(w), w.device.type)):
        h = at_least_fp32(hidden[rows]) * scale  # (c, D)
        chunk_total, part, g = _chunk(h, w, b, rows, weights, run)
        total += chunk_total
        for value, v in zip(values, part, strict=True):
            value[rows] = v.to(value.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = (g @ w) * scale
        if grad_weight is not None:
            grad_weight.addmm_(g.T, h)
        if grad_bias is not None:
            grad_bias.add_(g.sum(0), alpha=scale)
        del g  # before the next chunk is made
    gradients = [
        s.to(of.dtype) if s is not None and of is not None else None
        for s, of in zip(sums, (hidden, weight, bias), strict=True)
    ]
    return gradients, total, values


def _chunk(
    h: Tensor, w: Tensor, b: Tensor | None, rows: Rows, weights: Sequence[Tensor], run: _Run
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(c, D) -> the weighted sum, values per term (c,), the gradient for the logits (c, V)."""
    linear = h @ w.T  # (c, V), never in bf16
    if b is not None:
        linear += b
    simple = [term.loss for term in run.terms if isinstance(term.loss, Picked | Whole)]
    alike = len({loss.temperature for loss in simple}) == 1 and len(simple) == len(run.terms)
    whole = any(isinstance(loss, Whole) for loss in simple)
    if alike and run.head.softcap is None and not (whole and b is not None):
        # (a bias may rule classes out for the student, which a whole distribution would notice)
        return _in_place(linear, simple, [u[rows] for u in weights], rows)
    with torch.set_grad_enabled(any(run.wanted)):
        logits = _capped(linear.requires_grad_(any(run.wanted)), run.head.softcap)
        part = [term.loss(logits, rows) for term in run.terms]  # (c,) each
        weighted = [(v * u[rows]).sum() for v, u in zip(part, weights, strict=True)]
        chunk_total = torch.stack(weighted).sum()
        g = torch.autograd.grad(chunk_total, linear)[0] if any(run.wanted) else linear
    return chunk_total.detach(), [v.detach() for v in part], g


def _in_place(
    linear: Tensor, losses: Sequence[Picked | Whole], weights: Sequence[Tensor], rows: Rows
) -> tuple[Tensor, list[Tensor], Tensor]:
    """As `_chunk`, of logits (c, V) that become their gradient."""
    t = losses[0].temperature
    scaled = linear.sub_(_top(linear))
    if t != 1:
        scaled.div_(t)
    # each value is factor * (a + b * log of the softmax's mass)
    parts: list[tuple[Tensor, Tensor]] = []
    pulls: list[Tensor] = []  # (c, 1): what the softmax counts in the gradient
    targets: list[tuple[Tensor | None, Tensor]] = []  # what is taken from it: at ids, or at all
    for loss, weight in zip(losses, weights, strict=True):
        pull = (weight * (loss.factor / t)).unsqueeze(-1)  # (c, 1)
        if isinstance(loss, Picked):
            ids, w = loss.at(rows)  # (c, K) each
            w, z = at_least_fp32(w), scaled.gather(-1, ids).clamp_min_(NEVER)
            parts.append((-(w * z).sum(-1), w.sum(-1)))
            pulled = w.masked_fill(z <= NEVER, 0) * pull  # a class at -inf takes no gradient
            pulls.append(pulled.sum(-1, keepdim=True))
            targets.append((ids, pulled))
        else:
            x = at_least_fp32(loss.at(rows))
            x = x - _top(x)  # a tensor of our own
            if t != 1:
                x.div_(t)
            probs = x.clamp_min_(NEVER).exp()
            total = probs.sum(-1, keepdim=True)
            probs.div_(total)
            apart = x.sub_(scaled).mul_(probs).sum(-1) - total.log().squeeze(-1)
            parts.append((apart, torch.ones_like(apart)))
            pulls.append(pull)
            targets.append((None, probs.mul_(pull)))
            del x, probs
    mass = scaled.exp_().sum(-1, keepdim=True)  # (c, 1); 0 where every class is ruled out
    log_mass = mass.log().clamp_min_(NEVER).squeeze(-1)
    values = [
        loss.factor * (a + b * log_mass) for loss, (a, b) in zip(losses, parts, strict=True)
    ]
    weighted = [(value * weight).sum() for value, weight in zip(values, weights, strict=True)]
    scaled.mul_(torch.stack(pulls).sum(0) / mass.masked_fill(mass == 0, 1))
    for where, taken in targets:
        if where is None:
            scaled.sub_(taken)
        else:
            scaled.scatter_add_(-1, where, -taken)
    return torch.stack(weighted).sum(), values, scaled


def _top(logits: Tensor) -> Tensor:
    """(c, V) -> (c, 1); 0 where all are -inf."""
    top = logits.amax(-1, keepdim=True)
    return top.masked_fill_(top == -torch.inf, 0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _chunks(weights: Sequence[Tensor], num_positions: int, size: int) -> Iterator[Rows]:
    """Slices where all positions count: a slice of teacher logits is a view, no copy."""
    counted = torch.stack([w != 0 for w in weights]).any(0)
    if counted.all():
        starts = range(0, num_positions, size)
        return (slice(start, min(start + size, num_positions)) for start in starts)
    return iter(counted.nonzero().squeeze(-1).split(size))
