"""Unsigned integers in b bits each, in rows of one fixed size.

A row is a little-endian stream of bits: value i fills bits [i b, (i + 1) b), the last byte is
padded with zeros. `numpy.unpackbits(row, bitorder="little")` reads it.

Work is per 64-bit word (pack) or per value (unpack), with a few passes over arrays of that size;
a detour over single bits would move 8 b bytes a value.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

if sys.byteorder != "little":  # words are viewed as bytes below
    raise ImportError("limbeck's signal stores need a little-endian machine")


def bits_for(count: int) -> int:
    """Bits that tell `count` values apart: ceil(log2 count), at least 1."""
    return max(1, (count - 1).bit_length())


def packed_width(num_values: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-num_values * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """(..., K) int64, each in [0, 2^bits) -> (..., packed_width(K, bits)) uint8.

    Values are not checked: one that is too large spills into its neighbours.
    """
    *rows, num_values = values.shape
    width = packed_width(num_values, bits)
    if not values.numel():
        return torch.zeros(*rows, width, dtype=torch.uint8, device=values.device)
    sources, shifts = _words(num_values, _checked(bits))
    flat = torch.nn.functional.pad(values.reshape(-1, num_values), (0, 1))  # a zero to point at
    sources, shifts = sources.to(flat.device), shifts.to(flat.device)
    words = _columns(flat, sources[0]) >> shifts[0]
    for source, shift in zip(sources[1:], shifts[1:], strict=True):
        words |= _columns(flat, source) << shift
    # `cat` makes rows of their own; a view would keep the padding alive
    return torch.cat([words.view(torch.uint8)[:, :width]]).reshape(*rows, width)


def unpack(packed: Tensor, bits: int, num_values: int) -> Tensor:
    """(..., packed_width(K, bits)) uint8 -> (..., K) int64: the inverse of `pack`."""
    *rows, width = packed.shape
    if width != packed_width(num_values, _checked(bits)):
        raise ValueError(f"{num_values} values of {bits} bits fill no row of {width} bytes")
    if not packed.numel():
        return torch.zeros(*rows, num_values, dtype=torch.int64, device=packed.device)
    flat = packed.reshape(-1, width)
    halves = torch.nn.functional.pad(flat, (0, -width % 4 + 4)).view(torch.int32).long()
    halves &= 0xFFFFFFFF
    pairs = halves[:, :-1] | halves[:, 1:] << 32  # 64 bits from every 32nd: hold any value whole
    starts = torch.arange(num_values, device=packed.device) * bits
    values = _columns(pairs, starts // 32)
    values >>= starts % 32
    values &= (1 << bits) - 1
    return values.reshape(*rows, num_values)


def _columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns], in a quarter of its time: `gather` reads no second index."""
    return matrix.gather(1, columns.expand(len(matrix), -1))


def _checked(bits: int) -> int:
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must be 1 to 32, not {bits}")
    return bits


@lru_cache(maxsize=256)
def _words(num_values: int, bits: int) -> tuple[Tensor, Tensor]:
    """Which values go into each 64-bit word, by how much shifted. (S, W), (S, W) int64.

    The first of a word's values may have begun in the word before: it is shifted right, all
    others left. Where a word needs fewer than S values, the source is the zero at `num_values`.
    """
    starts = torch.arange(-(-num_values * bits // 64)) * 64  # (W,) in bits
    sources = starts // bits + torch.arange(64 // bits + 2).unsqueeze(1)
    shifts = sources * bits - starts
    absent = (sources >= num_values) | (shifts >= 64)
    shifts[0].neg_()
    used = ~absent.all(1)
    sources = sources.masked_fill(absent, num_values)[used]
    return sources, shifts.masked_fill(absent, 0)[used]
