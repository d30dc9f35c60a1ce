"""An elastic run: its sizes taught together, kept on disk, and more students cut between them.

Stages of the pipeline like `teaching`'s. What may be cut without training (research: hidden widths
do not interpolate, feed-forward widths and layers do): a trained size's own hidden width and heads,
with `ffn` and `layers` anywhere from that size's down to those of the next smaller one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from limbeck._startup import prepare_torch
from limbeck.architecture.plan import plan_student
from limbeck.architecture.space import Candidate, shape_of
from limbeck.device import compute_device
from limbeck.elastic import Sampling
from limbeck.errors import RecipeError, RunFolderError
from limbeck.family import Family
from limbeck.findings import LARGEST
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe, StudentSpec, TrainingSpec
from limbeck.recipe_file import load_recipe
from limbeck.run import read_json, replaced, write_json
from limbeck.stages import Planner, places_of
from limbeck.statistics import measure_statistics
from limbeck.step import Training
from limbeck.tasks.estimators import black_box, is_estimator
from limbeck.tasks.task import Task, open_task, some
from limbeck.teaching import lesson, loss_and_accuracy, sorted_base, validator
from limbeck.train import train
from limbeck.types import Places, Shape, StudentPlan

FRONTIER = "frontier.json"
_WEIGHTS = "family.safetensors"
_TRIAL = 0.1  # of the training, for the choice between rivals
_MOST = 40  # shapes whose quality is looked at for the frontier
_FRONTIER_ROWS = 512  # validation rows

prepare_torch()


def teach(
    folder: Path, recipe: Recipe, shapes: Mapping[str, Shape], places: Places, progress: Progress
) -> None:
    """All trained students in one run; the largest has to come first in `shapes`.

    It learns alone before the others learn together, in the weights that it leaves. They would
    spoil it: it keeps its own, and theirs go on from the shared ones (docs/results.md).
    """
    task = open_task(recipe, places.data)
    family = _family(task, shapes, places)
    largest, *others = shapes
    first = folder / LARGEST
    alone = family.alone(largest)
    if (first / _WEIGHTS).exists():  # a run that was killed behind it
        alone.load_state(load_file(first / _WEIGHTS))
    else:
        first.mkdir(parents=True, exist_ok=True)
        spec = recipe.training_of(recipe.student(largest))
        train(alone, _training(recipe, task, spec, places, largest), first, progress)
        _save(alone, first / _WEIGHTS)
    for name, weight in alone.weights.items():
        family.weights[name].copy_(weight)
    if others:
        _teach_together(folder, recipe, family, {n: n for n in others}, places, progress)
    _save(family, folder / _WEIGHTS)
    write_json(folder / "family.json", {name: asdict(shape) for name, shape in shapes.items()})


def _teach_together(
    folder: Path, recipe: Recipe, family: Family, students: Mapping[str, str],
    places: Places, progress: Progress, *, share: float = 1.0, title: str = "family",
) -> None:  # fmt: skip
    """`share` of the training of the sizes that `students` names, each with the settings of that
    student of the recipe; other sizes of the family only lend their weights."""
    task = open_task(recipe, places.data)
    specs = {size: recipe.training_of(recipe.student(s)) for size, s in students.items()}
    base = recipe.distill.training
    epochs = share * sum(spec.epochs for spec in specs.values())
    spec = base.model_copy(update={"epochs": epochs})
    shares = {name: specs[name].epochs if name in specs else 0.0 for name in family.sizes}
    sampling = Sampling(shares=shares).for_family(family)
    own = {
        size: specs[size].learning_rate / base.learning_rate
        for size, student in students.items() if recipe.student(student).learning_rate
    }  # fmt: skip
    sampling = replace(sampling, rates={**(sampling.rates or {}), **own})
    train(family, _training(recipe, task, spec, places, title), folder, progress, sampling)


def _training(
    recipe: Recipe, task: Task, spec: TrainingSpec, places: Places, title: str
) -> Training:
    return Training(
        rows=task.rows("train"), spec=spec, seed=recipe.seed, title=title,
        validate=validator(task, recipe.seed), **lesson(recipe, None, places),
    )  # fmt: skip


def _save(family: Family, path: Path) -> None:
    with replaced(path) as aside:
        save_file({name: t.detach().contiguous() for name, t in family.state().items()}, aside)


def plan_rivals(folder: Path, student: StudentSpec, planner: Planner, count: int) -> None:
    """`rivals.json`: the best shape for the budget by the rule, then the best of another depth, and
    so on. Raises RecipeError where none keeps the budget."""
    found: list[StudentPlan] = []
    space = planner.space
    while space and len(found) < count:
        try:
            plan = planner.plan(student, space)
        except RecipeError:
            if found:
                break
            raise
        found.append(plan)
        space = [c for c in space if c.num_layers != _depth(plan.shape)]
    write_json(folder / "rivals.json", [asdict(plan) for plan in found])


def try_rivals(
    folder: Path, recipe: Recipe, rivals: Mapping[str, Path], places: Places, progress: Progress
) -> None:
    """`trial.json`: each rival's loss and accuracy on the validation rows after a short training of
    all of them together."""
    shapes, students, params = {}, {}, {}
    for student, path in rivals.items():
        for at, plan in enumerate(read_json(path / "rivals.json")):
            name = f"{student}.{at}"
            shapes[name], students[name] = Shape.of(plan["shape"]), student
            params[name] = plan["cost"]["params"]
    ordered = {name: shapes[name] for name in sorted(shapes, key=lambda name: -params[name])}
    task = open_task(recipe, places.data)
    family = _family(task, ordered, places)
    _teach_together(
        folder, recipe, family, students, places, progress, share=_TRIAL, title="rivals"
    )
    rows = task.rows("validation")
    found = {name: loss_and_accuracy(rows, family.extract(name)) for name in ordered}
    trial = {name: {"loss": loss, "accuracy": right} for name, (loss, right) in found.items()}
    write_json(folder / "trial.json", {"n": len(rows), "share": _TRIAL, "rivals": trial})


def decide(folder: Path, student: StudentSpec, rivals: Path, trial: Path) -> None:
    """`plan.json`: the rival with the least loss."""
    tried = read_json(trial / "trial.json")
    plans = read_json(rivals / "rivals.json")
    losses = [tried["rivals"][f"{student.name}.{at}"]["loss"] for at in range(len(plans))]
    best = min(range(len(plans)), key=losses.__getitem__)
    if len(plans) > 1:
        others = ", ".join(
            f"{loss:.3f} with {len(plan['shape']['layers'])} layers"
            for plan, loss in zip(plans, losses, strict=True)
        )
        plans[best]["reason"] += (
            f" Of {len(plans)} rivals it had the least loss on {tried['n']:,} validation rows "
            f"after {tried['share']:.0%} of the training: {others}."
        )
    write_json(folder / "plan.json", plans[best])


def load(task: Task, folder: Path, places: Places) -> Family:
    """What `teach` left in its folder."""
    shapes = read_shapes(folder)
    family = _family(task, shapes, places)
    largest = next(iter(shapes))
    alone = family.alone(largest)
    alone.load_state(load_file(folder / LARGEST / _WEIGHTS))
    family.load_state(load_file(folder / _WEIGHTS))
    family.apart[largest] = alone
    return family


def read_shapes(folder: Path) -> dict[str, Shape]:
    """The trained sizes, the largest first."""
    found = read_json(folder / "family.json")
    return {name: Shape.of(shape) for name, shape in found.items()}


def _family(task: Task, shapes: Mapping[str, Shape], places: Places) -> Family:
    config, axes, state = sorted_base(task, places)
    return Family(config, task.build, axes, shapes, state)


def extract(
    folder: Path, recipe: Recipe, shape: Shape, family: Path, places: Places
) -> None:
    """A student of an elastic run, trained or not, as a plain folder."""
    task = open_task(recipe, places.data)
    model = cut_or_extract(load(task, family, places), shape, settler(task, recipe.seed))
    task.save(cast(PreTrainedModel, model), places.base, folder)


def look(
    folder: Path, recipe: Recipe, family: Path, places: Places, progress: Progress
) -> None:
    """`frontier.json`: the trained sizes and shapes between them, each with its parameters, and its
    accuracy and loss on validation rows."""
    task = open_task(recipe, places.data)
    whole = load(task, family, places)
    planner = Planner(recipe, places, progress)
    rows = some(task.rows("validation"), _FRONTIER_ROWS, seed=recipe.seed)
    settle = settler(task, recipe.seed)
    found = []
    tried = _between(planner, [*read_shapes(family).values()])
    with progress.bar("frontier", len(tried), "shapes") as bar:
        for candidate in tried:
            shape = shape_of(candidate, planner.axes, planner.layers_of)
            model = cut_or_extract(whole, shape, settle).to(compute_device())
            loss, accuracy = loss_and_accuracy(rows, model)
            found.append(
                {
                    "name": whole.size_of(shape), "shape": asdict(shape),
                    "params": candidate.params, "size_bytes": candidate.size_bytes,
                    "accuracy": accuracy, "loss": loss, "n": len(rows),
                }
            )  # fmt: skip
            bar.advance(1)
    if is_estimator(places.teacher):
        loss, accuracy = loss_and_accuracy(rows, black_box(places.teacher))
    else:
        teacher = task.load(places.teacher, where="teacher").eval().to(compute_device())
        loss, accuracy = loss_and_accuracy(rows, teacher)
    theirs = {"accuracy": accuracy, "loss": loss, "n": len(rows)}
    write_json(folder / FRONTIER, {"teacher": theirs, "shapes": found})


def plan_cut(folder: Path, student: StudentSpec, planner: Planner, frontier: Path) -> None:
    """`plan.json` of a student that is cut between trained sizes: of those within its budget the
    one with the least loss on the validation rows, or the smallest that keeps what it shall.

    Raises RecipeError where none is within.
    """
    plan, entry, considered = _choose(student, planner, frontier)
    which = "the one within its budget with the least loss"
    if student.budget.retention:
        which = f"the smallest that keeps {student.budget.retention:.1%} of the teacher's accuracy"
    reason = (
        f"Not trained: of {considered} shapes at and between the trained sizes {which} on "
        f"{entry['n']:,} validation rows."
    )
    write_json(folder / "plan.json", asdict(plan) | {"reason": reason, "timed": planner.timed()})


def _choose(
    student: StudentSpec, planner: Planner, frontier: Path
) -> tuple[StudentPlan, dict[str, Any], int]:
    """The plan, what the frontier says of its shape, and how many shapes there were."""
    looked = read_json(frontier / FRONTIER)
    seen = {_key(Shape.of(e["shape"])): e for e in looked["shapes"]}
    space = [c for c in planner.space if _candidate_key(c) in seen]
    where, considered = f"recipe.students.{student.name}.budget", len(space)

    if (share := student.budget.retention) is not None:
        theirs = looked["teacher"]["accuracy"]
        kept = {c.key: seen[_candidate_key(c)]["accuracy"] / theirs for c in space}
        most = max(kept.values())
        space = [c for c in space if kept[c.key] >= share]
        if not space:
            raise RecipeError(
                f"{where}.retention", f"no shape keeps {share:.1%}",
                allowed=f"up to {most:.1%}, on the validation rows", fix="ask for less",
            )  # fmt: skip

    def rank(candidate: Candidate) -> float:
        if share is not None:
            return -float(candidate.params)
        return -float(seen[_candidate_key(candidate)]["loss"])

    plan = plan_student(
        student, where, space, planner.axes, planner.layers_of, planner.costs, rank=rank,
        watts=planner.recipe.measure.watts,
    )  # fmt: skip
    return plan, seen[_key(plan.shape)], considered


Settle = Callable[[nn.Module], None]


def settler(task: Task, seed: int) -> Settle:
    """Measures a model's running statistics, where it has any, as `train` does."""
    return partial(measure_statistics, rows=task.rows("train"), seed=seed)


