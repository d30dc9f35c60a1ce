"""Rows of logits in blocks of 128, so that few passes go over a whole vocabulary.

The n largest entries lie in the n blocks with the largest maxima; the entry at which a running
sum passes a target lies in the block at which the sum of blocks passes it. So one reduction per
block replaces a top-k or a cumulative sum over V (on one core at V = 151,936: 20 us a row instead
of 340 and 280), and the exact work is done inside the few blocks that were found.

    P positions      V vocabulary      N blocks      L 128 entries of a block
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from limbeck.errors import DataError

_LENGTH = 128
# Floats in one chunk's working copy. CPU: 8 MiB, four or five of which stay in a shared cache
# while a chunk passes over them several times. GPU: 512 MiB, so that launches do not dominate.
_CHUNK = {"cpu": 2**21, "cuda": 2**27}

Fields = dict[str, Tensor]


def in_chunks(encode: Callable[[Tensor, Tensor], Fields], logits: Tensor, keys: Tensor) -> Fields:
    """Apply `encode` to a few rows at a time: memory beyond (P, V) itself stays flat."""
    if logits.ndim != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"logits must be floats (P, V), not {logits.dtype} {tuple(logits.shape)}")
    if keys.shape != (len(logits), 2) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 (P, 2), not {keys.dtype} {tuple(keys.shape)}")
    rows = max(1, _CHUNK.get(logits.device.type, _CHUNK["cpu"]) // logits.shape[1])
    keys = keys.to(logits.device)
    parts = [encode(logits[at], keys[at]) for at in _slices(len(logits), rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, max(count, 1), size):  # at least one: no rows give empty fields
        yield slice(start, start + size)


def in_blocks(logits: Tensor, keys: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities up to a constant: (logits - the row's largest) / temperature.

    (P, V) -> (P, N, L) float32, a copy padded with -inf, and (P, N) each block's largest.
    Whole blocks keep every row at the same place in a vector register, so a row's bytes do not
    depend on its neighbours. Raises DataError as `check_rows` does.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _LENGTH)
    flat = torch.empty(num_rows, num_blocks * _LENGTH, device=logits.device)
    flat[:, :vocab_size] = logits
    flat[:, vocab_size:] = -torch.inf
    blocks = flat.view(num_rows, num_blocks, _LENGTH)
    maxima = blocks.amax(-1)  # (P, N)
    peaks = maxima.amax(-1)  # (P,)
    check_rows(peaks, keys)
    blocks -= peaks[:, None, None]
    maxima -= peaks[:, None]
    if temperature != 1.0:
        blocks /= temperature
        maxima /= temperature
    return blocks, maxima


def check_rows(peaks: Tensor, keys: Tensor) -> None:
    """Raises DataError where a row's largest logit shows NaN, +inf or nothing but -inf."""
    if not (wrong := ~peaks.isfinite()).any():
        return
    row = int(wrong.nonzero()[0, 0])
    example, position = keys[row].tolist()
    found = {"nan": "NaN", "inf": "+inf", "-inf": "nothing but -inf"}[str(float(peaks[row]))]
    raise DataError(
        "teacher", f"its logits hold {found} at position {position} of example {example}",
        allowed="finite logits, or -inf for entries that are masked",
        fix="compute the teacher in float32 or bfloat16, or remove the example",
    )  # fmt: skip


def largest(blocks: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, descending; equal ones in the order of their ids.

    (P, N, L), (P, N) -> ids (P, count) int64, values (P, count).
    """
    length = blocks.shape[-1]
    nearest = _first(maxima, min(count, maxima.shape[1])).sort(-1).values  # (P, M) block numbers
    candidates = _take(blocks, nearest).flatten(1)  # (P, M L), ascending ids
    found = _first(candidates, count)  # (P, count)
    ids = nearest.gather(1, found // length) * length + found % length
    return ids, candidates.gather(1, found)


def _first(values: Tensor, count: int) -> Tensor:
    """(P, N) float32 -> (P, count): places of the largest, the first place first among equals.

    Half-precision teachers have many equal logits, and topk's choice among them is anyone's:
    value and place go into one integer.
    """
    bits = values.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # ordered as the floats are
    places = torch.arange(values.shape[1], device=values.device)
    return ((ordered << 32) | (values.shape[1] - 1 - places)).topk(count).indices


def find(blocks: Tensor, sums: Tensor, targets: Tensor) -> Tensor:
    """The ids at which the running sum of a row's masses first exceeds the targets.

    (P, N, L) float32 masses >= 0, (P, N) float64 their sums, (P, M) float64 in [0, row's sum)
    -> (P, M) int64. Never an entry without mass, unless the whole row has none (then any id).
    Each interval is as long as the entry's mass to 1e-7 of its block's.
    """
    running = sums.cumsum(-1)  # (P, N)
    targets = torch.minimum(targets, running[:, -1:] * (1 - 2**-52))
    block = torch.searchsorted(running, targets, right=True).clamp_max(sums.shape[1] - 1)
    # what is left within the block; a rounding below zero would find an entry without mass
    targets = (targets - (running - sums).gather(1, block)).clamp_min(0)
    inner = _take(blocks, block).cumsum(-1, dtype=torch.float64)  # (P, M, L)
    # a block's float32 sum may exceed the running one by a rounding
    targets = torch.minimum(targets, inner[..., -1] * (1 - 2**-52)).unsqueeze(-1)
    place = torch.searchsorted(inner, targets, right=True).squeeze(-1)
    return block * blocks.shape[-1] + place.clamp_max(blocks.shape[-1] - 1)


def _take(blocks: Tensor, numbers: Tensor) -> Tensor:
    """(P, N, L), (P, M) -> (P, M, L)."""
    return blocks.gather(1, numbers.unsqueeze(-1).expand(-1, -1, blocks.shape[-1]))
