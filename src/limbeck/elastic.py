"""Which sizes of a family are active in which step, and the gradient of such a step.

All draws follow from (seed, step) alone: a resumed run needs no state, and all ranks draw alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from torch import Tensor

from limbeck.balance import Balance
from limbeck.family import Family
from limbeck.shared_adamw import Piece, gather
from limbeck.step import Found, Step, Training

_GOLDEN = 0.6180339887498949
_RATE_POWER = 0.4  # of the largest size's work over a size's own


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What is trained in a step.

    all: every size. sandwich: the largest, the smallest, and one from each half of those between.
    one: one size, drawn with `shares`, or each as often as any other if there are none; from
    `switch` on (a fraction of the steps) with `late_shares`. Over any stretch of steps each size
    has its share almost exactly: the draws are a golden-ratio sequence, not independent.
    """

    policy: Literal["all", "sandwich", "one"] = "one"
    shares: Mapping[str, float] = field(default_factory=dict)
    late_shares: Mapping[str, float] = field(default_factory=dict)
    switch: float = 1.0
    rates: Mapping[str, float] | None = None
    """What the learning rate is multiplied by where this size is active, 1 unless named; of several
    that are active together the mean counts. None: what `for_family` gives."""

    def for_family(self, family: Family) -> Sampling:
        """The same with rates, if it has none and trains one size a step: 1 for the size with the
        most work, (most work / its work) ** 0.4 for another. The learning rate is then the one that
        suits the largest.

        Smaller sizes want higher rates, in a family as alone: of students with 100, 42, 19, 8 and
        2 % of the largest one's work that gives 1, 1.4, 2, 2.8 and 4.5. The power was found by
        trials on validation rows, as was that each size has the same share of the steps: more for
        the small ones overfit all, more for the large ones were worse for all. Where the family has
        no more than a quarter of what its sizes would cost alone, shares of 1 / sqrt(cost) are
        better, as they make more steps of it (docs/log.md).
        """
        if self.rates is not None or self.policy != "one":
            return self
        work = {name: max(1, size.work) for name, size in family.sizes.items()}
        most = max(work.values())
        return replace(self, rates={name: (most / w) ** _RATE_POWER for name, w in work.items()})

    def drawn(self, names: Sequence[str]) -> list[str]:
        """Those that are ever trained: the others only lend their weights."""
        if self.policy != "one" or not self.shares:
            return [*names]
        return [n for n in names if self.shares.get(n) or self.late_shares.get(n)]

    def rate(self, active: Sequence[str]) -> float:
        rates = self.rates or {}
        return sum(rates.get(name, 1.0) for name in active) / len(active)

    def active(self, names: Sequence[str], *, seed: int, step: int, done: float) -> list[str]:
        """Names of the sizes of this step, in the order of `names`: the largest first."""
        if self.policy == "all" or len(names) == 1:
            return [*names]
        if self.policy == "sandwich":
            random = np.random.default_rng((seed, step, len(names)))
            between = names[1:-1]
            middle = (len(between) + 1) // 2
            halves = [half for half in (between[:middle], between[middle:]) if half]
            drawn = [half[int(random.integers(len(half)))] for half in halves]
            return [names[0], *drawn, names[-1]]
        given = self.late_shares if self.late_shares and done >= self.switch else self.shares
        weights = np.array([given.get(name, 0.0) if given else 1.0 for name in names])
        start = np.random.default_rng((seed, len(names))).random()
        at = (start + step * _GOLDEN) % 1.0
        ends = np.cumsum(weights / weights.sum())[:-1]
        return [names[int(np.searchsorted(ends, at, side="right"))]]


@dataclass(frozen=True, kw_only=True)
class FoundOfSizes:
    """Of one optimizer step, all active sizes together."""

    pieces: list[Piece]  # the gradient of the mean of their losses
    learnt: list[Piece]  # those of projectors, and of what the balance learns
    sizes: Mapping[str, Found]  # what each active size found
    rate: float  # what the learning rate is to be multiplied by
    of_family: bool  # of more than one size


class ElasticStep:
    """A `Step` for each size, and the sum of what the active ones find."""

    def __init__(self, family: Family, training: Training, sampling: Sampling) -> None:
        self.family, self.training = family, training
        self.sampling = sampling.for_family(family)
        self.learnt: dict[str, Tensor] = {}
        self.steps = {
            name: Step(family.sizes[name].model, training,
                       [p for _, p in family.sizes[name].trainable])
            for name in self.sampling.drawn([*family.sizes])
        }  # fmt: skip

    def balanced(self, balance: Balance) -> dict[str, Tensor]:
        """From now on the terms are balanced so, alike for all sizes. What else is learnt: the
        projectors and what the balance has."""
        for step in self.steps.values():
            step.balance = balance
        projectors = {
            f"{feature.name}.{n}": p.detach()
            for feature in self.training.objective.features
            for n, p in feature.named_parameters()
        }
        weights = {f"balance.{n}": p.detach() for n, p in balance.named_parameters()}
        self.learnt = projectors | weights
        return self.learnt

    def __call__(self, step: int, *, look: bool) -> FoundOfSizes:
        active = self.sampling.active(
            [*self.steps], seed=self.training.seed, step=step, done=step / self.training.steps
        )
        found: dict[str, Found] = {}
        learnt: list[Piece] = []
        for name in active:
            size = self.family.sizes[name]
            size.refresh(self.family.weights)
            found[name] = self.steps[name](step, look=look)
            for gradient in found[name].gradient:
                if gradient is not None and len(active) > 1:
                    gradient.mul_(1 / len(active))
            last = found[name].gradient[len(size.trainable) :]
            for (where, parameter), gradient in zip(self.learnt.items(), last, strict=True):
                if gradient is not None:
                    region = tuple(slice(0, n) for n in parameter.shape)
                    learnt.append(Piece(where, region, gradient))
        pieces = gather(self.family, [(self.family.sizes[n], f.gradient) for n, f in found.items()])
        return FoundOfSizes(
            pieces=pieces, learnt=learnt, sizes=found, rate=self.sampling.rate(active),
            of_family=len(self.family.sizes) > 1,
        )  # fmt: skip