def cut_or_extract(family: Family, shape: Shape, settle: Settle) -> nn.Module:
    """A trained size as it is, any other cut."""
    name = family.size_of(shape)
    return family.extract(name) if name else family.cut(shape, settle=settle)


class LoadedFamily:
    """The weights of a finished elastic run, in memory."""

    def __init__(self, run: Path) -> None:
        """Raises RunFolderError where the folder holds no elastic run."""
        if not (run / "family" / LARGEST / _WEIGHTS).is_file():
            raise RunFolderError(
                str(run), "holds no elastic run",
                allowed="a folder that `limbeck distill` filled, with distill.run: elastic",
                fix="name one",
            )  # fmt: skip
        recipe, _ = load_recipe(run)
        places = places_of(run)
        self.family = load(open_task(recipe, places.data), run / "family", places)
        self._planner = Planner(recipe, places, Silent())
        self._frontier = run / "frontier"
        self._settle = settler(self._planner.task, recipe.seed)

    @property
    def sizes(self) -> dict[str, Shape]:
        """The trained ones, the largest first."""
        return {name: size.shape for name, size in self.family.sizes.items()}

    def cut(
        self, *, params: int | str | None = None, **budget: float
    ) -> nn.Module:
        """The best model within the budget, in eval mode, with weights of its own.

        `params` may be '3M' or '450k'; the other limits are those of a recipe's budget. Raises
        RecipeError where no shape keeps them, pydantic's ValidationError for what is no limit.
        """
        budget |= {"params": _count(params)} if params is not None else {}
        student = StudentSpec.model_validate({"name": "cut", "budget": budget, "trained": False})
        shape = _choose(student, self._planner, self._frontier)[0].shape
        return cut_or_extract(self.family, shape, self._settle)


