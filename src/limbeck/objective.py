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
from limbeck.losses.sparse import sampled_cross_entropy, sparse_divergence
from limbeck.types import Batch, DenseTargets, LossTerm, Need, Signal, SparseTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """soft_weight * T^2 * KL(teacher || student at T) + hard_weight * cross-entropy, as given.

    From sampled signals the soft term is the teacher's cross-entropy, whose gradient is the KL's in
    expectation: its value stays above 0 by the teacher's entropy, which a sample does not tell.
    """

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
        # Positions that do not count are left out here, once: whatever stands in them, NaN say,
        # has no value and no gradient.
        logits = student.logits[batch.mask]  # (P, V)
        terms = {}
        if self.soft_weight:
            # the soft targets' gradient shrinks as 1/T^2 (Hinton et al. 2015, sec. 2)
            scale = self.soft_weight * self.temperature**2
            terms["soft"] = _sum(self._soft(logits, _targets(teacher, batch)) * scale)
        if self.hard_weight:
            per_position = cross_entropy(logits, batch.labels[batch.mask])
            terms["hard"] = _sum(per_position * self.hard_weight)
        return terms

    def _soft(self, logits: Tensor, targets: DenseTargets | SparseTargets) -> Tensor:
        """(P, V) -> (P,): KL(teacher || student) at the temperature, or what is known of it."""
        if isinstance(targets, DenseTargets):
            teacher = targets.logits.to(logits.device)
            return forward_kl(logits, teacher, temperature=self.temperature)
        assert targets.temperature == self.temperature, "targets of another temperature"
        ids, probs = targets.ids.to(logits.device), targets.probs.to(logits.device)
        if targets.kind == "sampled":
            return sampled_cross_entropy(logits, ids, probs, temperature=self.temperature)
        tail = targets.tail.to(logits.device)
        return sparse_divergence(
            forward_kl, logits, ids, probs, tail, temperature=self.temperature
        )

    def total(self, terms: Mapping[str, LossTerm], count: Tensor) -> Tensor:
        """This micro-batch's share of the step's mean. ()."""
        return torch.stack([term.total for term in terms.values()]).sum() / count.clamp_min(1)


def _targets(teacher: Signal, batch: Batch) -> DenseTargets | SparseTargets:
    if teacher.targets is not None:
        return teacher.targets
    assert teacher.logits is not None, "the teacher was asked for logits and gave none"
    return DenseTargets(logits=teacher.logits.detach()[batch.mask])


def _sum(per_position: Tensor) -> LossTerm:
    return LossTerm(total=per_position.sum(), count=torch.tensor(len(per_position)))
