"""Tokenised documents into rows of at most so many tokens."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a window of a long one."""

    document: int  # its number in the file it came from
    tokens: np.ndarray  # (T,) int32
    counted: np.ndarray  # (T,) bool: True where the token is one to be predicted

    def __len__(self) -> int:
        return len(self.tokens)


def windows(piece: Piece, max_tokens: int) -> Iterator[Piece]:
    """The document in stretches of at most `max_tokens`, each token counted once.

    A window begins with the last token of the one before, from which its first new token is
    predicted. A last window without a token to predict is left out.
    """
    for start in range(0, max(1, len(piece) - 1), max_tokens - 1):
        part = slice(start, start + max_tokens)
        yield Piece(piece.document, piece.tokens[part], piece.counted[part])


def packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Which pieces share a row: the longest first, each where the least room is left over.

    (Best fit decreasing: Ding et al. 2024, 2404.10830.) Rows come in the order of their first
    piece, pieces in theirs. No length may exceed `max_tokens`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that are left, row), ascending
    for at in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[at], -1))
        if place == len(room):
            rows.append([at])
            left, row = max_tokens, len(rows) - 1
        else:
            left, row = room.pop(place)
            rows[row].append(at)
        bisect.insort(room, (left - lengths[at], row))
    return sorted(sorted(row) for row in rows)
