"""Rows of a table into classes: columns of numbers and of categories, see `tasks.columns`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from limbeck.recipe import Recipe
from limbeck.recipe_task import TabularTask
from limbeck.tasks.arrays import (
    ArrayClassification,
    Part,
    inputs_of,
    open_task,
    scales_of,
    write_parts,
)
from limbeck.tasks.columns import Columns, Encoding, read_columns, rows_in
from limbeck.tasks.splits import divided
from limbeck.tasks.task import Outline

__all__ = ["open_task", "outline", "prepare"]


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:  # noqa: ARG001 for any alike
    assert isinstance(recipe.task, TabularTask)
    table = read_columns(train, recipe.data, recipe.task, where="recipe.data.train")
    everything = np.arange(len(table.labels))
    encoding = Encoding.of(table, everything, recipe.task)
    arrays = encoding.arrays(table, everything, rows_in("recipe.data.train"))
    task = ArrayClassification(
        tuple(sorted({*table.labels})), inputs_of(arrays, _below(encoding)), scales_of(arrays),
        encoding.to_json(),
    )  # fmt: skip
    return Outline(task=task, num_rows=len(everything), num_classes=len(task.labels))


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:  # noqa: ARG001
    """Read, check, split and encode; write `folder` for `open_task`.

    Raises DataError for empty data, too few labels, test labels that training never shows, and for
    what `Encoding` refuses.
    """
    data, spec = recipe.data, recipe.task
    assert isinstance(spec, TabularTask)
    of_train, of_test = "recipe.data.train", "recipe.data.test" if test else "recipe.data.train"
    table = read_columns(train, data, spec, where=of_train)
    test_table = table
    if test is not None:  # the same columns, in the same order
        same = spec.model_copy(update={"numbers": table.number_names})
        test_table = read_columns(test, data, same, where=of_test)
    labels, (train_at, validation_at, test_at) = divided(
        recipe, table.labels, table.groups, None if test is None else test_table.labels
    )
    encoding = Encoding.of(table, train_at, spec)

    def part(source: Columns, at: np.ndarray, where: str) -> Part:
        return Part(at, [source.labels[i] for i in at], encoding.arrays(source, at, rows_in(where)))

    write_parts(
        folder, labels,
        {
            "train": part(table, train_at, of_train),
            "validation": part(table, validation_at, of_train),
            "test": part(test_table, test_at, of_test),
        },
        _below(encoding), encoding.to_json(), {"numbers": table.number_names},
    )  # fmt: skip


def _below(encoding: Encoding) -> dict[str, tuple[int, ...]]:
    """How many indices each column of categories has, with that of the unknown."""
    return {"categories": tuple(len(values) + 1 for values in encoding.categories.values())}
