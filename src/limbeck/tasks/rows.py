"""What the rows of every task have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from limbeck.types import Batch, Input

if TYPE_CHECKING:
    from limbeck.tasks.task import Rows


def in_order(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All rows once, as they are."""
    for start in range(0, len(rows), batch_size):
        yield rows.batch(range(start, min(start + batch_size, len(rows))))


def some_of(count: int, n: int, *, seed: int) -> np.ndarray:
    """(n,) of `count` rows, drawn at random, ascending."""
    return np.sort(np.random.default_rng((seed, n)).permutation(count)[:n])


def token_inputs(max_tokens: int, vocab_size: int) -> tuple[Input, ...]:
    """Token ids and which of them are no padding, (B, T) each."""
    mask = Input(name="attention_mask", dims=(max_tokens,), free=("tokens",), dtype="int64")
    return replace(mask, name="input_ids", below=vocab_size), mask
