"""Text classification: rows of text are split, tokenised once, and served as padded batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from limbeck import models
from limbeck.errors import SourceError
from limbeck.export.folder import save_model, save_tokenizer
from limbeck.fast_tokenizer import tokenizer_fingerprints
from limbeck.judging import OfClassifier
from limbeck.recipe import Recipe
from limbeck.recipe_task import TextTask
from limbeck.run import replaced, write_json
from limbeck.tasks.rows import Held, token_inputs
from limbeck.tasks.splits import divided
from limbeck.tasks.tables import read_table
from limbeck.tasks.task import Outline
from limbeck.types import Batch, Input

_CHARACTERS_PER_TOKEN = 16  # more than words have; a text of longer ones is tokenised whole
_OVERHEAD = {  # tokenizer or graph, and what a layer adds
    "hf": (740_000, 2_000), "onnx-fp32": (250_000, 20_000), "onnx-int8": (250_000, 45_000),
}  # fmt: skip


@dataclass(frozen=True)
class Rows(Held):
    """One split. A row's id is its line in the file it came from, stable across epochs."""

    ids: np.ndarray  # (N,) int64
    labels: np.ndarray  # (N,) int64
    tokens: tuple[np.ndarray, ...]  # N arrays of token ids, int32, cut to max_tokens
    texts: tuple[str, ...]  # what those tokens cover
    pad_id: int
    num_views = 1
    num_together = 32

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens in self.tokens])

    def batch(self, positions: Sequence[int]) -> Batch:
        """Padded on the right to the longest; (B, T)."""
        longest = max(len(self.tokens[i]) for i in positions)
        ids = torch.full((len(positions), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(positions), longest), dtype=torch.long)
        for row, i in enumerate(positions):
            length = len(self.tokens[i])
            ids[row, :length] = torch.from_numpy(self.tokens[i].astype(np.int64))
            mask[row, :length] = 1
        at = np.asarray(positions)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            labels=torch.from_numpy(self.labels[at]),
            mask=torch.ones(len(positions), dtype=torch.bool),
            example_ids=torch.from_numpy(self.ids[at]),
        )

    def taken(self, at: np.ndarray) -> Rows:
        tokens, texts = tuple(self.tokens[i] for i in at), tuple(self.texts[i] for i in at)
        return Rows(self.ids[at], self.labels[at], tokens, texts, self.pad_id)


@dataclass(frozen=True)
class TextClassification:
    """Prepared data in a folder: one Parquet file per split. See `tasks.task.Task`."""

    labels: tuple[str, ...]
    max_tokens: int
    folder: Path | None = None
    pad_id: int = 0
    calibrated = False

    def rows(self, split: str) -> Rows:
        assert self.folder is not None
        table = pq.read_table(self.folder / f"{split}.parquet")
        tokens = table["tokens"].combine_chunks()
        flat, ends = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        return Rows(
            ids=table["id"].to_numpy(),
            labels=table["label"].to_numpy(),
            tokens=tuple(flat[a:b] for a, b in itertools.pairwise(ends)),
            texts=tuple(table["text"].to_pylist()),
            pad_id=self.pad_id,
        )

    @property
    def judge(self) -> OfClassifier:
        return OfClassifier(self.labels)

    def read_config(self, folder: Path, *, where: str) -> PretrainedConfig:
        config = models.read_config(folder, where=where)
        models.check_length(config, self.max_tokens)
        models.label_config(config, self.labels)
        return config

    def adapt(self, config: PretrainedConfig, *, where: str) -> None:  # noqa: ARG002 any is fine
        models.label_config(config, self.labels)

    def own_labels(self, folder: Path, *, where: str) -> tuple[str, ...] | None:
        return models.head_labels(folder, where=where)

    def build(self, config: PretrainedConfig) -> nn.Module:
        return models.build_classifier(config)

    def load(self, folder: Path, *, where: str) -> PreTrainedModel:
        return models.load_classifier(folder, self.labels, where=where)

    def save(self, model: PreTrainedModel, origin: Path, folder: Path) -> None:
        save_model(model, folder, labels=self.labels)
        save_tokenizer(origin, folder, max_tokens=self.max_tokens)

    def overhead(self, format: str) -> tuple[int, int]:
        return _OVERHEAD[format]

    @property
    def input_fields(self) -> tuple[str, ...]:
        return ("vocab_size", "pad_token_id")

    def inputs(self, config: PretrainedConfig) -> tuple[Input, ...]:
        return token_inputs(self.max_tokens, config.vocab_size)

    def preprocessing(self, model: Path) -> Mapping[str, Any]:
        """The tokenizer counts by token identity: another with as many tokens, or one with the
        same tokens at other ids, is another. So does how it cuts text into words."""
        found = tokenizer_fingerprints(models.load_tokenizer(model, where=str(model)))
        return {
            "tokenizer": found["tokenizer"],
            "chat_template": found["chat_template"],
            "preprocessing": {"max_tokens": self.max_tokens, "rules": found["rules"]},
        }

    def example(self) -> str:
        rows = self.rows("train")
        label = self.labels[rows.labels[0]]
        return f"{len(rows.tokens[0])} tokens, label {label!r}: {rows.texts[0]}"