def _count(value: int | str) -> int:
    """'3M' is 3,000,000. Raises ValueError for what is no number."""
    if not isinstance(value, str):
        return value
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
    unit = units.get(value[-1:].lower())
    return round(float(value[:-1]) * unit) if unit else round(float(value))


def _between(planner: Planner, shapes: Sequence[Shape]) -> list[Candidate]:
    """Shapes at and between the trained ones, of which the largest comes first; the trained ones
    always, of the others at most as many as can be looked at in a moment, at equal steps."""
    trained = {_key(shape) for shape in shapes}
    between: dict[str, Candidate] = {}
    for larger, smaller in itertools.pairwise([*shapes, shapes[-1]]):
        widths = sorted((smaller.sizes.get("ffn", 0), larger.sizes.get("ffn", 0)))
        depths = sorted((_depth(smaller), _depth(larger)))
        fixed = {name: size for name, size in larger.sizes.items() if name != "ffn"}
        for candidate in planner.space:
            sizes = dict(candidate.sizes)
            ffn = sizes.pop("ffn", 0)
            if (
                sizes == {name: fixed[name] for name in sizes}
                and widths[0] <= ffn <= widths[1]
                and depths[0] <= candidate.num_layers <= depths[1]
            ):
                between[str(candidate.key)] = candidate
    keys = {at: (_candidate_key(c) in trained) for at, c in between.items()}
    own = [c for at, c in between.items() if keys[at]]
    others = sorted((c for at, c in between.items() if not keys[at]), key=lambda c: c.params)
    room = max(1, _MOST - len(own))
    step = -(-len(others) // room)
    return sorted([*own, *others[:: max(1, step)]], key=lambda c: -c.params)


def _depth(shape: Shape) -> int:
    return len(shape.layers) + sum(len(kept) for kept in shape.stacks.values())


def _key(shape: Shape) -> tuple[Any, ...]:
    depths = sorted((name, len(kept)) for name, kept in shape.stacks.items())
    return tuple(sorted(shape.sizes.items())), len(shape.layers), tuple(depths)


def _candidate_key(candidate: Candidate) -> tuple[Any, ...]:
    depths = tuple(sorted(candidate.stacks.items()))
    return tuple(sorted(candidate.sizes.items())), 0 if depths else candidate.num_layers, depths
