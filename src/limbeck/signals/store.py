"""A folder of what a teacher said, which describes itself; read by example id.

    manifest.json           schema, codec, what the signals were made from, shards with their sha256
    shard-00000.safetensors codec's fields, (positions, width) each; `docs/signals.md` has the bits
    index.safetensors       example id -> shard, first position, number of positions
    provenance.json         date, licences, versions

While it is captured there is no manifest but

    capture.json            what the manifest will say of codec and origins: another capture differs
    journal-0.jsonl         one line per finished shard, for each rank a file

A shard is written aside, flushed and renamed, then listed in the journal. Shards are cut by row
number alone, so any number of ranks, kills and resumes gives the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.errors import DataError, RunFolderError
from limbeck.recipe_file import differences
from limbeck.run import (
    damaged,
    file_sha256,
    read_index,
    replaced,
    require_sha256,
    sweep,
    write_json,
)
from limbeck.signals.codecs import (
    AnyCodec,
    VectorCodec,
    codec_from_settings,
    settings_of,
)
from limbeck.signals.targets import Targets
from limbeck.signals.vectors import Embedding, Hidden, Text

SCHEMA = 2
MANIFEST, INDEX, PROVENANCE = "manifest.json", "index.safetensors", "provenance.json"
_CAPTURE = "capture.json"
_ABOUT = ("schema", "made_from", "codec", "seed")
_TOTALS = ("vocab_size", "rows", "positions", "bytes_per_position", "index_sha256", "shards")
_OF_ROWS = ("example_ids", "counts", "views")  # of a shard's tensors; the others are the codec's
_SHARD_KEYS = {"number", "file", "rows", "positions", "vocab_size", "sha256"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """What a shard is made of: the signals of a few examples, one's positions behind another's."""

    example_ids: Tensor  # (n,) int64
    counts: Tensor  # (n,) int64, positions of each; P together
    fields: Mapping[str, Tensor]  # the codec's, (P, width) each
    vocab_size: int | None  # None where there are no classes
    views: Tensor | None = None  # (n, K) float64, see `Batch.views`


class Writer:
    """Shards of one capture. `made_from` names each thing that the signals depend on.

    Reopened, it compares `made_from`, codec and seed with what was begun, and checks the shards
    that are there. Raises DataError for another capture's folder, DamagedError for a shard that is
    not as it was written, RunFolderError while another process writes here.
    """

    def __init__(
        self, folder: Path, made_from: Mapping[str, Any], codec: AnyCodec, *, seed: int = 0
    ) -> None:
        self.folder, self.codec, self.seed = folder, codec, seed
        self.made_from = dict(made_from)
        self.shards: dict[int, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def open(self, *, rank: int = 0) -> Iterator[Writer]:
        """Holds the lock of this rank's journal."""
        about = {
            "schema": SCHEMA, "made_from": self.made_from, "codec": settings_of(self.codec),
            "seed": self.seed,
        }  # fmt: skip
        begun = _manifest(self.folder) or read_index(self.folder / _CAPTURE, {*_ABOUT})
        if begun is not None:
            refuse_others(self.folder, {k: begun[k] for k in _ABOUT}, about)
        with (self.folder / f"journal-{rank}.jsonl").open("a+", encoding="utf-8") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    str(self.folder), "another process is capturing into it",
                    allowed="one at a time", fix="wait for it to end",
                ) from None  # fmt: skip
            if rank == 0:
                write_json(self.folder / _CAPTURE, about)
            self._about, self._journal = about, journal
            self.shards = self._listed()
            yield self

    def _listed(self) -> dict[int, dict[str, Any]]:
        """Shards of all ranks' journals, checked; torn last lines are not shards yet."""
        found = {}
        manifest = _manifest(self.folder)
        lines = list(manifest["shards"]) if manifest else []
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        for shard in lines:
            if isinstance(shard, dict) and shard.keys() >= _SHARD_KEYS:
                require_sha256(self.folder / shard["file"], shard["sha256"])
                found[int(shard["number"])] = shard
        return found

    def write(self, number: int, parts: Sequence[Encoded]) -> None:
        """One shard, on disk when this returns."""
        path = self.folder / f"shard-{number:05d}.safetensors"
        columns = []
        for part in parts:
            views = {} if part.views is None else {"views": part.views}
            own = {"example_ids": part.example_ids, "counts": part.counts}
            columns.append({**own, **views, **part.fields})
        tensors = {
            name: torch.cat([part[name] for part in columns]).contiguous() for name in columns[0]
        }
        with replaced(path) as aside:
            save_file(tensors, aside)
        shard = {
            "number": number, "file": path.name, "rows": len(tensors["example_ids"]),
            "positions": int(tensors["counts"].sum()), "vocab_size": parts[0].vocab_size,
            "sha256": file_sha256(path),
        }  # fmt: skip
        self._journal.write("\n" + json.dumps(shard) + "\n")  # a torn line before it stays alone
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.shards[number] = shard

    def finish(self, provenance: Mapping[str, Any]) -> None:
        """Index and manifest, from the shards of all ranks; the capture's own files go.

        What changes from one capture to the next of the same signals, the date say, has a file of
        its own: a repaired store has the bytes it had.
        """
        if not (self.folder / PROVENANCE).exists():
            today = datetime.now(UTC).date().isoformat()
            write_json(self.folder / PROVENANCE, {"date": today, **provenance})
        self.shards = self._listed()
        shards = [self.shards[number] for number in sorted(self.shards)]
        index = _index(self.folder, shards)
        with replaced(self.folder / INDEX) as aside:
            save_file(index, aside)
        (vocab_size,) = {s["vocab_size"] for s in shards}
        totals = {
            "vocab_size": vocab_size,
            "rows": sum(s["rows"] for s in shards),
            "positions": sum(s["positions"] for s in shards),
            "bytes_per_position": _width(self.folder, shards),
            "index_sha256": file_sha256(self.folder / INDEX),
            "shards": shards,
        }
        write_json(self.folder / MANIFEST, self._about | totals)
        for path in (self.folder / _CAPTURE, *self.folder.glob("journal-*.jsonl")):
            path.unlink(missing_ok=True)
        sweep(self.folder)


