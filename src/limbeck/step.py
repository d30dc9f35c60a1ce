"""One optimizer step of a training: signals, terms and their gradients, a share on each core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck._startup import prepare_torch
from limbeck.balance import Balance, Uncertainty, UPGrad, calibrated
from limbeck.cores import on_each, shares
from limbeck.objective import Objective, total
from limbeck.recipe_teaching import TrainingSpec
from limbeck.run import read_index, write_json
from limbeck.tasks.text_classification import Rows, order
from limbeck.types import Batch, Signal, Teacher

_CALIBRATION_STEPS = 4

prepare_torch()


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training run is, apart from the model."""

    rows: Rows
    teacher: Teacher
    objective: Objective
    spec: TrainingSpec
    seed: int
    title: str
    validate: Callable[[nn.Module], float] | None = None  # quality, a fraction; at each quarter
    balance: str = "fixed"
    looks: int = 20  # times that the terms' gradients are held against each other

    @property
    def steps(self) -> int:
        return max(1, round(self.spec.epochs * len(self.rows) / self.spec.batch_size))

    def positions(self, step: int) -> list[int]:
        """Rows of this optimizer step: epoch after epoch, each in its own order."""
        n, size = len(self.rows), self.spec.batch_size
        found: list[int] = []
        at = step * size
        while len(found) < size:
            epoch, offset = divmod(at + len(found), n)
            take = min(size - len(found), n - offset)
            found += order(n, seed=self.seed, epoch=epoch)[offset : offset + take].tolist()
        return found

    def batches(self, step: int) -> list[Batch]:
        """The step's rows in shares that are worked on side by side."""
        at = self.positions(step)
        return [self.rows.batch(at[s.start : s.stop]) for s in shares(len(at))]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one optimizer step, all shares together."""

    gradient: list[Tensor | None]  # of each parameter, the balance's own last
    terms: dict[str, Tensor]  # means over the step, () each: read where they are wanted only
    norms: dict[str, float]  # of each term's gradient, where that was looked at
    cosine: float | None  # between the two terms' gradients


class Step:
    """Forward and backward of a whole optimizer step, a share of it on each core."""

    def __init__(self, model: nn.Module, training: Training, weights: list[Tensor]) -> None:
        self.model, self.training, self.weights = model, training, weights
        self.balance = Balance()

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.balance.parameters()]

    def __call__(self, step: int, *, look: bool) -> Found:
        """With `look` the terms' gradients are held against each other too: a backward for each."""
        training, balance = self.training, self.balance
        batches = training.batches(step)
        count = training.objective.count(batches)
        separate = look or balance.separate
        share = partial(self._share, step / training.steps, count, separate)
        shares = [*on_each(share, batches)]
        terms = {
            name: torch.stack([s[2][name].total.detach() for s in shares]).sum() / count
            for name in shares[0][2]
        }
        norms: dict[str, float] = {}
        by_term: dict[str, list[Tensor]] = {}
        cosine = None
        if separate:
            for name in terms:
                sums = _added([s[1][name] for s in shares])
                by_term[name] = [_dense(g, p) for g, p in zip(sums, self.weights, strict=True)]
            flat = {n: torch.cat([g.flatten() for g in gs]) for n, gs in by_term.items()}
            norms = {n: float(g.norm()) for n, g in flat.items()}
            if len(flat) == 2:
                a, b = flat.values()
                cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        if isinstance(balance, UPGrad):
            gradient: list[Tensor | None] = [*balance.combined([*by_term.values()])]
        else:
            gradient = _added([s[0] for s in shares])
        return Found(gradient=gradient, terms=terms, norms=norms, cosine=cosine)

    def _share(self, done: float, count: Tensor, separate: bool, batch: Batch) -> Any:
        """(gradients, each term's gradients, terms) of one share of a step."""
        objective, balance = self.training.objective, self.balance
        target = self.training.teacher.signal(batch, objective.needs)
        output = Signal(logits=self.model(**batch.inputs).logits)
        terms = objective.terms(output, target, batch, done=done)
        parts = total(terms, count)
        by_term = {}
        if separate:
            for name, part in parts.items():
                by_term[name] = torch.autograd.grad(
                    part, self.weights, retain_graph=True, allow_unused=True
                )
        gradients: Sequence[Tensor | None] = ()
        if not balance.separate:
            loss = balance.total(parts, int(batch.mask.sum()) / int(count))
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return gradients, by_term, terms


def _added(shares: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Sums in the order of the shares, so that the same step gives the same bytes."""
    sums: list[Tensor | None] = []
    for parts in zip(*shares, strict=True):
        if parts[0] is None:
            sums.append(None)
        else:
            # never in place, and a copy where there is one share: autograd may hand out one tensor
            # as the gradient of two parameters
            sums.append(reduce(torch.add, parts) if len(parts) > 1 else parts[0].clone())
    return sums


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def start_balance(step_of: Step, folder: Path) -> Balance:
    """What the training's balance starts from; what was calibrated stays in `balance.json`."""
    training = step_of.training
    names = training.objective.names
    if training.balance == "fixed" or len(names) < 2:
        return Balance()
    if training.balance == "uncertainty":
        return Uncertainty(names)
    if training.balance == "upgrad":
        return UPGrad()
    path = folder / "balance.json"
    kept = read_index(path, {"norms"})
    if kept is None:
        looks = [
            step_of(step, look=True).norms
            for step in range(min(_CALIBRATION_STEPS, training.steps))
        ]
        kept = {"norms": {n: sum(look[n] for look in looks) / len(looks) for n in names}}
        write_json(path, kept)
    objective = training.objective
    wanted = {"soft": objective.soft_weight, "hard": objective.hard_weight}
    return calibrated(kept["norms"], wanted)
