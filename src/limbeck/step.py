"""One optimizer step of a training: signals, terms and their gradients, a share on each core."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from limbeck._startup import prepare_torch
from limbeck.attention import register_attention
from limbeck.balance import Balance, Uncertainty, UPGrad, calibrated
from limbeck.cores import shares
from limbeck.device import on_device
from limbeck.errors import RecipeError
from limbeck.heads import Tap, tap_head
from limbeck.losses.sparse import CHUNK_BYTES
from limbeck.matrices import Matrices, matrices_of
from limbeck.objective import Objective, total
from limbeck.observe import Observer
from limbeck.on_policy import TERM, OnPolicy, Writer
from limbeck.ranks import ranks
from limbeck.recipe_teaching import QuantizationAwareSpec, TrainingSpec
from limbeck.run import read_index, write_json
from limbeck.statistics import GHOST, norms_of
from limbeck.tasks.task import Rows, order
from limbeck.teachers.live import LiveTeacher
from limbeck.types import Batch, Need, Teacher

_CALIBRATION_STEPS = 4
_LOOKS, _STEPS_A_LOOK = (4, 20), 25  # at gradients: each costs a step and more
_LONG = 4  # rows of which no more are worked on together are long: one is enough for a core
_PROBE = 64  # examples that projectors start from
_WHOLE = {  # divergences that no head can be fused with
    "dist": "`dist` compares a batch's examples: it needs all their logits at once",
    "uld": "`uld` sorts the vocabulary: it needs all logits of a position at once",
}

prepare_torch()
register_attention()


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
    looks: int | None = None  # at the terms' gradients, held against each other; None: a few
    quantization: QuantizationAwareSpec | None = None  # some steps are on rounded weights
    on_policy: OnPolicy | None = None  # some steps are on the model's own texts

    @property
    def steps(self) -> int:
        return max(1, round(self.spec.epochs * len(self.rows) / self.spec.batch_size))

    @property
    def look_every(self) -> int:
        """Steps from one look at the terms' gradients to the next; 0: none."""
        looks = self.looks
        if looks is None:
            few, many = _LOOKS
            looks = min(many, max(few, self.steps // _STEPS_A_LOOK))
        several = len(self.objective.weights) > 1
        return max(1, self.steps // looks) if several and looks else 0

    @cached_property
    def own_steps(self) -> np.ndarray:
        """(steps,) bool: those that are on-policy."""
        if self.on_policy is None:
            return np.zeros(self.steps, bool)
        return self.on_policy.steps(self.steps, seed=self.seed)

    def positions(self, step: int) -> list[int]:
        """Rows of this optimizer step: epoch after epoch, each in its own order and with the next
        view of the rows. On-policy steps take none."""
        n, size = len(self.rows), self.spec.batch_size
        found: list[int] = []
        at = (step - int(self.own_steps[:step].sum())) * size
        while len(found) < size:
            epoch, offset = divmod(at + len(found), n)
            take = min(size - len(found), n - offset)
            of_view = n * (epoch % self.rows.num_views)
            rows = order(n, seed=self.seed, epoch=epoch)[offset : offset + take]
            found += (rows + of_view).tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one optimizer step, all shares and ranks together."""

    gradient: list[Tensor | None]  # of each parameter of `Step.parameters`
    terms: dict[str, Tensor]  # means over the step, () each: read where they are wanted only
    norms: dict[str, float]  # of each term's gradient, where that was looked at
    cosines: dict[tuple[str, str], float]  # between two terms' gradients, as above


class Step:
    """Forward and backward of a whole optimizer step, a share of it on each core."""

    def __init__(self, model: nn.Module, training: Training, weights: list[Tensor]) -> None:
        self.model, self.training, self.weights = model, training, weights
        self.balance = Balance()
        self.normalises = bool(norms_of(model))
        self.ranks = ranks()
        self.device = weights[0].device
        self.observe = Observer(
            model, training.objective.student_layers, precision=training.spec.precision
        )
        self.matrices = Matrices([])
        self.writer: Writer | None = None
        if training.on_policy is not None:
            self.writer = Writer(
                training.on_policy, model, batch_size=training.spec.batch_size, seed=training.seed
            )

    @property
    def parameters(self) -> list[Tensor]:
        """The model's, the projectors', the balance's."""
        own = [p for feature in self.training.objective.features for p in feature.parameters()]
        return [*self.weights, *own, *self.balance.parameters()]

    def batches(self, step: int) -> list[Batch]:
        """This rank's part of the step's rows, cut into what is worked on side by side."""
        return self._cut(self.training.positions(step), self.training.rows.batch)

    def own_batches(self, step: int) -> list[Batch]:
        """The same of the model's own texts."""
        assert self.writer is not None
        return self._cut(
            self.writer.next(int(self.training.own_steps[step:].sum())), self.writer.batch
        )

    def _cut(self, at: list[int], batch: Callable[[list[int]], Batch]) -> list[Batch]:
        mine = self.ranks.share(len(at))
        at = at[mine.start : mine.stop]
        most, on_cores = self.training.spec.micro_batch, self.device.type == "cpu"
        if self.normalises:  # what is normalised together must not hang on the number of cores
            most, on_cores = most or GHOST, False
        few = self.training.rows.num_together
        least = 1 if few <= _LONG else few
        parts = shares(len(at), most, on_cores=on_cores, least=least)
        return [batch(at[part.start : part.stop]) for part in parts]

    def __call__(self, step: int, *, look: bool) -> Found:
        """With `look` the terms' gradients are held against each other too: a backward for each."""
        training, balance = self.training, self.balance
        lesson = (training.on_policy if training.own_steps[step] else None) or training
        from_own = lesson is not training
        batches = self.own_batches(step) if from_own else self.batches(step)
        counts = lesson.objective.counts(batches)
        self.ranks.add([*counts.values()])
        separate = (look and not from_own) or balance.separate
        gradient = _Sum(self.parameters)
        by_term = {name: _Sum(self.parameters) for name in lesson.objective.weights}
        terms: dict[str, Tensor] = {}
        with self.matrices.in_place() as copies:
            leaves = [copies.get(id(p), p) for p in self.parameters]
            share = partial(self._share, lesson, step / training.steps, counts, separate, leaves)
            for part in on_device(share, batches):
                gradient.add(part.gradient, adopt=True)
                for name, gradients in part.by_term.items():
                    by_term[name].add(gradients)
                for name, value in part.values.items():
                    terms[name] = terms.get(name, 0) + value
        self.ranks.add([*terms.values()])
        norms: dict[str, float] = {}
        cosines: dict[tuple[str, str], float] = {}
        if separate:
            whole = {}
            for name, own in by_term.items():
                if self.ranks.world > 1:
                    self.ranks.add(own.present())
                whole[name] = own.dense()[: len(self.weights)]
            norms = {name: math.sqrt(_dot(g, g)) for name, g in whole.items()}
            for a, b in itertools.combinations(whole, 2):
                both = norms[a] * norms[b]
                cosines[a, b] = _dot(whole[a], whole[b]) / both if both else 0.0
        if isinstance(balance, UPGrad):
            for own in by_term.values():  # each projector has one term, so a sum is that
                gradient.add(own.found)
            each = [own.dense()[: len(self.weights)] for own in by_term.values()]
            gradient.found[: len(self.weights)] = balance.combined(each)
        elif self.ranks.world > 1:
            self.ranks.add(gradient.present())
        if from_own:
            terms = {TERM: terms["soft"]}
        return Found(gradient=gradient.found, terms=terms, norms=norms, cosines=cosines)

    def _share(
        self, lesson: Training | OnPolicy, done: float, counts: Mapping[str, Tensor],
        separate: bool, leaves: Sequence[Tensor], batch: Batch,
    ) -> _Part:  # fmt: skip
        """What one share of a step adds; gradients are of `leaves`."""
        objective, balance = lesson.objective, self.balance
        counted, batch = int(batch.mask.sum()), batch.to(self.device)
        target = lesson.teacher.signal(batch, objective.needs)
        output = self.observe(batch, objective.needs | {Need.LOGITS})
        apart = separate or type(balance) is not Balance or bool(balance.factors)
        terms = objective.terms(output, target, batch, done=done, apart=apart)
        parts = total(terms, counts)
        by_term = {}
        if separate:
            for name, part in parts.items():
                by_term[name] = torch.autograd.grad(
                    part, leaves, retain_graph=True, allow_unused=True
                )
        gradient: Sequence[Tensor | None] = ()
        if not balance.separate:
            share = counted / int(counts["hard" if "hard" in counts else "soft"])
            loss = balance.total(parts, share)
            gradient = torch.autograd.grad(loss, leaves, allow_unused=True)
        values = {name: part.detach() for name, part in parts.items()}
        return _Part(gradient=gradient, by_term=by_term, values=values)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Of all of them as one vector each, which would be as large as the model."""
    parts = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]
    return float(torch.stack(parts).double().sum())


@dataclass(frozen=True, kw_only=True)
class _Part:
    gradient: Sequence[Tensor | None]
    by_term: Mapping[str, Sequence[Tensor | None]]
    values: Mapping[str, Tensor]  # of the terms


class _Sum:
    """Gradients added in the order of the shares, so that the same step gives the same bytes."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.found: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None], *, adopt: bool = False) -> None:
        """`adopt`: nobody else needs these gradients, so the first ones are kept as they are."""
        taken: set[int] = set()
        for at, gradient in enumerate(gradients):
            mine = self.found[at]
            if gradient is None:
                continue
            if mine is not None:
                mine.add_(gradient)
                continue
            if gradient.dtype != self.parameters[at].dtype:  # a copy's (`matrices`)
                self.found[at] = gradient.to(self.parameters[at].dtype)
                continue
            # autograd may hand out one tensor for two parameters, or one number for a whole tensor
            own = adopt and not gradient.is_sparse and gradient.is_contiguous()
            storage = gradient.untyped_storage().data_ptr() if own else 0
            self.found[at] = gradient if own and storage not in taken else gradient.clone()
            taken.add(storage)

    def dense(self) -> list[Tensor]:
        pairs = zip(self.found, self.parameters, strict=True)
        return [
            torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for g, p in pairs
        ]

    def present(self) -> list[Tensor]:
        """Those that there are: of the same parameters on all ranks, as their models are.

        What comes by rows is made whole: each rank has other rows.
        """
        self.found = [g.to_dense() if g is not None and g.is_sparse else g for g in self.found]
        return [g for g in self.found if g is not None]


def start_features(step_of: Step) -> None:
    """Projectors from the first rows of the training; as many as fix them, whatever the ranks."""
    training = step_of.training
    if not training.objective.features:
        return
    rows = order(len(training.rows), seed=training.seed, epoch=0)[:_PROBE].tolist()
    batch = training.rows.batch(rows).to(step_of.device)
    with torch.no_grad():
        needs = training.objective.needs
        student, teacher = step_of.observe(batch, needs), training.teacher.signal(batch, needs)
    for feature in training.objective.features:
        feature.start(student, teacher, batch)


def start_head(step_of: Step) -> str | None:
    """Leaves the model's last matrix to the loss where its product would be large, or as asked.

    Returns a sentence where that was done.
    Raises RecipeError where it was asked for and cannot be.
    """
    asked, objective = step_of.training.spec.backend, step_of.training.objective
    if asked == "dense":
        return None
    if objective.divergence in _WHOLE and objective.soft_weight:
        found: Tap | str = _WHOLE[objective.divergence]
    else:
        found = tap_head(step_of.model, step_of.training.rows.batch([0]).to(step_of.device))
    if isinstance(found, str):
        if asked == "fused":
            raise RecipeError(
                "recipe.distill.training.backend", f"'fused' cannot be: {found}",
                allowed="auto or dense", fix="leave it out",
            )  # fmt: skip
        return None
    positions, classes = int(step_of.batches(0)[0].mask.sum()), len(found.layer.weight)  # type: ignore[arg-type]
    size = 4 * positions * classes
    chunk = CHUNK_BYTES[step_of.device.type]
    if asked == "auto" and size <= 2 * chunk:
        found.remove()
        return None
    step_of.observe.tap = found
    training = step_of.training
    own = training.on_policy.teacher if training.on_policy is not None else None
    for teacher in (training.teacher, own):
        if isinstance(teacher, LiveTeacher):
            teacher.leave_head(training.rows.batch([0]).to(step_of.device))
    return (
        f"fused loss: {positions:,} positions x {classes:,} classes in chunks of "
        f"{chunk >> 20} MiB, where logits would take {size >> 20:,} MiB"
    )


def start_matrices(step_of: Step) -> None:
    """With bf16 each step rounds the model's matrices once, for all threads."""
    training = step_of.training
    if training.spec.precision == "bf16":
        batch = training.rows.batch([0]).to(step_of.device)
        step_of.matrices = Matrices(
            matrices_of(step_of.model, partial(step_of.observe, batch, frozenset({Need.LOGITS})))
        )


def start_balance(step_of: Step, folder: Path) -> Balance:
    """What the training's balance starts from; what was calibrated stays in `balance.json`."""
    training = step_of.training
    names = [*training.objective.weights]
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
        if step_of.ranks.first:
            write_json(path, kept)
    return calibrated(kept["norms"], training.objective.weights)
