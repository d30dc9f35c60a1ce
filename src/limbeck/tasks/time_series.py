"""Time series of one length into classes, from .npz or Parquet files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError
from limbeck.recipe import DataSpec, Recipe
from limbeck.recipe_task import Examples, SeriesTask
from limbeck.tasks.examples import open_task, outline_of, prepare_with
from limbeck.tasks.tables import named_label, require_columns, rows_of
from limbeck.tasks.task import Outline

__all__ = ["open_task", "outline", "prepare"]

_NPZ = "numpy.savez(file, series=..., label=...)"


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:  # noqa: ARG001 for any alike
    return outline_of(recipe, train, read_series)


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:  # noqa: ARG001
    """Read, check and split; write `folder` for `open_task`. Raises DataError."""
    prepare_with(recipe, train, test, folder, read_series)


def read_series(path: Path, recipe: Recipe, where: str) -> Examples:
    """(N, C, T) float64. Raises DataError for an unknown kind of file, a missing array or column,
    series of unlike lengths, pickled objects."""
    assert isinstance(recipe.task, SeriesTask)
    name, data = recipe.task.series, recipe.data
    suffix = path.suffix.lower()
    if suffix == ".npz" and path.is_file():
        series, labels, groups = _from_npz(path, name, data, where)
    elif suffix == ".parquet" and path.is_file():
        series, labels, groups = _from_parquet(path, name, data, where)
    else:
        raise DataError(
            where, f"{path.name} is of no known kind", allowed=".npz or .parquet",
            fix=f"write it with {_NPZ}",
        )  # fmt: skip
    if series.ndim == 2:
        series = series[:, None]
    if series.ndim != 3:
        raise DataError(
            where, f"{name} has shape {series.shape}", fix="reshape it",
            allowed="(N, C, T), or (N, T) for one channel",
        )  # fmt: skip
    return Examples({"series": series}, labels, groups)


def one_series(path: Path) -> dict[str, np.ndarray]:
    """The series of a .npy file, (C, T) or (T,), as (1, C, T) float32. Raises DataError."""
    try:
        found = np.load(path, allow_pickle=False)
        series = np.atleast_2d(found).astype(np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            str(path), f"not readable: {str(error).splitlines()[0][:200]}",
            allowed="a .npy file of one series, (C, T) or (T,)", fix="write it with numpy.save",
        ) from None  # fmt: skip
    return {"series": series[None]}


def _from_npz(
    path: Path, name: str, data: DataSpec, where: str
) -> tuple[np.ndarray, list[str], list[str] | None]:
    wanted = [name, data.label, *([data.group] if data.group else [])]
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            require_columns(wanted, file.files, where)
            found = {key: file[key] for key in wanted}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            where, f"{path.name} is not readable: {str(error).splitlines()[0][:200]}",
            allowed="arrays of numbers and of text; never pickled objects",
            fix=f"write it with {_NPZ}, labels as numbers or str",
        ) from None  # fmt: skip
    for key in wanted[1:]:
        if found[key].shape != found[name].shape[:1]:
            raise DataError(
                where, f"{key} has shape {found[key].shape}, {name} has {found[name].shape}",
                allowed=f"{key} (N,): one for each series", fix="look at the arrays",
            )  # fmt: skip
    labels = [
        named_label(label, data, f"{where}, series {i}")
        for i, label in enumerate(found[data.label].tolist(), start=1)
    ]
    return found[name], labels, [str(g) for g in found[data.group]] if data.group else None


def _from_parquet(
    path: Path, name: str, data: DataSpec, where: str
) -> tuple[np.ndarray, list[str], list[str] | None]:
    wanted = [name, data.label, *([data.group] if data.group else [])]
    values: list[Any] = []
    labels, groups = [], []
    for i, row in enumerate(rows_of(path, data, wanted, where), start=1):
        here = f"{where}, row {i}"
        try:
            one = np.array(row[name], dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(
                here, f"{name} is {str(row[name])[:60]}", allowed="a list of numbers, or of such "
                "lists of one length", fix="mend or remove the row",
            ) from None  # fmt: skip
        if values and one.shape != values[0].shape:
            raise DataError(
                here, f"{name} has shape {one.shape}", fix="cut or fill it to the same length",
                allowed=f"that of the first, {values[0].shape}",
            )  # fmt: skip
        values.append(one)
        labels.append(named_label(row[data.label], data, here))
        if data.group:
            groups.append(str(row[data.group]))
    return np.array(values), labels, groups if data.group else None
