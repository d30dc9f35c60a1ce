"""Which sizes of a family are active in which step, and the gradient of such a step.

All draws follow from (seed, step) alone: a resumed run needs no state, and all ranks draw alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from limbeck.cores import on_each
from limbeck.family import Family, Size
from limbeck.objective import Objective, total
from limbeck.shared_adamw import Piece, gather
from limbeck.types import Batch, Signal, Teacher

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What is trained in a step.

    all: every size. sandwich: the largest, the smallest, and one from each half of those between.
    one: one size, drawn with `shares`, or from equally many for each if there are none; from
    `switch` on (a fraction of the steps) with `late_shares`. Over any stretch of steps each size
    has its share almost exactly: the draws are a golden-ratio sequence, not independent.
    """

    policy: Literal["all", "sandwich", "one"] = "one"
    shares: Mapping[str, float] = field(default_factory=dict)
    late_shares: Mapping[str, float] = field(default_factory=dict)
    switch: float = 1.0
    ladder: float = 0.0
    """How much of the soft target comes from the next larger active size."""

    def active(self, names: Sequence[str], *, seed: int, step: int, done: float) -> list[str]:
        """Names of the sizes of this step, largest first as `names` are."""
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
        return [names[int(np.searchsorted(np.cumsum(weights / weights.sum()), at, side="right"))]]


class HasBatches(Protocol):
    @property
    def teacher(self) -> Teacher: ...
    @property
    def objective(self) -> Objective: ...
    def batches(self, step: int) -> list[Batch]: ...


def elastic_gradient(
    family: Family, training: HasBatches, active: Sequence[str], step: int, *, done: float = 0.0,
    ladder: float = 0.0,
) -> tuple[list[Piece], dict[str, Tensor]]:
    """Gradient of the mean of the active sizes' losses, and each size's own loss. ()"""
    batches = training.batches(step)
    count = training.objective.count(batches)
    sizes = [family.sizes[name] for name in active]
    for size in sizes:
        size.refresh(family.weights)
    share = partial(_share, training, sizes, count, done, ladder)
    shares = [*on_each(share, batches)]
    found = [(size, part[0][i]) for part in shares for i, size in enumerate(sizes)]
    losses = {
        size.name: torch.stack([part[1][i] for part in shares]).sum()
        for i, size in enumerate(sizes)
    }
    return gather(family, found), losses


def _share(
    training: HasBatches, sizes: Sequence[Size], count: Tensor, done: float, ladder: float,
    batch: Batch,
) -> tuple[list[tuple[Tensor | None, ...]], list[Tensor]]:  # fmt: skip
    objective = training.objective
    target = training.teacher.signal(batch, objective.needs)
    gradients, losses = [], []
    larger: Signal | None = None
    for size in sizes:
        output = Signal(logits=size.model(**batch.inputs).logits)
        parts = total(objective.terms(output, target, batch, done=done), count)
        if larger is not None and ladder and "soft" in parts:
            theirs = objective.terms(output, larger, batch, done=done)
            parts["soft"] = (1 - ladder) * parts["soft"] + ladder * total(theirs, count)["soft"]
        loss = torch.stack([*parts.values()]).sum()
        parameters = [*size.model.parameters()]
        gradients.append(
            torch.autograd.grad(loss / len(sizes), parameters, allow_unused=True)
        )  # at once, so that one size's graph is alive at a time
        losses.append(loss.detach())
        assert output.logits is not None
        larger = Signal(logits=output.logits.detach())
    return gradients, losses
