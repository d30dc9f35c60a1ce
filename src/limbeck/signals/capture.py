"""One pass of the teacher over the training rows, into a store, continued where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.device import on_device, rows_at_once
from limbeck.errors import DataError
from limbeck.progress import Progress
from limbeck.ranks import joined
from limbeck.signals.codecs import AnyCodec, VectorCodec
from limbeck.signals.store import Encoded, Writer
from limbeck.types import Batch, Need, Teacher

_SHARD = 1024  # rows; what a kill can cost each rank at most
_BATCH = 32


class Rows(Protocol):
    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> Batch: ...


def capture(
    teacher: Teacher,
    rows: Rows,
    stores: Mapping[Path, AnyCodec],
    *,
    made_from: Mapping[str, Any],
    progress: Progress,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    batch_size: int = _BATCH,
) -> None:
    """Ask the teacher about every row once, and write what it says by each codec into its folder.

    Continues behind the shards that are there. Under torchrun each rank writes every
    `world`-th shard; any number of ranks gives the same bytes. `provenance` (licences, versions) is
    kept beside the signals. Raises what `Writer` does.
    """
    needs = frozenset(_need(codec) for codec in stores.values())
    if not needs <= teacher.provides:
        raise DataError(
            "teacher", f"provides {', '.join(sorted(teacher.provides)) or 'nothing'}",
            allowed=", ".join(sorted(needs)), fix="choose another teacher, or store less of it",
        )  # fmt: skip
    together = rows_at_once(batch_size)
    with joined() as ranks:
        with ExitStack() as opened:
            writers = [
                opened.enter_context(
                    Writer(folder, made_from, codec, seed=seed).open(rank=ranks.rank)
                )
                for folder, codec in stores.items()
            ]
            ask = partial(_ask, teacher, rows, [*stores.values()], needs, seed)
            mine = range(ranks.rank, -(-len(rows) // _SHARD), ranks.world)
            left = [n for n in mine if any(n not in writer.shards for writer in writers)]
            ends = {number: min((number + 1) * _SHARD, len(rows)) for number in mine}
            sizes = {number: end - number * _SHARD for number, end in ends.items()}
            total = sum(sizes.values())
            done = total - sum(sizes[number] for number in left)
            with progress.bar("capture", total, "examples", done=done) as bar:
                for number in left:
                    starts = range(number * _SHARD, ends[number], together)
                    batches = (range(s, min(s + together, ends[number])) for s in starts)
                    parts = []
                    for part in on_device(ask, batches):
                        parts.append(part)
                        bar.advance(len(part[0].example_ids))
                    for writer, own in zip(writers, zip(*parts, strict=True), strict=True):
                        if number not in writer.shards:
                            writer.write(number, own)
            ranks.barrier()
            if ranks.first:
                for writer in writers:
                    writer.finish(provenance or {})
        ranks.barrier()


def keys_of(batch: Batch) -> Tensor:
    """[example id, number of the position among the example's counted ones], (P, 2) int64."""
    mask = batch.mask.reshape(len(batch.example_ids), -1)  # (B, T)
    ids = batch.example_ids.unsqueeze(1).expand_as(mask)
    return torch.stack([ids[mask], (mask.cumsum(1) - 1)[mask]], 1)


def _need(codec: AnyCodec) -> Need:
    return codec.need if isinstance(codec, VectorCodec) else Need.LOGITS


def _ask(
    teacher: Teacher, rows: Rows, codecs: Sequence[AnyCodec], needs: frozenset[Need],
    seed: int, positions: range,
) -> list[Encoded]:  # fmt: skip
    """The signals of a few rows, by each codec."""
    batch = rows.batch(positions)
    signal = teacher.signal(batch, needs)
    found = []
    for codec in codecs:
        vocab_size = None
        if isinstance(codec, VectorCodec):
            fields, counts = codec.encode_signal(signal, batch, seed)
        else:
            logits = signal.logits_at(batch.mask)  # (P, V)
            vocab_size = logits.shape[1]
            fields = codec.encode(logits, keys_of(batch), seed)
            counts = batch.mask.reshape(len(batch.mask), -1).sum(1)
        fields = {name: values.cpu() for name, values in fields.items()}
        found.append(
            Encoded(
                example_ids=batch.example_ids,
                counts=counts,
                fields=fields,
                vocab_size=vocab_size,
                views=batch.views,
            )
        )
    return found
