"""Columns of a table as numbers: read from a file, and encoded by what the training rows hold."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError, MissingExtraError
from limbeck.recipe import DataSpec
from limbeck.recipe_task import TabularTask
from limbeck.tasks.tables import named_label, require_columns, rows_of

_LISTED = 8
_R = (".rda", ".rdata")
Where = Callable[[int], str]  # a row's place, for a message


def rows_in(where: str) -> Where:
    """Rows of a file, counted from 1."""
    return lambda place: f"{where}, row {place + 1}"


@dataclass(frozen=True)
class Columns:
    """A file's rows. What is not there is NaN, or None."""

    labels: list[str]
    groups: list[str] | None
    number_names: tuple[str, ...]
    category_names: tuple[str, ...]
    numbers: np.ndarray  # (N, F) float64
    categories: list[tuple[str | None, ...]]  # N of K


@dataclass(frozen=True)
class Encoding:
    """What of a column's values the models know; `one` row is made into inputs by it alone."""

    numbers: Mapping[str, float]  # by name: the training rows' mean
    categories: Mapping[str, tuple[str, ...]]  # by name: the training rows' values, sorted
    missing: str
    unknown: str

    @classmethod
    def of(cls, columns: Columns, at: np.ndarray, spec: TabularTask) -> Encoding:
        """Fitted on these rows. Raises DataError for a column that they have nothing in."""
        numbers, categories = {}, {}
        for name, values in zip(columns.number_names, columns.numbers[at].T, strict=True):
            there = values[~np.isnan(values)]
            if not len(there):
                raise _empty(name)
            numbers[name] = float(there.mean())
        for i, name in enumerate(columns.category_names):
            found = {columns.categories[row][i] for row in at.tolist()} - {None}
            if not found:
                raise _empty(name)
            categories[name] = tuple(sorted(v for v in found if v is not None))
        return cls(numbers, categories, spec.missing, spec.unknown)

    @classmethod
    def of_json(cls, about: Mapping[str, Any]) -> Encoding:
        """From `preprocessing.json`."""
        categories = {one["name"]: tuple(one["values"]) for one in about["categories"]}
        numbers = {one["name"]: one["mean"] for one in about["numbers"]}
        return cls(numbers, categories, about["missing"], about["unknown"])

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "tabular",
            "numbers": [{"name": name, "mean": mean} for name, mean in self.numbers.items()],
            "categories": [
                {"name": name, "values": [*values]} for name, values in self.categories.items()
            ],
            "missing": self.missing, "unknown": self.unknown,
        }  # fmt: skip

    def arrays(self, columns: Columns, at: np.ndarray, where: Where) -> dict[str, np.ndarray]:
        """`numbers` (n, F) float32 and `categories` (n, K) int64, 0 for one that is not known; a
        kind without columns is left out. Raises DataError for what the recipe refuses."""
        found = {}
        if self.numbers:
            numbers = columns.numbers[at].copy()
            for row, i in zip(*np.nonzero(np.isnan(numbers)), strict=True):
                name = columns.number_names[i]
                self._require_fill(name, where(at[row]))
                numbers[row, i] = self.numbers[name]
            found["numbers"] = numbers.astype(np.float32)
        if self.categories:
            index = [{v: i + 1 for i, v in enumerate(vs)} for vs in self.categories.values()]
            ids = np.zeros((len(at), len(index)), np.int64)
            for row, place in enumerate(at.tolist()):
                for i, value in enumerate(columns.categories[place]):
                    name = columns.category_names[i]
                    ids[row, i] = self._index(name, value, index[i], where(place))
            found["categories"] = ids
        return found

    def one(self, row: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
        """The inputs of one row, (1, F) and (1, K). Raises DataError."""
        names = [*self.numbers, *self.categories]
        require_columns(sorted(row), names, where)
        numbers = [_number(row.get(name), name, where) for name in self.numbers]
        categories = tuple(_category(row.get(name)) for name in self.categories)
        read = Columns([], None, tuple(self.numbers), tuple(self.categories),
                       np.array([numbers], dtype=np.float64), [categories])  # fmt: skip
        return self.arrays(read, np.zeros(1, np.int64), lambda _: where)

    def _index(self, name: str, value: str | None, index: Mapping[str, int], where: str) -> int:
        if value is None:
            self._require_fill(name, where)
            return 0
        if value not in index and self.unknown == "refuse":
            known = ", ".join([*index][:_LISTED]) + (", ..." if len(index) > _LISTED else "")
            raise DataError(
                where, f"{name} is {value!r}, which no training row has", allowed=known,
                fix="correct it, or set task.unknown: ignore",
            )  # fmt: skip
        return index.get(value, 0)

    def _require_fill(self, name: str, where: str) -> None:
        if self.missing == "refuse":
            raise DataError(
                where, f"{name} is missing", allowed="a value in every row",
                fix="mend or remove the row, or set task.missing: fill",
            )  # fmt: skip


def read_columns(path: Path, data: DataSpec, spec: TabularTask, *, where: str) -> Columns:
    """From CSV, TSV, JSON lines, Parquet or R's .rda.

    Raises DataError for an unknown kind of file, a missing column, what is no number, no rows.
    """
    labels: list[str] = []
    groups: list[str] = []
    numbers: list[list[float]] = []
    categories: list[tuple[str | None, ...]] = []
    of_numbers: tuple[str, ...] | None = spec.numbers
    for at, row in enumerate(_rows(path, data, spec, where), start=1):
        here = f"{where}, row {at}"
        if of_numbers is None:
            other = {data.label, data.group, *spec.categories}
            of_numbers = tuple(name for name in row if name not in other)
            if not of_numbers and not spec.categories:
                raise DataError(
                    where, f"{path.name} has no column beside the label", allowed="one or more",
                    fix="check data.label",
                )  # fmt: skip
        labels.append(named_label(row[data.label], data, here))
        if data.group:
            groups.append(str(row[data.group]))
        numbers.append([_number(row[name], name, here) for name in of_numbers])
        categories.append(tuple(_category(row[name]) for name in spec.categories))
    if not labels:
        raise DataError(
            where, f"{path.name} has no rows", allowed="one or more",
            fix="name a file that has some",
        )  # fmt: skip
    assert of_numbers is not None
    return Columns(
        labels, groups if data.group else None, of_numbers, spec.categories,
        np.array(numbers, dtype=np.float64).reshape(len(labels), -1), categories,
    )  # fmt: skip


def _rows(path: Path, data: DataSpec, spec: TabularTask, where: str) -> Iterator[dict[str, Any]]:
    wanted = [*(spec.numbers or ()), *spec.categories, data.label]
    wanted += [data.group] if data.group else []
    if path.suffix.lower() in _R and path.is_file():
        return _r_rows(path, wanted, where)
    return rows_of(path, data, wanted, where, every=spec.numbers is None)


def _r_rows(path: Path, wanted: Sequence[str], where: str) -> Iterator[dict[str, Any]]:
    """Of the file's only data frame; factors by their names."""
    try:
        import rdata
    except ImportError as error:
        raise MissingExtraError.of(f"reading {path.name}", "tabular") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes of R that it has no use for
            found = rdata.read_rda(path)
        ((_, frame),) = found.items()
        columns = {name: frame[name].tolist() for name in frame.columns}
    except Exception as error:  # it has exceptions of many kinds
        raise DataError(
            where, f"{path.name} is not readable as R data: {str(error)[:200] or repr(error)}",
            allowed="a file with one data frame", fix="write it as CSV or Parquet",
        ) from error  # fmt: skip
    require_columns(wanted, [*columns], where)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _number(value: Any, name: str, where: str) -> float:
    """NaN for what is not there."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            where, f"{name} is {value!r}", allowed="a number",
            fix="mend or remove the row, or name the column in task.categories",
        ) from None  # fmt: skip
    if math.isinf(found) or abs(found) > float(np.finfo(np.float32).max):
        raise DataError(
            where, f"{name} is {value!r}", allowed="a number that float32 holds",
            fix="mend or remove the row",
        )  # fmt: skip
    return found


def _category(value: Any) -> str | None:
    """None for what is not there."""
    if value is None or value != value or not str(value).strip():
        return None
    return str(value)


def _empty(name: str) -> DataError:
    return DataError(
        "recipe.data.train", f"no training row has a {name}", allowed="some",
        fix="leave the column out of task.numbers and task.categories",
    )  # fmt: skip


def row_of(what: str) -> Mapping[str, Any]:
    """A row for `limbeck try`: a JSON object, or the path of a file that holds one."""
    path = Path(what)
    is_file = not what.lstrip().startswith("{") and path.is_file()
    where = what if is_file else "the row"
    try:
        row = json.loads(path.read_text(encoding="utf-8") if is_file else what)
    except (ValueError, RecursionError) as error:
        raise DataError(
            where, f"not JSON: {error}", allowed='{"column": value, ...}, or a file with that',
            fix="put the row in quotes",
        ) from None  # fmt: skip
    if not isinstance(row, dict):
        raise DataError(where, "not an object", allowed='{"column": value, ...}', fix="mend it")
    return row
