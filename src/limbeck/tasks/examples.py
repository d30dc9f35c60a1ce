"""Arrays that a function reads, checked and split: tasks of your own, and time series."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from limbeck.errors import DataError
from limbeck.recipe import Recipe
from limbeck.recipe_task import ArrayTask, Examples
from limbeck.tasks.arrays import (
    ArrayClassification,
    Arrays,
    Part,
    inputs_of,
    open_task,
    scales_of,
    write_parts,
)
from limbeck.tasks.splits import divided
from limbeck.tasks.task import Outline

__all__ = ["open_task", "outline", "outline_of", "prepare", "prepare_with"]

Read = Callable[[Path, Recipe, str], Examples]  # the last: the setting, for messages


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:  # noqa: ARG001 for any alike
    return outline_of(recipe, train, _by_the_task)


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:  # noqa: ARG001
    """Of a kind that others bring: read by the task's own `read`."""
    prepare_with(recipe, train, test, folder, _by_the_task)


def _by_the_task(path: Path, recipe: Recipe, where: str) -> Examples:  # noqa: ARG001 it says itself
    assert isinstance(recipe.task, ArrayTask)
    return recipe.task.read(path, recipe.data)


def outline_of(recipe: Recipe, train: Path, read: Read) -> Outline:
    """What `plan` needs, of what is read."""
    found = read_examples(recipe, train, read, "recipe.data.train")
    task = ArrayClassification(
        tuple(sorted({*found.labels})), inputs_of(found.arrays, _below(found.arrays)),
        scales_of(found.arrays), {},
    )  # fmt: skip
    return Outline(task=task, num_rows=len(found.labels), num_classes=len(task.labels))


def prepare_with(
    recipe: Recipe, train: Path, test: Path | None, folder: Path, read: Read
) -> None:
    """Read, check and split; write `folder` for `open_task`.

    Raises DataError for arrays that do not fit together, and what `read` and `divided` do.
    """
    found = read_examples(recipe, train, read, "recipe.data.train")
    tested = found if test is None else read_examples(recipe, test, read, "recipe.data.test")
    _require_alike(found.arrays, tested.arrays)
    labels, (train_at, validation_at, test_at) = divided(
        recipe, found.labels, found.groups, None if test is None else tested.labels
    )

    def part(source: Examples, at: np.ndarray) -> Part:
        arrays = {name: array[at] for name, array in source.arrays.items()}
        return Part(at, [source.labels[i] for i in at], arrays)

    write_parts(
        folder, labels,
        {
            "train": part(found, train_at), "validation": part(found, validation_at),
            "test": part(tested, test_at),
        },
        _below(found.arrays, tested.arrays),
        {"kind": recipe.task.kind, "settings": recipe.task.model_dump(mode="json")}, {},
    )  # fmt: skip


def read_examples(recipe: Recipe, path: Path, read: Read, where: str) -> Examples:
    """What is read, as float32 and int64. Raises DataError."""
    found = read(path, recipe, where)
    if not len(found.labels):
        raise DataError(
            where, f"{path.name} has no examples", allowed="one or more",
            fix="name a file or folder that has some",
        )  # fmt: skip
    arrays = {name: _plain(name, array, where) for name, array in found.arrays.items()}
    for name, array in arrays.items():
        if len(array) != len(found.labels):
            raise DataError(
                where, f"{len(array)} {name} for {len(found.labels)} labels",
                allowed="one for each", fix="look at the file, or at the task's `read`",
            )  # fmt: skip
    return Examples(arrays, [str(label) for label in found.labels], found.groups)


def _plain(name: str, array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        raise DataError(
            where, f"{name} are {array.dtype}, of shape {array.shape}",
            allowed="numbers, (examples, ...)", fix="look at the file, or at the task's `read`",
        )  # fmt: skip
    if name == "categories":
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        found = array.astype(np.float32)
    bad = ~np.isfinite(found).reshape(len(found), -1).all(1)
    if bad.any():
        raise DataError(
            f"{where}, example {int(bad.argmax()) + 1}", f"{name} has NaN, or no finite number",
            allowed="numbers that float32 holds", fix=f"mend or remove it ({int(bad.sum())} have)",
        )  # fmt: skip
    return found


def _below(*parts: Arrays) -> dict[str, tuple[int, ...]]:
    """One more than the largest index of each column of categories."""
    found = [arrays["categories"].max(0) for arrays in parts if "categories" in arrays]
    return {"categories": tuple((np.max(found, axis=0) + 1).tolist())} if found else {}


def _require_alike(one: Arrays, other: Arrays) -> None:
    mine, theirs = ({n: a.shape[1:] for n, a in arrays.items()} for arrays in (one, other))
    if mine != theirs:
        raise DataError(
            "recipe.data.test", f"its arrays are {theirs}", allowed=f"as those to train on: {mine}",
            fix="bring them to one size",
        )  # fmt: skip
