"""One pass of the teacher over the training rows, into a store, continued where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.cores import on_each
from limbeck.errors import DataError
from limbeck.progress import Progress
from limbeck.signals.codecs import Codec
from limbeck.signals.store import Encoded, Writer
from limbeck.types import Batch, Need, Teacher

_SHARD = 1024  # rows; what a kill can cost each rank at most
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
    codec: Codec,
    progress: Progress,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write what the teacher says at every counted position of every row.

    Continues behind the shards that are there. Under torchrun each rank writes every
    `world`-th shard; any number of ranks gives the same bytes. `provenance` (licences, versions) is
    kept beside the signals. Raises what `Writer` does.
    """
    if Need.LOGITS not in teacher.provides:
        raise DataError(
            "teacher", f"provides {', '.join(sorted(teacher.provides)) or 'nothing'}",
            allowed="logits", fix="choose another teacher",
        )  # fmt: skip
    ask = partial(_ask, teacher, rows, codec, seed)
    with _ranks() as (rank, world, barrier):
        with Writer(folder, made_from, codec, seed=seed).open(rank=rank) as writer:
            mine = range(rank, -(-len(rows) // _SHARD), world)
            done = sum(s["rows"] for number, s in writer.shards.items() if number in mine)
            total = sum(min(_SHARD, len(rows) - number * _SHARD) for number in mine)
            with progress.bar("capture", total, "examples", done=done) as bar:
                for number in mine:
                    if number in writer.shards:
                        continue
                    end = min((number + 1) * _SHARD, len(rows))
                    starts = range(number * _SHARD, end, _BATCH)
                    parts = []
                    for part in on_each(ask, (range(s, min(s + _BATCH, end)) for s in starts)):
                        parts.append(part)
                        bar.advance(len(part.example_ids))
                    writer.write(number, parts)
            barrier()
            if rank == 0:
                writer.finish(provenance or {})
        barrier()


def keys_of(batch: Batch) -> Tensor:
    """[example id, number of the position among the example's counted ones], (P, 2) int64."""
    mask = batch.mask.reshape(len(batch.example_ids), -1)  # (B, T)
    ids = batch.example_ids.unsqueeze(1).expand_as(mask)
    return torch.stack([ids[mask], (mask.cumsum(1) - 1)[mask]], 1)


def _ask(teacher: Teacher, rows: Rows, codec: Codec, seed: int, positions: range) -> Encoded:
    batch = rows.batch(positions)
    logits = teacher.signal(batch, frozenset({Need.LOGITS})).logits
    assert logits is not None
    logits = logits[batch.mask]  # (P, V)
    fields = codec.encode(logits, keys_of(batch), seed)
    return Encoded(
        example_ids=batch.example_ids,
        counts=batch.mask.reshape(len(batch.mask), -1).sum(1),
        fields={name: values.cpu() for name, values in fields.items()},
        vocab_size=logits.shape[1],
    )


@contextmanager
def _ranks() -> Iterator[tuple[int, int, Any]]:
    """(rank, number of ranks, barrier) as torchrun says; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, lambda: None
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), world, dist.barrier
    finally:
        if ours:
            dist.destroy_process_group()
