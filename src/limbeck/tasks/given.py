"""What is handed over in Python, kept in the cache by its content: tables and estimators.

The recipe of the run then names a file and its checksum, so that the run can be resumed, and is
refused with others, as with any file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from limbeck.cache import cache_folder
from limbeck.errors import DataError, MissingExtraError, SourceError
from limbeck.run import file_sha256
from limbeck.tasks.estimators import save_estimator


def keep_table(given: Any, where: str) -> dict[str, str]:
    """The recipe's source for it, as Parquet. An index of pandas is no column.

    Raises DataError for what is no table, or has columns that Parquet cannot hold.
    """
    try:
        table = _arrow(given).replace_schema_metadata(None)
        return _kept("tables/{}.parquet", lambda path: parquet.write_table(table, path))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            where, f"this {type(given).__name__} is not readable as a table: {str(error)[:200]}",
            allowed="a data frame of pandas or polars, a pyarrow.Table, or a dict of columns",
            fix="write it as CSV or Parquet and name the file in the recipe",
        ) from error  # fmt: skip


def keep_estimator(model: Any, where: str) -> dict[str, Any]:
    """The recipe's `teacher` for it. Who hands it over in Python trusts its types.

    Raises MissingExtraError, and SourceError where skops cannot save it.
    """
    try:
        import skops.io
    except ImportError as error:
        raise MissingExtraError.of(where, "tabular") from error
    try:
        source = _kept("estimators/{}.skops", lambda path: save_estimator(model, path))
    except Exception as error:  # whatever its types' own code raises
        raise SourceError(
            where, f"skops cannot save this {type(model).__name__}: "
            f"{str(error)[:200] or repr(error)}", allowed="a scikit-learn estimator or the like",
            fix="hand over the fitted estimator itself",
        ) from error  # fmt: skip
    trusted = skops.io.get_untrusted_types(file=source["uri"])
    return {"estimator": {"model": source, "trusted": trusted}}


def _kept(name: str, write: Callable[[Path], object]) -> dict[str, str]:
    """Written in the cache under its checksum; nothing is left of what cannot be written."""
    aside = cache_folder() / name.format(os.getpid())
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(aside)
        sha256 = file_sha256(aside)
        path = aside.rename(cache_folder() / name.format(sha256[:16]))
    finally:
        aside.unlink(missing_ok=True)
    return {"uri": str(path), "sha256": sha256}


def _arrow(given: Any) -> pa.Table:
    if type(given).__module__.partition(".")[0] == "pandas":
        return pa.Table.from_pandas(given, preserve_index=False)
    if isinstance(given, dict | pa.Table) or hasattr(given, "__arrow_c_stream__"):
        return pa.table(given)
    raise TypeError("it has no columns that Arrow can read")
