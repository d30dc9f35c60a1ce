"""Causal language modelling: documents are split, tokenised, laid into rows, and served as batches.

Everything lines up with the logits: `labels[b, t]` is the token that follows position t, and
`mask[b, t]` says whether it counts. The last token of a document predicts nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from limbeck.errors import DataError, SourceError
from limbeck.models import load_tokenizer
from limbeck.run import replaced, write_json
from limbeck.tasks.conversations import Encoder
from limbeck.tasks.packing import Piece, packed, windows
from limbeck.tasks.records import Columns, Records, read_records
from limbeck.tasks.tables import Table
from limbeck.tasks.text_classification import SPLITS, _sample, _split
from limbeck.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalData:
    """How documents become rows."""

    columns: Columns
    max_tokens: int
    """Of a row. Longer texts go on in the next one; a longer completion is cut at its end."""
    layout: Literal["pack", "pad"] = "pack"
    """Several documents in a row, which do not see each other; or one in each."""
    learn: Literal["answer", "all"] = "answer"
    """Which tokens are to be predicted: completions and the assistant's words, or all."""
    validation_fraction: float = 0.1
    test_fraction: float | None = None
    max_train_documents: int | None = None
    max_test_documents: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Rows:
    """One split. A row's id is its number in the split, stable across epochs."""

    ids: np.ndarray  # (N,) int64
    tokens: tuple[np.ndarray, ...]  # N arrays (T,) int32
    counted: tuple[np.ndarray, ...]  # N arrays (T,) bool: whether the token is to be predicted
    starts: tuple[np.ndarray, ...]  # N arrays: where each document of the row begins; the first 0
    documents: tuple[np.ndarray, ...]  # N arrays: their numbers in the file they came from
    pad_id: int
    layout: str

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, positions: Sequence[int]) -> Batch:
        """Padded on the right to the longest; (B, T).

        Packed rows have `position_ids` that begin anew with each document and no
        `attention_mask`: transformers (masking_utils) then keeps documents apart, unless the model
        makes a cache. `sees_other_documents` finds out.
        """
        longest = max(len(self.tokens[i]) for i in positions)
        shape = (len(positions), longest)
        ids = torch.full(shape, self.pad_id, dtype=torch.long)
        labels = torch.full(shape, self.pad_id, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        held = torch.zeros(shape, dtype=torch.long)
        places = torch.zeros(shape, dtype=torch.long)
        for row, i in enumerate(positions):
            length = len(self.tokens[i])
            tokens = torch.from_numpy(self.tokens[i].astype(np.int64))
            ids[row, :length] = tokens
            labels[row, : length - 1] = tokens[1:]
            follows = self.counted[i].copy()
            follows[self.starts[i]] = False  # what begins a document follows from nothing
            mask[row, : length - 1] = torch.from_numpy(follows[1:])
            held[row, :length] = 1
            for start, end in itertools.pairwise([*self.starts[i].tolist(), length, longest]):
                places[row, start:end] = torch.arange(end - start)
        inputs = {"input_ids": ids}
        inputs |= {"position_ids": places} if self.layout == "pack" else {"attention_mask": held}
        at = np.asarray(positions)
        return Batch(
            inputs=inputs, labels=labels, mask=mask, example_ids=torch.from_numpy(self.ids[at])
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def sample(self, n: int | None, *, seed: int) -> Rows:
        """n rows drawn at random, in order; all of them where n is None or too large."""
        if n is None or n >= len(self):
            return self
        at = np.sort(np.random.default_rng((seed, n)).permutation(len(self))[:n])
        return replace(
            self, ids=self.ids[at], tokens=tuple(self.tokens[i] for i in at),
            counted=tuple(self.counted[i] for i in at), starts=tuple(self.starts[i] for i in at),
            documents=tuple(self.documents[i] for i in at),
        )  # fmt: skip

    def documents_at(self, positions: Sequence[int]) -> Tensor:
        """(B, T) int64: the number of the document that holds each token of the batch; -1: none."""
        longest = max(len(self.tokens[i]) for i in positions)
        found = torch.full((len(positions), longest), -1, dtype=torch.long)
        for row, i in enumerate(positions):
            ends = [*self.starts[i].tolist(), len(self.tokens[i])]
            for number, (start, end) in zip(
                self.documents[i].tolist(), itertools.pairwise(ends), strict=True
            ):
                found[row, start:end] = number
        return found

    @property
    def num_counted(self) -> int:
        """Positions that count, of all rows."""
        return sum(int(batch.mask.sum()) for batch in self.batches(64))


@dataclass(frozen=True)
class LanguageModeling:
    """Prepared data in a folder: one Parquet file per split and `data.json`."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "data.json").read_text(encoding="utf-8"))

    def rows(self, split: str) -> Rows:
        table = pq.read_table(self.folder / f"{split}.parquet")
        columns = {}
        for name in ("tokens", "counted", "starts", "documents"):
            column = table[name].combine_chunks()
            flat = column.values.to_numpy(zero_copy_only=False)
            ends = column.offsets.to_numpy()
            columns[name] = tuple(flat[a:b] for a, b in itertools.pairwise(ends))
        return Rows(
            ids=np.arange(len(table)), **columns, pad_id=self.about["pad_id"],
            layout=self.about["layout"],
        )  # fmt: skip


def prepare(
    data: CausalData, train: Path, test: Path | None, model: Path, folder: Path
) -> None:
    """Read, check, split, tokenise and lay out; write `folder` for `LanguageModeling`.

    Documents of one group stay in one split. Raises DataError for empty data, a prompt that leaves
    no room for its completion, messages that the template refuses; SourceError for a folder `model`
    that holds no tokenizer of the fast kind.
    """
    where = "recipe.teacher.model"
    encoder = Encoder(load_tokenizer(model, where=where), data.columns.kind, where=where)
    records = read_records(train, data.columns, where="recipe.data.train")
    train_at = np.arange(len(records))
    if test is None:
        assert data.test_fraction is not None, "neither a test file nor a share to hold out"
        test_at, train_at = _held_out(records, train_at, data.test_fraction, data.seed, "test")
        test_records = records
    else:
        test_records = read_records(test, data.columns, where="recipe.data.test")
        test_at = np.arange(len(test_records))
    validation_at, train_at = _held_out(
        records, train_at, data.validation_fraction, data.seed, "validation"
    )
    train_at = _sample(train_at, data.max_train_documents, data.seed)
    test_at = _sample(test_at, data.max_test_documents, data.seed)
    chosen = {
        "train": (records, train_at, "recipe.data.train"),
        "validation": (records, validation_at, "recipe.data.train"),
        "test": (test_records, test_at, "recipe.data.train" if test is None else
                 "recipe.data.test"),
    }  # fmt: skip
    size = json.loads((model / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    laid, cut = {}, {}
    for split in SPLITS:
        source, at, place = chosen[split]
        pieces, cut[split] = _pieces(data, encoder, source, at, place)
        highest = max(int(piece.tokens.max()) for piece in pieces)
        if isinstance(size, int) and highest >= size:
            raise SourceError(
                where, f"its tokenizer gives token {highest}, its model has {size} embeddings",
                allowed="model and tokenizer that were made for each other",
                fix="save the right tokenizer into the model's folder",
            )  # fmt: skip
        laid[split] = _lay_out(data, pieces)
    for split, rows in laid.items():
        with replaced(folder / f"{split}.parquet") as aside:
            pq.write_table(_table(rows), aside)
    write_json(folder / "data.json", _about(data, encoder, laid, chosen, cut))


def _held_out(
    records: Records, at: np.ndarray, fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    return _split(Table([], [], records.groups), at, fraction, seed, purpose)


def _pieces(
    data: CausalData, encoder: Encoder, records: Records, at: np.ndarray, where: str
) -> tuple[list[Piece], int]:
    """The split's documents, none longer than a row, and how many completions were cut."""
    found: list[Piece] = []
    cut = 0
    for i in at.tolist():
        here = f"{where}, row {i + 1}"
        piece = encoder(records.values[i], i, here)
        if data.learn == "all":
            piece = Piece(i, piece.tokens, np.ones(len(piece), bool))
        if data.columns.kind == "text":
            found += windows(piece, data.max_tokens)
            continue
        first = int(piece.counted[1:].argmax()) + 1 if piece.counted[1:].any() else len(piece)
        if first >= data.max_tokens:
            raise DataError(
                here, f"{first} tokens stand before the first that is to be learnt",
                allowed=f"fewer than {data.max_tokens}, the tokens of a row",
                fix="shorten or remove the row, or set more tokens",
            )  # fmt: skip
        cut += len(piece) > data.max_tokens
        part = slice(data.max_tokens)
        found.append(Piece(i, piece.tokens[part], piece.counted[part]))
    return found, cut


def _lay_out(data: CausalData, pieces: list[Piece]) -> list[list[Piece]]:
    if data.layout == "pad":
        return [[piece] for piece in pieces]
    rows = packed([len(piece) for piece in pieces], data.max_tokens)
    return [[pieces[i] for i in row] for row in rows]


def _table(rows: list[list[Piece]]) -> pa.Table:
    starts = [
        list(itertools.accumulate((len(piece) for piece in row[:-1]), initial=0)) for row in rows
    ]
    tokens = [np.concatenate([piece.tokens for piece in row]) for row in rows]
    counted = [np.concatenate([piece.counted for piece in row]) for row in rows]
    documents = [[piece.document for piece in row] for row in rows]
    return pa.table(
        {
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "counted": pa.array(counted, pa.list_(pa.bool_())),
            "starts": pa.array(starts, pa.list_(pa.int32())),
            "documents": pa.array(documents, pa.list_(pa.int64())),
        }
    )


def _about(
    data: CausalData, encoder: Encoder, laid: Mapping[str, list[list[Piece]]],
    chosen: Mapping[str, tuple[Records, np.ndarray, str]], cut: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    texts = {
        split: {json.dumps(source.values[i]) for i in at.tolist()}
        for split, (source, at, _) in chosen.items()
    }
    pad: Any = encoder.tokenizer.pad_token_id
    counts = {
        split: [piece for row in rows for piece in row] for split, rows in laid.items()
    }  # fmt: skip
    return {
        "kind": data.columns.kind,
        "layout": data.layout,
        "max_tokens": data.max_tokens,
        "pad_id": encoder.end if pad is None else int(pad),
        "end_id": encoder.end,
        "rows": {split: len(rows) for split, rows in laid.items()},
        "documents": {split: len(at) for split, (_, at, _) in chosen.items()},
        "tokens": {split: sum(map(len, found)) for split, found in counts.items()},
        "counted": {
            split: sum(int(piece.counted[1:].sum()) for piece in found)
            for split, found in counts.items()
        },
        "completions_cut": dict(cut),
        "documents_in_train_and_test": len(texts["train"] & texts["test"]),
    }


@torch.no_grad()
def sees_other_documents(model: nn.Module, rows: Rows) -> bool:
    """Whether another first document in a packed row changes what the model says of the second.

    False for rows that hold no second document. The model is asked twice.
    """
    at = next((i for i, starts in enumerate(rows.starts) if len(starts) > 1), None)
    if at is None:
        return False
    inputs = dict(rows.batch([at]).inputs)
    first, second = int(rows.starts[at][1]), slice(int(rows.starts[at][1]), len(rows.tokens[at]))
    before = model(**inputs).logits[0, second]
    other = inputs["input_ids"].clone()
    other[0, :first] = other[0, :first].roll(1) if first > 1 else other[0, second][:1]
    other[0, 0] = other[0, second][0]
    after = model(**{**inputs, "input_ids": other}).logits[0, second]
    return bool((before - after).abs().max() > 1e-4 * before.abs().max())
