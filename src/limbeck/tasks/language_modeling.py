"""Causal language modelling: documents are split, tokenised, laid into rows, and served."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.causal import build_causal, load_causal, read_causal_config, save_causal
from limbeck.errors import DataError, RecipeError, SourceError
from limbeck.fast_tokenizer import tokenizer_fingerprints
from limbeck.judging_language import OfLanguageModel
from limbeck.models import load_tokenizer
from limbeck.run import replaced, write_json
from limbeck.tasks.causal_rows import Rows
from limbeck.tasks.conversations import Encoder
from limbeck.tasks.packing import Piece, packed, windows
from limbeck.tasks.records import Columns, Records, read_records
from limbeck.tasks.rows import token_inputs
from limbeck.tasks.splits import hold_out, limited
from limbeck.tasks.task import SPLITS
from limbeck.types import Input

_TOKEN_BYTES = {"hf": 72, "gguf": 36, "onnx": 0}  # of SmolLM2's 49,152, each with its merge
_LAYER_BYTES = 1_000  # names and shapes


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
    max_validation_documents: int | None = None
    max_test_documents: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class LanguageModeling:
    """Continuing text: a `Task`, once `prepare` has filled its folder with rows too.

    It has no labels: what a model is to predict are the tokens themselves.
    """

    max_tokens: int
    folder: Path | None = None
    vocab_size: int | None = None
    """Where nothing was prepared yet."""

    labels: tuple[str, ...] = ()
    calibrated = False

    @cached_property
    def about(self) -> dict[str, Any]:
        """What `data.json` says."""
        assert self.folder is not None, "nothing was prepared"
        return json.loads((self.folder / "data.json").read_text(encoding="utf-8"))

    def rows(self, split: str) -> Rows:
        assert self.folder is not None, "nothing was prepared"
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

    @property
    def judge(self) -> OfLanguageModel:
        return OfLanguageModel()

    def read_config(self, folder: Path, *, where: str) -> PretrainedConfig:
        """Raises SourceError, and RecipeError for rows that are longer than the model's context."""
        config = read_causal_config(folder, where=where)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and self.max_tokens > context:
            raise RecipeError(
                "recipe.task.max_tokens", f"{self.max_tokens}", fix=f"set it to {context} or less",
                allowed=f"up to {context}, the teacher's context",
            )  # fmt: skip
        return config

    def adapt(self, config: PretrainedConfig, *, where: str) -> None:
        """Nothing: its vocabulary is the teacher's."""

    def own_labels(self, folder: Path, *, where: str) -> tuple[str, ...] | None:  # noqa: ARG002
        return None

    def build(self, config: PretrainedConfig) -> nn.Module:
        return build_causal(config)

    def load(self, folder: Path, *, where: str) -> PreTrainedModel:
        return load_causal(folder, where=where)

    def save(self, model: PreTrainedModel, origin: Path, folder: Path) -> None:
        save_causal(model, load_tokenizer(origin, where=str(origin)), folder)

    def overhead(self, format: str) -> tuple[int, int]:
        tokens = self.about["vocab_size"] if self.folder else self.vocab_size or 0
        return tokens * _TOKEN_BYTES[format.partition("-")[0]] + 4_000, _LAYER_BYTES

    @property
    def input_fields(self) -> tuple[str, ...]:
        return ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")

    def inputs(self, config: PretrainedConfig) -> tuple[Input, ...]:
        return token_inputs(self.max_tokens, config.vocab_size)

    def preprocessing(self, model: Path) -> Mapping[str, Any]:
        tokenizer = load_tokenizer(model, where=str(model))
        found = tokenizer_fingerprints(tokenizer)
        rules = {"max_tokens": self.max_tokens, "rules": found["rules"]}
        return {
            "tokenizer": found["tokenizer"], "chat_template": found["chat_template"],
            "preprocessing": rules | {"layout": self.about["layout"]},
        }  # fmt: skip

    def example(self) -> str:
        """Of the first training row; for its text ask the tokenizer."""
        rows = self.rows("train")
        batch = rows.batch([0])
        return (
            f"{len(rows.tokens[0])} tokens of {len(rows.starts[0])} documents, "
            f"{int(batch.mask.sum())} of them to be predicted"
        )


