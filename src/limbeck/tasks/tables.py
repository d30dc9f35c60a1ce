"""Rows of text and label from CSV, TSV, JSON lines, Parquet or a folder of folders of text."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import DataError
from limbeck.recipe import DataSpec

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_OTHERS = {";": "semicolon", "\t": "tab", "|": "bar"}
_LISTED = 12
# Names of folders that are parts of a data set and no labels.
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


@dataclass(frozen=True, slots=True)
class Table:
    texts: list[str]
    labels: list[str]
    groups: list[str] | None


def read_table(path: Path, spec: DataSpec, *, where: str) -> Table:
    """Raises DataError for an unknown kind of file, a missing column, an empty value, no rows."""
    wanted = [spec.text, spec.label, *([spec.group] if spec.group else [])]
    texts: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    for number, row in enumerate(rows_of(path, spec, wanted, where), start=1):
        text, label = row[spec.text], row[spec.label]
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{where}, row {number}", f"{spec.text} is {text!r}", allowed="text",
                fix="remove or mend the row",
            )  # fmt: skip
        texts.append(text)
        labels.append(named_label(label, spec, f"{where}, row {number}"))
        if spec.group:
            groups.append(str(row[spec.group]))
    if not texts:
        raise DataError(
            where, f"{path.name} has no rows", allowed="one or more",
            fix="name a file that has some",
        )  # fmt: skip
    return Table(texts, labels, groups if spec.group else None)


def named_label(label: Any, spec: DataSpec, where: str) -> str:
    """As text, by its name where `data.label_names` has one. Raises DataError for none."""
    if not isinstance(label, str | int | float) or label != label or not str(label).strip():
        raise DataError(
            where, f"{spec.label} is {label!r}", allowed="text or a number",
            fix="remove or mend the row",
        )  # fmt: skip
    names = spec.label_names
    if names is None:
        return str(label)
    if not str(label).isdecimal() or int(label) >= len(names):
        raise DataError(
            where, f"label {label!r} has no name", allowed=f"0 to {len(names) - 1}",
            fix="give data.label_names one for each label, or leave it out",
        )  # fmt: skip
    return names[int(label)]


def rows_of(
    path: Path, spec: DataSpec, wanted: Sequence[str], where: str, *, every: bool = False
) -> Iterator[dict[str, Any]]:
    """Each with the wanted columns at least, or with every one. Raises DataError."""
    if path.is_dir():
        return _folder_rows(path, spec, where)
    suffix = path.suffix.lower()
    if suffix not in _DELIMITERS and (spec.columns is not None or spec.skip_rows):
        raise DataError(
            where, f"columns and skip_rows have no effect on {path.name}",
            allowed="both for .csv, .tsv and .tab alone", fix="remove them",
        )  # fmt: skip
    if suffix in _DELIMITERS:
        return _delimited_rows(path, _DELIMITERS[suffix], spec, wanted, where)
    if suffix in (".jsonl", ".ndjson"):
        return _json_rows(path, wanted, where)
    if suffix == ".parquet":
        return _parquet_rows(path, wanted, where, every=every)
    raise DataError(
        where, f"{path.name} is of no known kind",
        allowed=".csv, .tsv, .tab, .jsonl, .parquet or a folder with one subfolder per label",
        fix="convert or rename it",
    )  # fmt: skip


def _delimited_rows(
    path: Path, delimiter: str, spec: DataSpec, wanted: Sequence[str], where: str
) -> Iterator[dict[str, Any]]:
    # a .tab or .tsv line is split at tabs alone; quotes in it are text
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    csv.field_size_limit(2**31 - 1)
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a BOM
        try:
            for _ in range(spec.skip_rows):
                next(file, None)
            lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            columns = list(spec.columns) if spec.columns else next(lines, [])
            _check_separator(columns, wanted, where)
            require_columns(wanted, columns, where)
            for number, line in enumerate(lines, start=1):
                if not line:
                    continue
                if len(line) != len(columns):
                    raise DataError(
                        f"{where}, row {number}",
                        f"{len(line)} fields", allowed=f"{len(columns)}: {', '.join(columns)}",
                        fix="mend the row; or check `columns` and `skip_rows`",
                    )  # fmt: skip
                yield dict(zip(columns, line, strict=True))
        except UnicodeDecodeError:  # its place counts from the last block that was read
            raise DataError(
                where, f"{path.name} is not UTF-8 text somewhere behind row {number}",
                allowed="UTF-8", fix="convert it",
            ) from None  # fmt: skip
        except csv.Error as error:
            raise DataError(
                f"{where}, behind row {number}", f"{path.name} is not readable as CSV: {error}",
                allowed='fields in "quotes", a quote in them doubled', fix="mend the row",
            ) from None  # fmt: skip


def _check_separator(columns: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raises DataError for one column that is plainly several: spreadsheets of half the world write
    semicolons."""
    if len(columns) > 1 or {*columns} & {*wanted}:
        return
    for name in columns:
        if found := next((mark for mark in _OTHERS if mark in name), None):
            raise DataError(
                where, f"the one column is called {name[:60]!r}",
                allowed="fields parted by commas (.csv) or tabs (.tsv, .tab)",
                fix=f"the file has a {_OTHERS[found]} between them: write it with commas, and "
                "numbers with a decimal point",
            )  # fmt: skip


