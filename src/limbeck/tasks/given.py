"""Tables that are handed over in Python: kept in the cache by their content, as Parquet.

The recipe of the run then names a file and its checksum, so that the run can be resumed, and is
refused with other rows, as with any file.
"""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from limbeck.cache import cache_folder
from limbeck.errors import DataError
from limbeck.run import file_sha256


def keep_table(given: Any, where: str) -> dict[str, str]:
    """The recipe's source for it. An index of pandas is no column.

    Raises DataError for what is no table, or has columns that Parquet cannot hold.
    """
    try:
        table = _arrow(given)
        folder = cache_folder() / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{os.getpid()}.parquet"
        parquet.write_table(table.replace_schema_metadata(None), aside)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            where, f"this {type(given).__name__} is not readable as a table: {str(error)[:200]}",
            allowed="a data frame of pandas or polars, a pyarrow.Table, or a dict of columns",
            fix="write it as CSV or Parquet and name the file in the recipe",
        ) from error  # fmt: skip
    sha256 = file_sha256(aside)
    path = aside.rename(folder / f"{sha256[:16]}.parquet")
    return {"uri": str(path), "sha256": sha256}


def _arrow(given: Any) -> pa.Table:
    if isinstance(given, dict):
        return pa.table(given)
    if type(given).__module__.partition(".")[0] == "pandas":
        return pa.Table.from_pandas(given, preserve_index=False)
    if isinstance(given, pa.Table) or hasattr(given, "__arrow_c_stream__"):
        return pa.table(given)
    raise TypeError("it has no columns that Arrow can read")
