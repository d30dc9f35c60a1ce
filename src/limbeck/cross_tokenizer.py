"""A teacher with another tokenizer: it reads the same texts in tokens of its own.

Student and teacher are held against each other where both have read the same text: before each
token of the student's that begins where one of the teacher's does (`losses.crosstokenizer`), and
at a text's end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from limbeck.device import compute_device
from limbeck.errors import DataError
from limbeck.losses.crosstokenizer import align_spans, span_starts
from limbeck.tasks.causal_rows import Rows
from limbeck.tasks.conversations import Encoder
from limbeck.types import Batch, DenseTargets, Need, Signal

_WHERE = "recipe.distill.divergence"


@dataclass(frozen=True, slots=True)
class _Aligned:
    """A row of the student's: what the teacher reads, and where the two meet."""

    texts: tuple[np.ndarray, ...]  # of each of the row's documents the teacher's tokens
    ours: np.ndarray  # (S,) places in the row, ascending: the logits there are compared
    text: np.ndarray  # (S,) in which of `texts`
    theirs: np.ndarray  # (S,) and at which of its places


class CrossTokenizerTeacher:
    """A live model with its own tokenizer. What it gives are (S, V') logits for `places`."""

    provides = frozenset({Need.LOGITS})

    def __init__(
        self, model: nn.Module, fingerprint: str, tokenizer: PreTrainedTokenizerBase,
        rows: Rows, students: PreTrainedTokenizerBase,
    ) -> None:  # fmt: skip
        """`rows` are the student's. Those whose text its tokenizer does not give back count for the
        hard labels alone: `left_out` documents. Raises DataError where none is left."""
        model.to(compute_device())
        self.model, self.fingerprint = model.eval().requires_grad_(False), fingerprint
        context = getattr(model.config, "max_position_embeddings", None)
        pair = _Pair(students, tokenizer, context)
        self.aligned = {
            int(number): pair.row(rows, at) for at, number in enumerate(rows.ids.tolist())
        }
        self.left_out, self.documents = pair.left_out, pair.documents
        self._pad = pair.theirs.end
        if not any(len(row.ours) for row in self.aligned.values()):
            raise DataError(
                _WHERE, f"none of {pair.documents} texts can be read by both tokenizers",
                allowed="tokenizers that give back what they read", fix="choose another student",
            )  # fmt: skip

    def places(self, batch: Batch) -> Tensor:
        """(B, T) bool: where the teacher's logits belong."""
        found = torch.zeros(batch.mask.shape, dtype=torch.bool)
        for row, number in enumerate(batch.example_ids.tolist()):
            found[row, torch.from_numpy(self.aligned[number].ours)] = True
        return found.to(batch.mask.device)

    @torch.inference_mode()
    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 logits alone
        rows = [self.aligned[number] for number in batch.example_ids.tolist()]
        texts = [text for row in rows for text in row.texts]
        device = next(self.model.parameters()).device
        shape = (len(texts), max(map(len, texts)))
        ids = torch.full(shape, self._pad, dtype=torch.long)
        held = torch.zeros(shape, dtype=torch.long)
        for at, text in enumerate(texts):
            ids[at, : len(text)] = torch.from_numpy(text.astype(np.int64))
            held[at, : len(text)] = 1
        said: Any = self.model(input_ids=ids.to(device), attention_mask=held.to(device))
        before = [0, *itertools.accumulate(len(row.texts) for row in rows)]
        which = [start + row.text for start, row in zip(before, rows, strict=False)]
        sequence = torch.from_numpy(np.concatenate(which))
        place = torch.from_numpy(np.concatenate([row.theirs for row in rows]))
        return Signal(targets=DenseTargets(logits=said.logits[sequence, place].float()))