def _json_rows(path: Path, wanted: Sequence[str], where: str) -> Iterator[dict[str, Any]]:
    allowed = "an object, {" + ", ".join(f'"{name}": ...' for name in wanted) + "}"
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            at = f"{where}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    at, f"not JSON: {error}", allowed=allowed, fix="mend or remove the line"
                ) from None
            if not isinstance(row, dict):
                raise DataError(at, "not an object", allowed=allowed, fix="mend or remove the line")
            require_columns(wanted, list(row), at)
            yield row


def _parquet_rows(
    path: Path, wanted: Sequence[str], where: str, *, every: bool = False
) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        require_columns(wanted, file.schema_arrow.names, where)
        for batch in file.iter_batches(columns=None if every else list(wanted)):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            where, f"{path.name} is not readable as Parquet: {str(error).splitlines()[0]}",
            allowed="a whole Parquet file", fix="fetch or write it again",
        ) from None  # fmt: skip


def label_folders(path: Path, where: str, allowed: str) -> list[Path]:
    """The subfolders, one per label, but for those that programs leave behind. Raises DataError for
    none, or for those of a data set that is split already."""
    folders = sorted(
        child for child in path.iterdir()
        if child.is_dir() and not child.name.startswith((".", "__MACOSX"))
    )  # fmt: skip
    names = {folder.name.lower() for folder in folders}
    if not folders:
        raise DataError(
            where, f"{path} has no subfolders", allowed=allowed,
            fix="name the folder above them, or a file",
        )  # fmt: skip
    if "train" in names and len(names) > 1 and names <= _SPLITS:
        raise DataError(
            where, f"{path} has {' and '.join(sorted(folder.name for folder in folders))} in it",
            allowed=allowed, fix="name the one to learn from as data.train, another as data.test",
        )  # fmt: skip
    return folders


def _folder_rows(path: Path, spec: DataSpec, where: str) -> Iterator[dict[str, Any]]:
    if spec.group is not None:
        raise DataError(
            where, "data.group has no effect on a folder of texts", allowed="a file with columns",
            fix="remove it",
        )  # fmt: skip
    for folder in label_folders(path, where, "one subfolder per label"):
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise DataError(
                where, f"{folder} holds no .txt file", allowed="one subfolder of them per label",
                fix="fill or remove it",
            )  # fmt: skip
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    where, f"{file} is not UTF-8 text at byte {error.start}", allowed="UTF-8",
                    fix="convert it",
                ) from None  # fmt: skip
            yield {spec.text: text, spec.label: folder.name}


def require_columns(wanted: Sequence[str], columns: Sequence[str], where: str) -> None:
    for name in wanted:
        if columns.count(name) > 1:
            raise DataError(
                where, f"{columns.count(name)} columns are called {name!r}",
                allowed="different names", fix="rename one",
            )  # fmt: skip
        if name not in columns:
            close = difflib.get_close_matches(name, columns, 1)
            listed = ", ".join(columns[:_LISTED]) + (", ..." if len(columns) > _LISTED else "")
            raise DataError(
                where, f"no column {name!r}", allowed=listed or "none, the file has no columns",
                fix=f"did you mean {close[0]!r}?" if close else "name the columns in recipe.data",
            )  # fmt: skip
