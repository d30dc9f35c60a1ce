"""An elastic run: its sizes taught together, kept on disk, and more students cut between them.

Stages of the pipeline like `teaching`'s. What may be cut without training (research: hidden widths
do not interpolate, feed-forward widths and layers do): a trained size's own hidden width and heads,
with `ffn` and `layers` anywhere from that size's down to those of the next smaller one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from limbeck._startup import prepare_torch
from limbeck.architecture.plan import Candidate, plan_student
from limbeck.elastic import Sampling
from limbeck.errors import RecipeError, RunFolderError
from limbeck.family import Family
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe, StudentSpec
from limbeck.recipe_file import load_recipe
from limbeck.run import read_json, replaced, write_json
from limbeck.stages import Planner, places_of
from limbeck.step import Training
from limbeck.tasks.task import Task, open_task
from limbeck.teaching import lesson, loss_and_accuracy, sorted_base, validator
from limbeck.train import train
from limbeck.types import Places, Shape, StudentPlan

FRONTIER = "frontier.json"
_MOST = 40  # shapes whose quality is looked at for the frontier
_FRONTIER_ROWS = 512  # validation rows

prepare_torch()


def teach(
    folder: Path, recipe: Recipe, shapes: Mapping[str, Shape], places: Places, progress: Progress
) -> None:
    """All trained students in one run; the largest has to come first in `shapes`."""
    task = open_task(recipe, places.data)
    family = _family(task, shapes, places)
    specs = {name: recipe.training_of(recipe.student(name)) for name in shapes}
    base = recipe.distill.training
    training = Training(
        rows=task.rows("train"),
        spec=base.model_copy(update={"epochs": sum(spec.epochs for spec in specs.values())}),
        seed=recipe.seed,
        title="family",
        validate=validator(task, recipe.seed),
        **lesson(recipe, None, places),
    )
    sampling = Sampling(
        shares={name: spec.epochs for name, spec in specs.items()},
    ).for_family(family)
    own = {s.name: s.learning_rate / base.learning_rate for s in recipe.students if s.learning_rate}
    sampling = replace(sampling, rates={**(sampling.rates or {}), **own})
    train(family, training, folder, progress, sampling)
    with replaced(folder / "family.safetensors") as aside:
        save_file({name: t.detach().contiguous() for name, t in family.state().items()}, aside)
    write_json(folder / "family.json", {name: asdict(shape) for name, shape in shapes.items()})


def load(task: Task, folder: Path, places: Places) -> Family:
    """What `teach` left in its folder."""
    family = _family(task, read_shapes(folder), places)
    family.load_state(load_file(folder / "family.safetensors"))
    return family


def read_shapes(folder: Path) -> dict[str, Shape]:
    """The trained sizes, the largest first."""
    found = read_json(folder / "family.json")
    return {name: _shape(shape) for name, shape in found.items()}


def _family(task: Task, shapes: Mapping[str, Shape], places: Places) -> Family:
    config, axes, state = sorted_base(task, places)
    return Family(config, task.build, axes, shapes, state)


def extract(
    folder: Path, recipe: Recipe, shape: Shape, family: Path, places: Places
) -> None:
    """A student of an elastic run, trained or not, as a plain folder."""
    task = open_task(recipe, places.data)
    model = cut_or_extract(load(task, family, places), shape)
    task.save(cast(PreTrainedModel, model), places.base, folder)


def look(
    folder: Path, recipe: Recipe, family: Path, places: Places, progress: Progress
) -> None:
    """`frontier.json`: the trained sizes and shapes between them, each with its parameters, and its
    accuracy and loss on validation rows."""
    task = open_task(recipe, places.data)
    whole = load(task, family, places)
    planner = Planner(recipe, places, progress)
    rows = task.rows("validation").sample(_FRONTIER_ROWS, seed=recipe.seed)
    found = []
    tried = _between(planner, [*read_shapes(family).values()])
    with progress.bar("frontier", len(tried), "shapes") as bar:
        for candidate in tried:
            shape = Shape(dict(candidate.sizes), planner.layers_of(candidate.num_layers))
            loss, accuracy = loss_and_accuracy(rows, cut_or_extract(whole, shape))
            found.append(
                {
                    "name": whole.size_of(shape), "shape": asdict(shape),
                    "params": candidate.params, "size_bytes": candidate.size_bytes,
                    "accuracy": accuracy, "loss": loss, "n": len(rows),
                }
            )  # fmt: skip
            bar.advance(1)
    teacher = task.load(places.teacher, where="teacher").eval()
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
    seen = {_key(_shape(e["shape"])): e for e in looked["shapes"]}
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


def cut_or_extract(family: Family, shape: Shape) -> nn.Module:
    """A trained size as it is, any other cut."""
    name = family.size_of(shape)
    return family.extract(name) if name else family.cut(shape)


class LoadedFamily:
    """The weights of a finished elastic run, in memory."""

    def __init__(self, run: Path) -> None:
        """Raises RunFolderError where the folder holds no elastic run."""
        if not (run / "family/family.json").is_file():
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
        return cut_or_extract(self.family, shape)


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
        depths = sorted((len(smaller.layers), len(larger.layers)))
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


def _shape(data: Mapping[str, Any]) -> Shape:
    return Shape(data["sizes"], tuple(data["layers"]))


def _key(shape: Shape) -> tuple[Any, ...]:
    return tuple(sorted(shape.sizes.items())), len(shape.layers)


def _candidate_key(candidate: Candidate) -> tuple[Any, ...]:
    return tuple(sorted(candidate.sizes.items())), candidate.num_layers
