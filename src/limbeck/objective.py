"""From values per position to one loss: mask, temperature squared, counts and weights, once.

The mean is over all counted positions of an optimizer step. Counts are known before any forward,
so the gradient does not depend on how the step is cut into micro-batches (but for `dist`, which
compares the examples of a micro-batch with each other).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from limbeck.features import Feature
from limbeck.losses.batchwise import dist
from limbeck.losses.crosstokenizer import uld
from limbeck.losses.divergence import (
    akl,
    cross_entropy,
    dkd,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    standardize,
    tvd,
)
from limbeck.losses.fused import Picked, Rows, Term, Whole, against_labels, fused_loss
from limbeck.losses.ranking import ranking
from limbeck.losses.sparse import sampled_cross_entropy, sparse_divergence
from limbeck.temperature import Fixed, Temperature
from limbeck.types import Batch, DenseTargets, LossTerm, Need, Signal, SparseTargets
from limbeck.vocabulary import fitted

# Those that need nothing but two distributions run on K + 1 outcomes as well.
_OF_DISTRIBUTIONS: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl, "tvd": tvd, "akl": akl,
}  # fmt: skip
_OF_LOGITS: Mapping[str, Callable[..., Tensor]] = {
    **_OF_DISTRIBUTIONS, "dist": dist, "ranking": ranking,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """soft_weight * T^2 * D(teacher, student at T) + hard_weight * cross-entropy, as given.

    From sampled signals the soft term is the teacher's cross-entropy, whose gradient is the KL's in
    expectation: its value stays above 0 by the teacher's entropy, which a sample does not tell.
    """

    temperature: Temperature = field(default_factory=lambda: Fixed(1.0))
    soft_weight: float = 0.0
    hard_weight: float = 1.0
    divergence: str = "forward_kl"
    settings: Mapping[str, Any] = field(default_factory=dict)  # the divergence's own
    standardized: bool = False  # both sides' logits, before the temperature
    smoothing: float = 0.0  # of hard labels
    features: tuple[Feature, ...] = ()  # between hidden states, between embeddings
    shared_ids: int | None = None  # of both vocabularies (`vocabulary`); None: they are one
    places: Callable[[Batch], Tensor] | None = None  # of a teacher with another tokenizer: (B, T)

    @property
    def needs(self) -> frozenset[Need]:
        """What the teacher must provide; empty where there is nothing to learn from it."""
        logits = {Need.LOGITS} if self.soft_weight else set()
        return frozenset(logits | {feature.need for feature in self.features})

    @property
    def weights(self) -> dict[str, float]:
        """Of each term, by its name."""
        found = {"soft": self.soft_weight, "hard": self.hard_weight}
        found |= {feature.name: feature.weight for feature in self.features}
        return {name: weight for name, weight in found.items() if weight}

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Whose hidden states are compared; numbers or paths."""
        return tuple({ours: 0 for feature in self.features for ours, _ in feature.pairs})

    def counts(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """What each term's mean is over, of a whole optimizer step: () int64 each."""
        batches = [*batches]
        positions = torch.stack([batch.mask.sum() for batch in batches]).sum()
        found = dict.fromkeys(self.weights, positions)
        for feature in self.features:
            found[feature.name] = torch.stack([feature.count(b) for b in batches]).sum()
        if self.places is not None:
            found["soft"] = torch.stack([self.places(b).sum() for b in batches]).sum()
        return found

    def terms(
        self, student: Signal, teacher: Signal, batch: Batch, *, done: float = 0.0,
        apart: bool = True,
    ) -> dict[str, LossTerm]:  # fmt: skip
        """Each part with its weight, summed over what it counts in the batch.

        `done` is the share of the training that is behind, for a temperature that changes. Unless
        the gradients are wanted `apart`, one term may carry another's too: only their plain sum
        is then right (and a head is multiplied once, not once for each).
        """
        labels = batch.labels[batch.mask]  # (P,)
        losses: dict[str, Callable[[Tensor, Rows], Tensor]] = {}
        if self.soft_weight and self.places is None:
            losses["soft"] = self._softly(student, teacher, batch, labels, done)
        if self.hard_weight:
            losses["hard"] = self._hard(labels, batch)
        if student.head is not None:
            terms = self._fused(student, batch, losses, apart=apart)
        else:
            assert student.logits is not None
            # Positions that do not count are left out here, once: whatever stands in them, NaN
            # say, has no value and no gradient.
            logits = student.logits[batch.mask]  # (P, V)
            terms = {
                name: _sum(loss(logits, slice(None)) * self.weights[name])
                for name, loss in losses.items()
            }
        for feature in self.features:
            terms[feature.name] = feature(student, teacher, batch)
        if self.places is not None:
            terms["soft"] = self._uld(student, teacher, self.places(batch), done)
        return terms

    def _softly(
        self, student: Signal, teacher: Signal, batch: Batch, labels: Tensor, done: float
    ) -> Callable[[Tensor, Rows], Tensor]:
        targets = self._targets(student, teacher, batch)

        def loss(logits: Tensor, rows: Rows) -> Tensor:
            return self._soft(logits, labels[rows], targets(rows), done)

        stored, t = teacher.targets, self.temperature.fixed
        if isinstance(stored, SparseTargets):
            if stored.kind != "sampled":
                return loss
            t = stored.temperature
            return Picked(
                num_positions=len(labels), loss=loss, at=lambda rows: _few(targets(rows)),
                temperature=t, factor=t**2,
            )  # fmt: skip
        plain = self.divergence == "forward_kl" and not (self.settings or self.standardized)
        if not plain or t is None:
            return loss
        return Whole(
            num_positions=len(labels), loss=loss, at=lambda rows: _all(targets(rows)),
            temperature=t, factor=t**2,
        )  # fmt: skip

    def _uld(self, student: Signal, teacher: Signal, places: Tensor, done: float) -> LossTerm:
        """Of the places (B, T) that the teacher's tokenizer has too, in their order."""
        assert student.logits is not None
        assert isinstance(teacher.targets, DenseTargets)
        theirs = teacher.targets.logits.to(student.logits.device)  # (S, V')
        t = self.temperature.at(done, theirs)
        return _sum(uld(student.logits[places], theirs, temperature=t) * t**2 * self.soft_weight)

    def _fused(
        self, student: Signal, batch: Batch, losses: Mapping[str, Callable], *, apart: bool
    ) -> dict[str, LossTerm]:
        assert student.head is not None
        assert student.head_input is not None
        hidden, terms = student.head_input[batch.mask], {}  # (P, D)
        each = {
            name: Term(loss=loss, weight=hidden.new_full((len(hidden),), self.weights[name]))
            for name, loss in losses.items()
        }
        names = [*each]
        for together in [[name] for name in names] if apart else [names]:
            # apart, a look walks each graph and then that of the sum
            chosen = [each[name] for name in together]
            fused = fused_loss(hidden, student.head, chosen, retain=apart)
            first, *others = together
            rest = hidden.new_zeros((), dtype=torch.float32)
            for name, values in zip(others, fused.values[1:], strict=True):
                term = values.sum() * self.weights[name]
                terms[name] = LossTerm(total=term, count=torch.tensor(len(hidden)))
                rest = rest + term
            # of all in value the first's share, in gradient everything
            terms[first] = LossTerm(total=fused.total - rest, count=torch.tensor(len(hidden)))
        return {name: terms[name] for name in names}

    def _targets(
        self, student: Signal, teacher: Signal, batch: Batch
    ) -> Callable[[Rows], DenseTargets | SparseTargets]:
        """Of some of the counted positions. Logits that a teacher left to its head are made then:
        of a chunk, and never of positions that do not count."""
        found, fit = teacher.targets, self._fit(student)
        if found is None and teacher.head is not None:
            assert teacher.head_input is not None
            head, hidden = teacher.head, teacher.head_input.detach()[batch.mask]  # (P, D)

            @torch.no_grad()
            def made(rows: Rows) -> DenseTargets | SparseTargets:
                return fit(DenseTargets(logits=head.logits(hidden[rows])))

            return made
        if found is None:
            assert teacher.logits is not None, "the teacher was asked for logits and gave none"
            theirs = teacher.logits.detach().to(batch.mask.device)
            found = DenseTargets(logits=theirs[batch.mask])
        return fit(found.to(batch.mask.device)).at

    def _fit(
        self, student: Signal
    ) -> Callable[[DenseTargets | SparseTargets], DenseTargets | SparseTargets]:
        """To the student's vocabulary."""
        if self.shared_ids is None:
            return lambda targets: targets
        size = len(student.head.weight) if student.head is not None else None
        if size is None:
            assert student.logits is not None
            size = student.logits.shape[-1]
        return partial(fitted, shared=self.shared_ids, vocab_size=size)

    def _hard(self, labels: Tensor, batch: Batch) -> Callable[[Tensor, Rows], Tensor]:
        """Of two labels where two examples are mixed, by their shares."""
        if batch.mixed is None and not self.smoothing:
            return against_labels(labels)
        entropy = partial(cross_entropy, smoothing=self.smoothing)
        if batch.mixed is None:
            return lambda logits, rows: entropy(logits, labels[rows])
        others = batch.mixed.labels[batch.mask]  # (P,)
        share = batch.mixed.share[batch.mask]
        return lambda logits, rows: entropy(logits, labels[rows]) * (1 - share[rows]) + (
            entropy(logits, others[rows]) * share[rows]
        )

    def _soft(
        self, logits: Tensor, labels: Tensor, targets: DenseTargets | SparseTargets, done: float
    ) -> Tensor:
        """(P, V) -> (P,), times T^2: the gradient of soft targets shrinks as 1 / T^2.

        (Hinton et al. 2015, 1503.02531, sec. 2.)
        """
        if isinstance(targets, SparseTargets):
            return self._sparse(logits, targets)
        teacher = targets.logits.to(logits.device)
        if self.standardized:
            logits, teacher = standardize(logits), standardize(teacher)
        t = self.temperature.at(done, teacher)
        if self.divergence == "dkd":
            value = dkd(logits, teacher, labels, temperature=t, **self.settings)
        else:
            value = _OF_LOGITS[self.divergence](logits, teacher, temperature=t, **self.settings)
        return value * t**2

    def _sparse(self, logits: Tensor, targets: SparseTargets) -> Tensor:
        t = targets.temperature
        assert t == self.temperature.fixed, "targets of another temperature"
        ids, probs = targets.ids.to(logits.device), targets.probs.to(logits.device)
        if targets.kind == "sampled":
            return sampled_cross_entropy(logits, ids, probs, temperature=t) * t**2
        divergence = partial(_OF_DISTRIBUTIONS[self.divergence], **self.settings)
        tail = targets.tail.to(logits.device)
        return sparse_divergence(divergence, logits, ids, probs, tail, temperature=t) * t**2


def total(terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each term's share of the step's mean. () each."""
    return {name: term.total / counts[name].clamp_min(1) for name, term in terms.items()}


def _few(targets: DenseTargets | SparseTargets) -> tuple[Tensor, Tensor]:
    assert isinstance(targets, SparseTargets)
    return targets.ids, targets.probs


def _all(targets: DenseTargets | SparseTargets) -> Tensor:
    assert isinstance(targets, DenseTargets)
    return targets.logits


def _sum(per_position: Tensor) -> LossTerm:
    return LossTerm(total=per_position.sum(), count=torch.tensor(len(per_position)))
