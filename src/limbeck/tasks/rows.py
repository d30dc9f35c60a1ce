"""What the rows of every task have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np

from limbeck.types import Batch, Input


class Held(ABC):
    """Rows that lie in memory, each with one label and all alike unless told; see `task.Rows`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, positions: Sequence[int]) -> Batch: ...

    @abstractmethod
    def taken(self, at: np.ndarray) -> Self:
        """These rows alone."""

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), np.int64)

    @property
    def num_positions(self) -> int:
        return len(self)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, as they are, in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def sample(self, n: int | None, *, seed: int) -> Self:
        """n rows drawn at random, in file order; all of them where n is None or too large."""
        if n is None or n >= len(self):
            return self
        random = np.random.default_rng((seed, n))
        return self.taken(np.sort(random.permutation(len(self))[:n]))


def token_inputs(max_tokens: int, vocab_size: int) -> tuple[Input, ...]:
    """Token ids and which of them are no padding, (B, T) each."""
    mask = Input(name="attention_mask", dims=(max_tokens,), free=("tokens",), dtype="int64")
    return replace(mask, name="input_ids", below=vocab_size), mask