class _Pair:
    """Two tokenizers, and how many documents they could not agree about."""

    def __init__(
        self, students: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase,
        context: int | None,
    ) -> None:  # fmt: skip
        self.ours = Encoder(students, "text", where="recipe.base.model")
        self.theirs = Encoder(teachers, "text", where="recipe.teacher.model")
        self.context = context
        self.documents = self.left_out = 0

    def row(self, rows: Rows, at: int) -> _Aligned:
        tokens, counted = rows.tokens[at], rows.counted[at]
        texts: list[np.ndarray] = []
        ours, text, theirs = [], [], []
        for start, end in itertools.pairwise([*rows.starts[at].tolist(), len(tokens)]):
            self.documents += 1
            found = self._document(tokens[start:end], counted[start:end])
            if found is None:
                self.left_out += 1
                continue
            ids, mine, yours = found
            keep = counted[start:end][mine + 1]  # the token that is predicted there
            if self.context is not None:
                ids, keep = ids[: self.context], keep & (yours < self.context)
            ours.append(start + mine[keep])
            theirs.append(yours[keep])
            text.append(np.full(int(keep.sum()), len(texts)))
            texts.append(ids)
        if not texts:
            texts = [np.array([self.theirs.end])]  # something to read, of which nothing counts
        none = np.zeros(0, np.int64)
        return _Aligned(
            tuple(texts), *(np.concatenate([none, *part]) for part in (ours, text, theirs))
        )

    def _document(
        self, tokens: np.ndarray, counted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The teacher's tokens, and places in both whose next tokens begin at the same byte; None
        where the student's are not what its tokenizer makes of their text."""
        begins = len(self.ours.begin) if [*tokens[: len(self.ours.begin)]] == self.ours.begin else 0
        ends = int(tokens[-1] == self.ours.end and len(tokens) > begins)
        inside = slice(begins, len(tokens) - ends)
        ids: list[int] = [*self.theirs.begin]
        first = len(ids)
        spelt: list[np.ndarray] = [np.zeros(0, np.int64)] * 2
        bytes_before = 0
        for part in _stretches(tokens[inside], counted[inside]):
            said: Any = self.ours.tokenizer.decode(
                part.tolist(), clean_up_tokenization_spaces=False
            )
            mine, own_ends = _read(self.ours.tokenizer, said, -1)
            if mine != part.tolist():
                return None
            yours, their_ends = _read(self.theirs.tokenizer, said, -2)
            ids += yours
            spelt = [
                np.concatenate([before, 3 * bytes_before + ends_])
                for before, ends_ in zip(spelt, (own_ends, their_ends), strict=True)
            ]
            bytes_before += len(said.encode())
        if not len(spelt[0]) or not len(spelt[1]):
            return None
        spans = align_spans(*(torch.from_numpy(part) for part in spelt))
        places = [span_starts(part).numpy() for part in spans]  # of tokens; logits are one before
        both = [begins + places[0] - 1, first + places[1] - 1]
        if ends:  # behind the last byte both say whether the text is over
            ids.append(self.theirs.end)
            lasts = (begins + len(spelt[0]) - 1, first + len(spelt[1]) - 1)
            both = [np.append(part, last) for part, last in zip(both, lasts, strict=True)]
        seen = (both[0] >= 0) & (both[1] >= 0)
        return np.array(ids), both[0][seen], both[1][seen]


def _stretches(tokens: np.ndarray, counted: np.ndarray) -> Iterator[np.ndarray]:
    """Prompts and completions, which were cut into tokens each for itself."""
    flips = np.flatnonzero(np.diff(counted.astype(np.int8))) + 1
    return (part for part in np.split(tokens, flips) if len(part))


def _read(
    tokenizer: PreTrainedTokenizerBase, text: str, inside: int
) -> tuple[list[int], np.ndarray]:
    """Tokens of a text, and for each three times the byte that it ends at; where that is inside of
    a character, whose bytes nobody knows, `inside` is added: no other tokenizer's end is there."""
    found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    byte = np.cumsum([0, *(len(sign.encode()) for sign in text)])
    spans = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)  # in characters
    at = 3 * byte[spans[:, 1]]
    at[:-1][spans[1:, 0] < spans[:-1, 1]] += inside  # the next begins in the same character
    return found["input_ids"], at
