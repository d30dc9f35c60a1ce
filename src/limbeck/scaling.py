"""An elastic run: its sizes taught together, kept on disk, and more students cut between them.

Stages of the pipeline like `teaching`'s. What may be cut without training (research: hidden widths
do not interpolate, feed-forward widths and layers do): a trained size's own hidden width and heads,
with `ffn` and `layers` anywhere from that size's down to those of the next smaller one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from limbeck._startup import prepare_torch
from limbeck.architecture.axes import axes_from_json
from limbeck.architecture.cut import sort_units
from limbeck.architecture.importance import load_importance
from limbeck.architecture.plan import Candidate, plan_student
from limbeck.elastic import Sampling
from limbeck.errors import RunFolderError
from limbeck.family import Family
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe, StudentSpec
from limbeck.recipe_file import load_recipe
from limbeck.run import read_json, replaced, write_json
from limbeck.stages import Planner
from limbeck.step import Training
from limbeck.tasks.task import Task, open_task
from limbeck.teaching import lesson, loss_and_accuracy, validator
from limbeck.train import train
from limbeck.types import Shape, StudentPlan

FRONTIER = "frontier.json"
_MOST = 40  # shapes whose quality is looked at for the frontier
_FRONTIER_ROWS = 512  # validation rows

prepare_torch()


def teach(
    folder: Path, recipe: Recipe, shapes: Mapping[str, Shape], teacher: Path, survey: Path,
    signals: Path, data: Path, progress: Progress,
) -> None:  # fmt: skip
    """All trained students in one run; the largest has to come first in `shapes`."""
    task = open_task(recipe, data)
    family = _family(task, shapes, teacher, survey)
    specs = {name: recipe.training_of(recipe.student(name)) for name in shapes}
    base = recipe.distill.training
    training = Training(
        rows=task.rows("train"),
        spec=base.model_copy(update={"epochs": sum(spec.epochs for spec in specs.values())}),
        seed=recipe.seed,
        title="family",
        validate=validator(task, recipe.seed),
        **lesson(recipe, None, teacher, signals, data, None, None),
    )
    sampling = Sampling(
        shares={name: spec.epochs for name, spec in specs.items()},
        rates={name: spec.learning_rate / base.learning_rate for name, spec in specs.items()},
    )
    train(family, training, folder, progress, sampling)
    with replaced(folder / "family.safetensors") as aside:
        save_file({name: t.detach().contiguous() for name, t in family.state().items()}, aside)
    write_json(folder / "family.json", {name: asdict(shape) for name, shape in shapes.items()})


def load(task: Task, folder: Path, teacher: Path, survey: Path) -> Family:
    """What `teach` left in its folder."""
    family = _family(task, read_shapes(folder), teacher, survey)
    family.load_state(load_file(folder / "family.safetensors"))
    return family


def read_shapes(folder: Path) -> dict[str, Shape]:
    """The trained sizes, the largest first."""
    found = read_json(folder / "family.json")
    return {name: _shape(shape) for name, shape in found.items()}


def _family(task: Task, shapes: Mapping[str, Shape], teacher: Path, survey: Path) -> Family:
    model = task.load(teacher, where="teacher")
    axes = axes_from_json((survey / "axes.json").read_text(encoding="utf-8"))
    scores = load_importance(survey / "importance.safetensors")
    state = sort_units(model.state_dict(), axes, scores.units)
    return Family(model.config, task.build, axes, shapes, state)


def extract(
    folder: Path, recipe: Recipe, shape: Shape, family: Path, teacher: Path, survey: Path,
    data: Path,
) -> None:  # fmt: skip
    """A student of an elastic run, trained or not, as a plain folder."""
    task = open_task(recipe, data)
    model = cut_or_extract(load(task, family, teacher, survey), shape)
    task.save(cast(PreTrainedModel, model), teacher, folder)


def look(
    folder: Path, recipe: Recipe, family: Path, teacher: Path, survey: Path, data: Path,
    progress: Progress,
) -> None:  # fmt: skip
    """`frontier.json`: the trained sizes and shapes between them, each with its parameters, and its
    accuracy and loss on validation rows."""
    task = open_task(recipe, data)
    whole = load(task, family, teacher, survey)
    planner = Planner(recipe, teacher, survey, data, progress)
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
    write_json(folder / FRONTIER, found)


def plan_cut(folder: Path, student: StudentSpec, planner: Planner, frontier: Path) -> None:
    """`plan.json` of a student that is cut between trained sizes: of those within its budget the
    one with the least loss on the validation rows.

    Raises RecipeError where none is within.
    """
    plan, entry, considered = _choose(student, planner, frontier)
    reason = (
        f"Not trained: of {considered} shapes at and between the trained sizes the one within its "
        f"budget with the least loss on {entry['n']:,} validation rows."
    )
    write_json(folder / "plan.json", asdict(plan) | {"reason": reason, "timed": planner.timed()})


def _choose(
    student: StudentSpec, planner: Planner, frontier: Path
) -> tuple[StudentPlan, dict[str, Any], int]:
    """The plan, what the frontier says of its shape, and how many shapes there were."""
    seen = {_key(_shape(e["shape"])): e for e in read_json(frontier / FRONTIER)}
    space = [c for c in planner.space if _candidate_key(c) in seen]
    plan = plan_student(
        student, f"recipe.students.{student.name}.budget", space, planner.axes, planner.layers_of,
        planner.latency, rank=lambda c: -float(seen[_candidate_key(c)]["loss"]),
    )  # fmt: skip
    return plan, seen[_key(plan.shape)], len(space)


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
        teacher, survey, data = run / "teacher/hf", run / "architecture", run / "data"
        self.family = load(open_task(recipe, data), run / "family", teacher, survey)
        self._planner = Planner(recipe, teacher, survey, data, Silent())
        self._frontier = run / "frontier"

    @property
    def sizes(self) -> dict[str, Shape]:
        """The trained ones, the largest first."""
        return {name: size.shape for name, size in self.family.sizes.items()}

    def cut(
        self, *, params: int | str | None = None, size_mb: float | None = None,
        latency_ms: float | None = None,
    ) -> nn.Module:  # fmt: skip
        """The best model within the budget, in eval mode, with weights of its own. `params` may be
        '3M' or '450k'. Raises RecipeError where no shape keeps it."""
        budget = {"params": _count(params), "size_mb": size_mb, "latency_ms": latency_ms}
        student = StudentSpec.model_validate({"name": "cut", "budget": budget, "trained": False})
        shape = _choose(student, self._planner, self._frontier)[0].shape
        return cut_or_extract(self.family, shape)


def _count(value: int | str | None) -> int | None:
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