def shown(rows: Rows, position: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row's text with what is to be predicted in [[double brackets]]: a person sees what is
    being learnt."""
    parts = []
    counted = rows.counted[position].copy()
    counted[rows.starts[position]] = False
    for wanted, group in itertools.groupby(range(len(counted)), key=lambda t: bool(counted[t])):
        text: Any = tokenizer.decode([int(rows.tokens[position][t]) for t in group])
        parts.append(f"[[{text}]]" if wanted else text)
    return "".join(parts)


def prepare(
    data: CausalData, train: Path, test: Path | None, model: Path, folder: Path
) -> None:
    """Read, check, split, tokenise and lay out; write `folder` for `LanguageModeling`.

    Documents of one group stay in one split. Raises DataError for empty data, a prompt that leaves
    no room for its completion, messages that the template refuses; SourceError for a folder `model`
    that holds no tokenizer of the fast kind.
    """
    where = "recipe.teacher.model"
    config = LanguageModeling(data.max_tokens).read_config(model, where=where)
    encoder = Encoder(load_tokenizer(model, where=where), data.columns.kind, where=where)
    records = read_records(train, data.columns, where="recipe.data.train")
    train_at = np.arange(len(records))
    if test is None:
        assert data.test_fraction is not None, "neither a test file nor a share to hold out"
        test_at, train_at = hold_out(
            records.groups, train_at, data.test_fraction, data.seed, "test"
        )
        test_records = records
    else:
        test_records = read_records(test, data.columns, where="recipe.data.test")
        test_at = np.arange(len(test_records))
    validation_at, train_at = hold_out(
        records.groups, train_at, data.validation_fraction, data.seed, "validation"
    )
    train_at = limited(train_at, data.max_train_documents, data.seed)
    validation_at = limited(validation_at, data.max_validation_documents, data.seed)
    test_at = limited(test_at, data.max_test_documents, data.seed)
    chosen = {
        "train": (records, train_at, "recipe.data.train"),
        "validation": (records, validation_at, "recipe.data.train"),
        "test": (test_records, test_at, "recipe.data.train" if test is None else
                 "recipe.data.test"),
    }  # fmt: skip
    laid, cut = {}, {}
    for split in SPLITS:
        source, at, place = chosen[split]
        pieces, cut[split] = pieces_of(data, encoder, source, at, place)
        highest = max(int(piece.tokens.max()) for piece in pieces)
        if highest >= config.vocab_size:
            raise SourceError(
                where, f"its tokenizer gives token {highest}, its model has {config.vocab_size} "
                "embeddings",
                allowed="model and tokenizer that were made for each other",
                fix="save the right tokenizer into the model's folder",
            )  # fmt: skip
        laid[split] = laid_out(data, pieces)
    for split, rows in laid.items():
        with replaced(folder / f"{split}.parquet") as aside:
            pq.write_table(_table(rows), aside)
    about = _about(data, encoder, laid, chosen, cut)
    write_json(folder / "data.json", about | {"vocab_size": config.vocab_size})


def pieces_of(
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


def laid_out(data: CausalData, pieces: list[Piece]) -> list[list[Piece]]:
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
    counted = {
        split: sum(int(piece.counted[1:].sum()) for piece in found)
        for split, found in counts.items()
    }
    twice = len(texts["train"] & texts["test"])
    warnings = []
    if twice:
        warnings.append(f"{twice} documents of the test rows stand word for word in the training "
                        "rows.")  # fmt: skip
    if sum(cut.values()):
        warnings.append(f"{sum(cut.values())} completions were cut to {data.max_tokens} tokens.")
    return {
        "labels": [],
        "warnings": warnings,
        "kind": data.columns.kind,
        "layout": data.layout,
        "max_tokens": data.max_tokens,
        "pad_id": encoder.end if pad is None else int(pad),
        "end_id": encoder.end,
        "rows": {split: len(rows) for split, rows in laid.items()},
        "documents": {split: len(at) for split, (_, at, _) in chosen.items()},
        "tokens": {split: sum(map(len, found)) for split, found in counts.items()},
        "counted": counted,
        "completions_cut": dict(cut),
        "documents_in_train_and_test": twice,
    }
