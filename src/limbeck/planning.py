"""`limbeck plan`: every student's shape, parameters and predicted costs, before any training."""

from __future__ import annotations

from pathlib import Path

from limbeck import stages
from limbeck.architecture.axes import find_axis
from limbeck.architecture.plan import Candidate, LatencyModel, plan_student
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe
from limbeck.recipe_file import rebase
from limbeck.sources import fetch
from limbeck.tasks.tables import read_table
from limbeck.types import Shape, StudentPlan


def plan(recipe: Recipe, base: Path, progress: Progress | None) -> tuple[StudentPlan, ...]:
    """Layers are only counted: which ones are kept is known when the teacher is tuned."""
    progress = progress or Silent()
    recipe = rebase(recipe, base)
    model_folder = fetch(
        recipe.teacher.model, where="recipe.teacher.model", base=base, kind="model"
    ).path
    train = fetch(recipe.data.train, where="recipe.data.train", base=base, kind="data").path
    labels = sorted({*read_table(train, recipe.data, where="recipe.data.train").labels})
    config, axes = stages.untuned_axes(recipe, model_folder, labels)
    layers = find_axis(axes, "layers")

    def measure(candidate: Candidate) -> float:
        progress.say(f"timing a shape with random weights: {dict(candidate.key)}")
        shape = Shape(candidate.sizes, tuple(range(candidate.num_layers)))
        return stages.time_shape(recipe, config, axes, shape)

    def spread(count: int) -> tuple[int, ...]:
        assert layers is not None
        return tuple(range(layers.size))[:count]

    space = stages.space_of(config, axes, recipe.export.primary)
    latency = LatencyModel(measure)
    return tuple(
        plan_student(s, f"recipe.students.{s.name}.budget", space, axes, spread, latency)
        for s in recipe.students
    )