def refuse_others(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises DataError where signals were made from something else, naming both sides."""
    for where, before, now in differences(there, here):
        raise DataError(
            str(folder), f"holds signals of another capture: {where} is {before!r} there",
            allowed=f"{now!r}, as here",
            fix="capture again into another folder, or give what these signals were made from",
        )  # fmt: skip


def _index(folder: Path, shards: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Sorted by example id: all (N,)."""
    ids, counts, first, number, row = [], [], [], [], []
    for shard in shards:
        tensors = load_file(folder / shard["file"])
        ids.append(tensors["example_ids"])
        counts.append(tensors["counts"])
        first.append(counts[-1].cumsum(0) - counts[-1])
        number.append(torch.full_like(ids[-1], shard["number"]))
        row.append(torch.arange(len(ids[-1])))
    order = torch.cat(ids).argsort(stable=True)
    columns = {"example_ids": ids, "shard": number, "row": row, "first": first, "count": counts}
    return {name: torch.cat(parts)[order].contiguous() for name, parts in columns.items()}


def _width(folder: Path, shards: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of one position's fields: the same in all shards."""
    tensors = load_file(folder / shards[0]["file"])
    fields = {k: t for k, t in tensors.items() if k not in _OF_ROWS}
    return sum(t.element_size() * t.shape[1] for t in fields.values())


@dataclass
class Store:
    """Opened by `open_store`. Shards are mapped into memory, each checked at its first use."""

    folder: Path
    manifest: Mapping[str, Any]
    codec: AnyCodec
    index: Mapping[str, np.ndarray]
    _shards: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _views: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index["example_ids"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    def take(self, example_ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B,) -> the codec's fields (P, width), examples in the order asked; counts (B,).

        Raises DataError for an id that was not captured, DamagedError for a shard that is not as
        it was written.
        """
        ids = example_ids.numpy()
        at = np.searchsorted(self.index["example_ids"], ids).clip(max=max(len(self) - 1, 0))
        missing = ids[self.index["example_ids"][at] != ids] if len(self) else ids
        if len(missing):
            raise DataError(
                str(self.folder), f"example {missing[0]} was not captured",
                allowed=f"the {len(self):,} that were", fix="capture these rows too",
            )  # fmt: skip
        numbers, first, counts = (self.index[k][at] for k in ("shard", "first", "count"))
        to = counts.cumsum() - counts
        fields: dict[str, Tensor] = {}
        for number in np.unique(numbers):
            here = numbers == number
            source = torch.from_numpy(_ranges(first[here], counts[here]))
            target = torch.from_numpy(_ranges(to[here], counts[here]))
            for name, stored in self._shard(int(number)).items():
                if name not in fields:
                    fields[name] = stored.new_empty((int(counts.sum()), stored.shape[1]))
                fields[name][target] = stored[source]
        return fields, torch.from_numpy(counts)

    def vectors(self, example_ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B,) -> each layer's vectors (P, D) float32, or the embedding's; counts (B,)."""
        assert isinstance(self.codec, Hidden | Embedding), f"{self.codec.name} are no vectors"
        fields, counts = self.take(example_ids)
        return self.codec.vectors(fields), counts

    def texts(self, example_ids: Tensor) -> list[str]:
        """(B,) -> B completions."""
        assert isinstance(self.codec, Text), f"{self.codec.name} are no text"
        return self.codec.texts(*self.take(example_ids))

    def targets(self, example_ids: Tensor, temperature: float) -> Targets:
        """(B,) -> P positions' targets, one example's behind the other's."""
        assert not isinstance(self.codec, VectorCodec), "these are no distributions"
        fields, _ = self.take(example_ids)
        return self.codec.decode(fields, self.vocab_size, temperature)

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            shard = self.manifest["shards"][number]
            require_sha256(self.folder / shard["file"], shard["sha256"])
            tensors = load_file(self.folder / shard["file"])  # mapped: pages come when touched
            self._shards[number] = {
                name: values for name, values in tensors.items()
                if name not in _OF_ROWS
            }  # fmt: skip
            if "views" in tensors:
                self._views[number] = tensors["views"]
        return self._shards[number]

    def views(self, example_ids: Tensor) -> Tensor:
        """(B,) -> (B, K) float64: what was drawn for the views that the teacher saw.

        Raises DataError where the teacher saw the examples as they are.
        """
        at = np.searchsorted(self.index["example_ids"], example_ids.numpy())
        self.take(example_ids)  # checks the ids, opens their shards
        if not self._views:
            raise DataError(
                str(self.folder), "its teacher saw no augmented views",
                allowed="signals of augmented views", fix="use the examples as they are",
            )  # fmt: skip
        places = zip(self.index["shard"][at], self.index["row"][at], strict=True)
        return torch.stack([self._views[int(shard)][int(row)] for shard, row in places])


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[first[0], first[0] + 1, ... counts[0] of them, first[1], ...]."""
    starts = counts.cumsum() - counts
    within: np.ndarray = np.arange(counts.sum()) - np.repeat(starts, counts)
    return within + np.repeat(first, counts)


def open_store(folder: Path, made_from: Mapping[str, Any] | None = None) -> Store:
    """A finished capture. With `made_from`, that of a capture to be made now: must be the same.

    Raises DataError where it is another's or was never finished, DamagedError where the files are
    not as they were written.
    """
    manifest = read_manifest(folder)
    if made_from is not None:
        refuse_others(folder, manifest["made_from"], made_from)
    require_sha256(folder / INDEX, manifest["index_sha256"])
    index = {name: values.numpy() for name, values in load_file(folder / INDEX).items()}
    return Store(folder, manifest, codec_from_settings(manifest["codec"]), index)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises DataError for what is no finished capture, DamagedError for a torn manifest."""
    manifest = _manifest(folder)
    if manifest is None:
        if (folder / _CAPTURE).exists():
            raise DataError(
                str(folder), "its capture was not finished", allowed="a finished capture",
                fix="run the command that began it again: it goes on where it stopped",
            )  # fmt: skip
        if (folder / INDEX).exists():
            raise damaged(folder / MANIFEST)
        raise DataError(
            str(folder), f"has no {MANIFEST}", allowed="a folder of captured signals",
            fix="look in a run's folder `signals`",
        )  # fmt: skip
    return manifest


def _manifest(folder: Path) -> dict[str, Any] | None:
    manifest = read_index(folder / MANIFEST, {"schema"})
    if manifest is None:
        return None
    if manifest["schema"] != SCHEMA:
        raise DataError(
            str(folder), f"schema {manifest['schema']!r}", allowed=f"schema {SCHEMA}",
            fix="capture again, or use the version of limbeck that wrote it",
        )  # fmt: skip
    return read_index(folder / MANIFEST, {*_ABOUT, *_TOTALS})
