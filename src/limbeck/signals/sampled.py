"""A random sample of the vocabulary whose weights have the teacher's distribution as their mean.

Source: Anshumann et al., "Sparse Logit Sampling", ACL 2025 (2503.16870): the k largest are a
biased target, a sample is not. Their draw is `independent` here; `distinct`, the default, is the
sample of n ids with the least variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.signals.bits import bits_for, pack, packed_width, unpack
from limbeck.signals.blocks import find, in_blocks, in_chunks, largest
from limbeck.signals.draws import uniforms
from limbeck.signals.targets import SparseTargets, check_served, check_setting


@dataclass(frozen=True, slots=True)
class Sampled:
    """Serves only `temperature`: weights drawn at one are no estimate at another.

    With q ~ p^importance_temperature (1: the teacher's own p, which minimises the variance):

    - independent: n draws from q with replacement, weight p / (n q) each, equal ids merged.
    - systematic: the same with the draws at (u + i) / n of q's running sum, one u a position:
      an id is drawn floor(n q) or ceil(n q) times. The least variance of whole counts.
    - distinct: n different ids, id j with probability pi_j = min(1, q_j / tau), sum(pi) = n,
      weight p_j / pi_j. Large probabilities are so stored as they are and only the tail is
      sampled, systematically. Before rounding this minimises sum_j Var(w_j) over all unbiased
      samples of n ids (Szegedy and Thorup, "On the variance of subset sum estimation", ESA 2007;
      Cohen et al., 0803.0473), which is the variance of the gradient towards the student's
      logits, s - w: at equal bytes a quarter of that of `independent` and 0.6 of `systematic`,
      and a hundredth where the teacher is sure (benchmarks/signals.py, a made-up teacher).

    Weights of the first two are counts in ceil(log2(n + 1)) bits, exact. Those of `distinct` have
    two bits more: squares (c / c_max)^2 with c rounded up or down at random, so that the mean is
    exact. That adds at most 1 / c_max^2, about 1 / (16 n^2), to the variance summed over ids; fewer
    bits were worse, more no better. Other importance temperatures: bfloat16, rounded likewise.

    Draws follow from (seed, example id, position) alone. Another device or torch may compute
    the last bit of an exponential otherwise and then, rarely, draw a neighbouring id.
    """

    name: ClassVar = "sampled"

    n: int = 12
    draws: Literal["distinct", "systematic", "independent"] = "distinct"
    importance_temperature: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_setting("sampled", "n", self.n, "1 to 65535", holds=1 <= self.n < 2**16)
        kinds = ("distinct", "systematic", "independent")
        check_setting("sampled", "draws", self.draws, ", ".join(kinds), holds=self.draws in kinds)
        holds = 0 < self.importance_temperature <= 2
        allowed = "above 0 and at most 2"
        value = self.importance_temperature
        check_setting("sampled", "importance_temperature", value, allowed, holds=holds)
        holds = 0 < self.temperature < float("inf")
        check_setting("sampled", "temperature", self.temperature, "above 0", holds=holds)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return (self.temperature,)

    def fields(self, vocab_size: int) -> dict[str, tuple[torch.dtype, int]]:
        slots = min(self.n, vocab_size)
        weights = (torch.uint8, packed_width(slots, self._weight_bits))
        if self.importance_temperature != 1:
            weights = (torch.bfloat16, slots)
        return {
            "ids": (torch.uint8, packed_width(slots, bits_for(vocab_size))),
            "weights": weights,
        }

    @property
    def _weight_bits(self) -> int:
        return bits_for(self.n + 1) + (2 if self.draws == "distinct" else 0)

    @property
    def _top_code(self) -> int:
        return 2**self._weight_bits - 1

    def encode(self, logits: Tensor, keys: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """(P, V), (P, 2) -> fields on the logits' device. Raises DataError for NaN or +inf."""
        return in_chunks(partial(self._encode, seed=seed), logits, keys)

    def _encode(self, logits: Tensor, keys: Tensor, *, seed: int) -> dict[str, Tensor]:
        vocab_size = logits.shape[1]
        blocks, maxima = in_blocks(logits, keys, self.temperature)
        draw = self._distinct if self.draws == "distinct" else self._repeated
        ids, weights = draw(blocks, maxima, keys, seed, min(self.n, vocab_size))
        noise = uniforms(keys, seed, range(self.n, self.n + ids.shape[1]))
        if self.importance_temperature != 1:
            stored = _rounded_to_bf16(weights, noise)
        elif self.draws == "distinct":
            stored = pack(_rounded_to_squares(weights, noise, self._top_code), self._weight_bits)
        else:
            stored = pack((weights * self.n).round().long(), self._weight_bits)
        return {"ids": pack(ids.masked_fill(weights == 0, 0), bits_for(vocab_size)),
                "weights": stored}  # fmt: skip

    def _masses(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unnormalised q, and p's where that is another (the logits are overwritten)."""
        if self.importance_temperature == 1:
            return logits.exp_(), None
        return (logits * self.importance_temperature).exp_(), logits.exp_()

    def _repeated(
        self, blocks: Tensor, maxima: Tensor, keys: Tensor, seed: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Ids (P, slots), weights (P, slots) float64."""
        del maxima
        q, p = self._masses(blocks)
        sums = q.sum(-1).double()  # (P, N)
        q_total = sums.sum(-1, keepdim=True)  # (P, 1)
        if self.draws == "systematic":
            steps = torch.arange(self.n, device=q.device) + uniforms(keys, seed, range(1))
            steps /= self.n
        else:
            steps = uniforms(keys, seed, range(self.n))
        drawn = find(q, sums, steps * q_total).sort(-1).values  # (P, n)
        slot = (drawn[:, 1:] != drawn[:, :-1]).cumsum(-1)
        slot = torch.nn.functional.pad(slot, (1, 0))  # (P, n) equal ids share one
        ids = drawn.new_zeros(len(drawn), slots).scatter_(1, slot, drawn)
        weights = torch.zeros_like(ids, dtype=torch.float64)
        weights.scatter_add_(1, slot, torch.full_like(drawn, 1 / self.n, dtype=torch.float64))
        if p is not None:
            p_total = p.sum(-1).sum(-1, dtype=torch.float64).unsqueeze(-1)
            weights *= _at(p, ids) / p_total * q_total / _at(q, ids).clamp_min(1e-300)
        return ids, weights

    def _distinct(
        self, blocks: Tensor, maxima: Tensor, keys: Tensor, seed: int, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Ids (P, slots), weights (P, slots) float64."""
        top, _ = largest(blocks, maxima, slots)  # (P, n): only these can be certain
        q, p = self._masses(blocks)
        heads = _at(q, top)
        # sums over the rest, not sums less the heads: a tail of 1e-6 must keep its digits
        q.flatten(1).scatter_(1, top, 0)
        sums = q.sum(-1).double()  # (P, N)
        rest = sums.sum(-1, keepdim=True)  # (P, 1)

        # h of the heads are certain: the fewest for which the next has q <= tau = tail / (n - h)
        tails = rest + heads.flip(-1).cumsum(-1).flip(-1)  # (P, n): all but the first h
        sampled = torch.arange(slots, 0, -1, device=q.device)  # n - h
        num_heads = (heads * sampled <= tails).int().argmax(-1, keepdim=True)  # (P, 1)
        tail = tails.gather(1, num_heads)
        slot = torch.arange(slots, device=q.device)
        certain = slot < num_heads  # (P, n)

        back = heads.masked_fill(certain, 0)  # the others return to the tail
        q.flatten(1).scatter_(1, top, back.float())
        sums.scatter_add_(1, top // q.shape[-1], back)
        steps = (slot - num_heads).clamp_min(0) + uniforms(keys, seed, range(1))
        tau = tail / (slots - num_heads)
        drawn = find(q, sums, steps * tau)
        ids = torch.where(certain, top, drawn)
        if p is None:
            total = rest + heads.sum(-1, keepdim=True)
            return ids, torch.where(certain, heads, tau) / total
        total = p.sum(-1).sum(-1, dtype=torch.float64).unsqueeze(-1)
        odds = torch.where(certain, 1.0, _at(q, drawn) / tau.clamp_min(1e-300))
        return ids, _at(p, ids) / total / odds.clamp_min(1e-300)

    def decode(
        self, fields: Mapping[str, Tensor], vocab_size: int, temperature: float = 1.0
    ) -> SparseTargets:
        """Raises DataError for another temperature than the captured one."""
        check_served("sampled", temperature, self.temperatures)
        slots = min(self.n, vocab_size)
        if self.importance_temperature != 1:
            weights = fields["weights"].float()
        else:
            codes = unpack(fields["weights"], self._weight_bits, slots).float()
            distinct = self.draws == "distinct"
            weights = (codes / self._top_code).square() if distinct else codes / self.n
        return SparseTargets(
            kind="sampled",
            ids=unpack(fields["ids"], bits_for(vocab_size), slots),
            probs=weights,
            tail=torch.zeros_like(weights[:, 0]),
            temperature=temperature,
        )


def _at(blocks: Tensor, ids: Tensor) -> Tensor:
    """(P, N, L), (P, K) -> (P, K) float64."""
    return blocks.flatten(1).gather(1, ids).double()


def _rounded_to_squares(weights: Tensor, noise: Tensor, top_code: int) -> Tensor:
    """(P, K) float64 in [0, 1] -> int64 codes c; (c / top_code)^2 has the weight as its mean.

    Squares: a step is then 2 sqrt(w) / top_code, and the variance it adds in proportion to w.
    """
    below = (weights.sqrt() * top_code).floor_().clamp_max_(top_code - 1)
    step = (2 * below + 1) / top_code**2
    up = noise < (weights - (below / top_code) ** 2) / step
    return (below + up).long()


def _rounded_to_bf16(weights: Tensor, noise: Tensor) -> Tensor:
    """(P, K) float64 >= 0 -> bfloat16 with the weight as its mean: noise in the 16 cut bits."""
    bits = weights.float().view(torch.int32) + (noise * 2**16).int()
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
