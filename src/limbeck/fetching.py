"""A recipe's models and data on this machine's disk, before any stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from limbeck.cache import Fetched, config_folder
from limbeck.progress import Progress
from limbeck.recipe import Recipe
from limbeck.sources import fetch


@dataclass(frozen=True)
class Sources:
    model: Fetched
    train: Fetched
    test: Fetched | None
    base: Fetched | None = None
    benchmarks: Fetched | None = None
    """Tasks of the user's own."""


def fetch_sources(recipe: Recipe, progress: Progress, base: Path) -> Sources:
    """Model and data on this machine's disk. What is relative, a hub id say, starts at `base`."""
    told: set[str] = set()

    def show(label: str, _done: int, _total: int) -> None:
        if label not in told:
            told.add(label)
            progress.say(label)

    get = partial(fetch, base=base, progress=show)
    data, base_model = recipe.data, recipe.base.model if recipe.base else None
    asked = recipe.measure.benchmarks
    own = asked.folder if asked else None
    return Sources(
        model=fetch_teacher(recipe, get),
        train=get(data.train, where="recipe.data.train", kind="data"),
        test=get(data.test, where="recipe.data.test", kind="data") if data.test else None,
        base=get(base_model, where="recipe.base.model", kind="model") if base_model else None,
        benchmarks=get(own, where="recipe.measure.benchmarks.folder", kind="data") if own else None,
    )


def fetch_teacher(recipe: Recipe, get: Callable[..., Fetched]) -> Fetched:
    """Its folder; of one that is only a config so far, a folder with that."""
    spec = recipe.teacher
    if spec.estimator is not None:
        if spec.estimator.model is not None:
            return get(spec.estimator.model, where="recipe.teacher.estimator.model", kind="data")
        return config_folder({"model_type": spec.estimator.kind})
    if spec.model is not None:
        return get(spec.model, where="recipe.teacher.model", kind="model")
    assert spec.config is not None  # the recipe checked it
    return config_folder(spec.config)


def remade(recipe: Recipe, model: Path) -> bool:
    """Whether the teacher cannot be taken as it is."""
    packed = model.is_file() or (any(model.glob("*.gguf")) and not (model / "config.json").exists())
    return recipe.teacher.trim_vocabulary or (packed and not recipe.task.has_labels)
