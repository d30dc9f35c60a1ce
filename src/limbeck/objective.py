"""From values per position to one loss: mask, temperature squared, counts and weights, once.

The mean is over all counted positions of an optimizer step. Counts are known before any forward,
so the gradient does not depend on how the step is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.losses.divergence import cross_entropy, forward_kl
from limbeck.types import Batch, LossTerm, Need, Signal


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """soft_weight * T^2 * KL(teacher || student at T) + hard_weight * cross-entropy, as given."""

    temperature: float = 1.0
    soft_weight: float = 0.0
    hard_weight: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        """What the teacher must provide; empty where there is nothing to learn from it."""
        return frozenset({Need.LOGITS}) if self.soft_weight else frozenset()

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Counted positions of a whole optimizer step. () int64."""
        return torch.stack([batch.mask.sum() for batch in batches]).sum()

    def terms(self, student: Signal, teacher: Signal, batch: Batch) -> dict[str, LossTerm]:
        """Each part with its weight, summed over the batch's counted positions."""
        assert student.logits is not None
        terms = {}
        if self.soft_weight:
            assert teacher.logits is not None, "the teacher was asked for logits and gave none"
            per_position = forward_kl(
                student.logits, teacher.logits.detach(), temperature=self.temperature
            )
            # the soft targets' gradient shrinks as 1/T^2 (Hinton et al. 2015, sec. 2)
            scale = self.soft_weight * self.temperature**2
            terms["soft"] = _masked(per_position * scale, batch.mask)
        if self.hard_weight:
            per_position = cross_entropy(student.logits, batch.labels)
            terms["hard"] = _masked(per_position * self.hard_weight, batch.mask)
        return terms

    def total(self, terms: Mapping[str, LossTerm], count: Tensor) -> Tensor:
        """This micro-batch's share of the step's mean. ()."""
        return torch.stack([term.total for term in terms.values()]).sum() / count.clamp_min(1)


def _masked(per_position: Tensor, mask: Tensor) -> LossTerm:
    # masked_fill, not a product: 0 * nan is nan
    return LossTerm(total=per_position.masked_fill(~mask, 0).sum(), count=mask.sum())
