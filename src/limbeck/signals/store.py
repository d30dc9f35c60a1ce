"""A folder of teacher logits that describes itself, read by example id.

    manifest.json          schema, what it was made from, shards in order with their sha256
    shard-00000.safetensors    example_ids (n,) int64, logits (n, C) float32

A shard is written aside, flushed and renamed, then listed in the manifest: a capture that was
killed goes on behind the last listed shard and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.errors import DataError
from limbeck.run import damaged, file_sha256, read_index, replaced, require_sha256, write_json

SCHEMA = 1
_MANIFEST = "manifest.json"
_KEYS = {"schema", "codec", "made_from", "rows", "shards"}


class Writer:
    """Appends shards. On reopening `made_from` is compared, so that a store never mixes two
    teachers, and what is there is checked. Raises DataError, DamagedError."""

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = read_index(folder / _MANIFEST, _KEYS)
        if kept is not None:
            if kept["made_from"] != made_from:
                raise DataError(
                    str(folder), "holds signals of another teacher or other data",
                    allowed="a new folder, or this capture's own",
                    fix="remove the folder or choose another",
                )  # fmt: skip
            for shard in kept["shards"]:  # what goes on behind a damaged one would hide it
                require_sha256(folder / shard["file"], shard["sha256"])
            self.manifest = kept
        else:
            self.manifest = {"schema": SCHEMA, "codec": "dense-float32", "made_from": made_from}
            self.manifest |= {"rows": 0, "shards": []}

    @property
    def rows(self) -> int:
        """Rows that are safely stored."""
        return int(self.manifest["rows"])

    def append(self, example_ids: Tensor, logits: Tensor) -> None:
        """(n,), (n, C): one shard, on disk when this returns."""
        path = self.folder / f"shard-{len(self.manifest['shards']):05d}.safetensors"
        with replaced(path) as aside:
            save_file({"example_ids": example_ids, "logits": logits.float().contiguous()}, aside)
        shard = {"file": path.name, "rows": len(example_ids), "sha256": file_sha256(path)}
        self.manifest["shards"].append(shard)
        self.manifest["rows"] += len(example_ids)
        write_json(self.folder / _MANIFEST, self.manifest)


@dataclass(frozen=True)
class Store:
    """Logits by example id."""

    logits: Tensor  # (N, C) float32
    row_of: Mapping[int, int]

    def take(self, example_ids: Tensor) -> Tensor:
        """(B,) -> (B, C). Raises DataError for an id that was not captured."""
        try:
            rows = [self.row_of[i] for i in example_ids.tolist()]
        except KeyError as error:
            raise DataError(
                "signals", f"example {error} was not captured",
                allowed=f"the {len(self.row_of):,} that were", fix="capture these rows too",
            ) from None  # fmt: skip
        return self.logits[rows]


def open_store(folder: Path) -> Store:
    """Reads all shards. Raises DamagedError where one of the files is not as it was written."""
    manifest = read_index(folder / _MANIFEST, _KEYS)
    if manifest is None:
        raise damaged(folder / _MANIFEST)
    ids, logits = [], []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        require_sha256(path, shard["sha256"])
        tensors = load_file(path)
        ids.append(tensors["example_ids"])
        logits.append(tensors["logits"])
    row_of = {int(i): row for row, i in enumerate(torch.cat(ids).tolist())}
    return Store(torch.cat(logits), row_of)