def open_task(recipe: Recipe, folder: Path) -> TextClassification:
    assert isinstance(recipe.task, TextTask)
    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return TextClassification(
        tuple(about["labels"]), recipe.task.max_tokens, folder, about["pad_id"]
    )


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:  # noqa: ARG001 for any alike
    assert isinstance(recipe.task, TextTask)
    table = read_table(train, recipe.data, where="recipe.data.train")
    task = TextClassification(tuple(sorted({*table.labels})), recipe.task.max_tokens)
    return Outline(task=task, num_rows=len(table.texts), num_classes=len(task.labels))


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:
    """Read, check, split and tokenise; write `folder` for `open_task`.

    Raises DataError for empty data, too few labels, or test labels that training never shows;
    SourceError for a folder `model` that holds no text model with its tokenizer.
    """
    data = recipe.data
    assert isinstance(recipe.task, TextTask)
    table = read_table(train, data, where="recipe.data.train")
    test_table = table if test is None else read_table(test, data, where="recipe.data.test")
    labels, (train_at, validation_at, test_at) = divided(
        recipe, table.labels, table.groups, None if test is None else test_table.labels
    )
    shared = len({table.texts[i] for i in train_at} & {test_table.texts[i] for i in test_at})

    where = "recipe.teacher.model"
    config = models.read_config(model, where=where)
    models.check_length(config, recipe.task.max_tokens)
    tokenizer = models.load_tokenizer(model, where=where)
    own = models.head_labels(model, where=where)
    if own is not None and sorted(own) == labels:
        labels = list(own)  # in the order that the head has learnt
    for split, source, at in (
        ("train", table, train_at),
        ("validation", table, validation_at),
        ("test", test_table, test_at),
    ):
        texts = [source.texts[i] for i in at]
        tokens, cut = _encode(tokenizer, texts, recipe.task.max_tokens)
        _check_vocabulary(tokens, config.vocab_size, where)
        columns = {
            "id": pa.array(at, pa.int64()),
            "label": pa.array([labels.index(source.labels[i]) for i in at], pa.int64()),
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "text": pa.array(cut, pa.string()),
        }
        with replaced(folder / f"{split}.parquet") as aside:
            pq.write_table(pa.table(columns), aside)
    about = {
        "labels": labels,
        "pad_id": tokenizer.pad_token_id or 0,
        "rows": {"train": len(train_at), "validation": len(validation_at), "test": len(test_at)},
        "texts_in_train_and_test": shared,
        "warnings": [
            f"{shared} texts of the test rows stand word for word in the training rows."
        ] * bool(shared),
    }
    write_json(folder / "data.json", about)


def _check_vocabulary(tokens: Sequence[Sequence[int]], vocab_size: int, where: str) -> None:
    highest = max(max(ids, default=0) for ids in tokens)
    if highest >= vocab_size:
        raise SourceError(
            where, f"its tokenizer gives token {highest}, its model has {vocab_size} embeddings",
            allowed="model and tokenizer that were made for each other",
            fix="save the right tokenizer into the model's folder",
        )  # fmt: skip


def _encode(
    tokenizer: Any, texts: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], list[str]]:
    """Token ids and the stretch of text that they cover.

    Of a long text only the first words are tokenised, where that is as good: the tokenizer never
    joins words, and those words fill `max_tokens`. (20 Newsgroups, 24 tokens: 2 s instead of 13.)
    """
    heads = [*texts]
    if _keeps_words_apart(tokenizer):
        heads = [_first_words(text, _CHARACTERS_PER_TOKEN * max_tokens) for text in texts]
    tokens, cut = _encode_whole(tokenizer, heads, max_tokens)
    short = [
        i
        for i, (head, text) in enumerate(zip(heads, texts, strict=True))
        if len(head) < len(text) and len(tokens[i]) < max_tokens
    ]
    again = _encode_whole(tokenizer, [texts[i] for i in short], max_tokens)
    for i, ids, text in zip(short, *again, strict=True):
        tokens[i], cut[i] = ids, text
    return tokens, cut


def _keeps_words_apart(tokenizer: Any) -> bool:
    split = tokenizer.backend_tokenizer.pre_tokenizer
    return split is not None and len(split.pre_tokenize_str("one two")) > 1


def _first_words(text: str, num_characters: int) -> str:
    """The whole words of the beginning; all of a text that has no more."""
    if len(text) <= num_characters:
        return text
    words = text[:num_characters].rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else text


def _encode_whole(
    tokenizer: Any, texts: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], list[str]]:
    tokens: list[list[int]] = []
    cut: list[str] = []
    for start in range(0, len(texts), 1000):
        part = list(texts[start : start + 1000])
        encoded = tokenizer(
            part, truncation=True, max_length=max_tokens, return_offsets_mapping=True
        )
        for text, ids, offsets in zip(
            part, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            tokens.append(ids)
            cut.append(text[: max((end for _, end in offsets), default=0)])
    return tokens, cut
