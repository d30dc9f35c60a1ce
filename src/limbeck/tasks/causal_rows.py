"""Rows of tokens that are to be predicted: one document each, or several packed into one.

Everything lines up with the logits: `labels[b, t]` is the token that follows position t, and
`mask[b, t]` says whether it counts. The last token of a document predicts nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.tasks.rows import Held
from limbeck.types import Batch


@dataclass(frozen=True)
class Rows(Held):
    """One split. A row's id is its number in the split, stable across epochs."""

    ids: np.ndarray  # (N,) int64
    tokens: tuple[np.ndarray, ...]  # N arrays (T,) int32
    counted: tuple[np.ndarray, ...]  # N arrays (T,) bool: whether the token is to be predicted
    starts: tuple[np.ndarray, ...]  # N arrays: where each document of the row begins; the first 0
    documents: tuple[np.ndarray, ...]  # N arrays: their numbers in the file they came from
    pad_id: int
    layout: str
    num_views = 1
    num_together = 4  # (B, T, V) logits are large

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """None: what is to be predicted are the tokens themselves. (N,) zeros."""
        return np.zeros(len(self), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each row."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

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

    def taken(self, at: np.ndarray) -> Rows:
        return replace(
            self, ids=self.ids[at], tokens=tuple(self.tokens[i] for i in at),
            counted=tuple(self.counted[i] for i in at), starts=tuple(self.starts[i] for i in at),
            documents=tuple(self.documents[i] for i in at),
        )  # fmt: skip

    def prompts(self, first_tokens: int, *, plain: bool) -> list[np.ndarray]:
        """What a model is to go on from: a document's tokens up to each stretch that counts.

        Of a document that counts from its first token on, and of `plain` text always, its
        `first_tokens`. Each prompt ends before its document does.
        """
        found = []
        for tokens, counted, starts in zip(self.tokens, self.counted, self.starts, strict=True):
            for start, end in itertools.pairwise([*starts.tolist(), len(tokens)]):
                own = counted[start:end]
                if plain or own[0]:
                    lengths = [min(first_tokens, end - start - 1)]
                else:
                    lengths = (np.flatnonzero(own[1:] & ~own[:-1]) + 1).tolist()
                found += [tokens[start : start + length] for length in lengths if length]
        return found

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
    def num_positions(self) -> int:
        """That count, of all rows: each wanted token but one that begins a document."""
        found = 0
        for counted, starts in zip(self.counted, self.starts, strict=True):
            found += int(counted.sum()) - int(counted[starts].sum())
        return found


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
