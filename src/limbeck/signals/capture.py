"""One pass of the teacher over the training rows, into a store, continued where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.cores import on_each
from limbeck.errors import DataError
from limbeck.progress import Progress
from limbeck.signals.store import Writer
from limbeck.types import Batch, Need, Teacher

_SHARD = 1024  # rows; what a kill can cost at most
_BATCH = 32


class Rows(Protocol):
    def __len__(self) -> int: ...

    def batch(self, positions: range) -> Batch: ...


def capture(
    teacher: Teacher,
    rows: Rows,
    folder: Path,
    *,
    made_from: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the teacher's logits on every row. Continues behind the last whole shard."""
    if Need.LOGITS not in teacher.provides:
        raise DataError(
            "teacher", f"provides {', '.join(sorted(teacher.provides)) or 'nothing'}",
            allowed="logits", fix="choose another teacher",
        )  # fmt: skip
    writer = Writer(folder, made_from)
    with progress.bar("capture", len(rows), "examples", done=writer.rows) as bar:
        for start in range(writer.rows, len(rows), _SHARD):
            end = min(start + _SHARD, len(rows))
            batches = (range(at, min(at + _BATCH, end)) for at in range(start, end, _BATCH))
            ids, logits = [], []
            for example_ids, found in on_each(partial(_ask, teacher, rows), batches):
                ids.append(example_ids)
                logits.append(found)
                bar.advance(len(example_ids))
            writer.append(torch.cat(ids), torch.cat(logits))


def _ask(teacher: Teacher, rows: Rows, positions: range) -> tuple[Tensor, Tensor]:
    batch = rows.batch(positions)
    logits = teacher.signal(batch, frozenset({Need.LOGITS})).logits
    assert logits is not None
    return batch.example_ids, logits
