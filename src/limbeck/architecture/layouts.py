"""How units lie in dimensions: which of a move's dimensions go together, and packed in which way.

What a step of the config adds to a dimension says how many channels a unit owns there; only their
order is open. Plain first, then segments for one size of dimension, then for one kind of module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from limbeck.architecture.axes import Member
from limbeck.architecture.moves import Move
from limbeck.architecture.twins import Bench, Dim, Found, Layout, find_groups

Segments = dict[Dim, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """Dimensions that move together, as `units` units; segments in multiples of a base block."""

    units: int
    dims: Mapping[Dim, tuple[int, ...]]
    block: int = 1  # the smallest a unit owns

    @property
    def names(self) -> frozenset[Dim]:
        return frozenset(self.dims)


def member_of(move: Move, dim: Dim, units: int, segments: Sequence[int]) -> Member | None:
    """None where so many units cannot own the dimension in whole and equal shares."""
    per_step, tail = move.widths[dim]
    width, rest = divmod(per_step * move.units, units)
    block, odd = divmod(width, sum(segments))
    if rest or odd or not block:
        return None
    return Member(dim[0], dim[1], block, tuple(segments), tail)


def find_parts(bench: Bench, move: Move) -> tuple[list[Part], set[Dim]]:
    """The parts of a move's dimensions, and the dimensions that no layout makes free."""
    left = {dim for dim in move.widths if dim[0] in bench.tensors}
    parts: list[Part] = []
    silent: set[Dim] = set()
    for units in move.unit_counts():
        for layout, packed in _layouts(move, left, units):
            found = find_groups(bench, layout, units)
            silent |= found.silent
            for group in _accepted(found, layout, packed):
                parts.append(Part(units, {d: layout[d].segments for d in group},
                                  min(layout[d].block for d in group)))  # fmt: skip
                left -= group
            if not left - silent:
                break
    _house(bench, move, parts, left & silent, left)
    return parts, left


def _accepted(found: Found, layout: Layout, packed: bool) -> Iterator[frozenset[Dim]]:
    """A symmetry of segments alone may be one inside of heads: a plain dimension must be in it.
    One dimension alone makes no unit: something writes it and something reads it."""
    for group in found.groups:
        if len(group) < 2:
            continue
        plain = any(layout[d].segments == (1,) for d in group)
        if plain or (packed and len(group) > 1):
            yield group


def _house(
    bench: Bench, move: Move, parts: list[Part], silent: set[Dim], left: set[Dim]
) -> None:
    """What disturbs nothing goes where its module's weight goes (a key's bias under softmax), or
    else with the largest part of single units (a mask token that no input uses)."""
    for dim in sorted(silent):
        size = bench.tensors[dim[0]].shape[dim[1]]
        homes = [
            (at, part.dims[d])
            for at, part in enumerate(parts)
            for d in part.dims
            if d == (dim[0].rpartition(".")[0] + ".weight", dim[1])
            and bench.tensors[d[0]].shape[d[1]] == size
        ]
        if not homes:
            largest = sorted(enumerate(parts), key=lambda item: -len(item[1].dims))
            homes = [
                (at, segments) for at, part in largest for d, segments in part.dims.items()
                if bench.tensors[d[0]].shape[d[1]] == size
            ]  # fmt: skip
        for at, segments in homes[:1]:
            if member_of(move, dim, parts[at].units, segments):
                dims = {**parts[at].dims, dim: segments}
                parts[at] = Part(parts[at].units, dims, parts[at].block)
                left.discard(dim)


def _layouts(move: Move, left: set[Dim], units: int) -> Iterator[tuple[Layout, bool]]:
    """Layouts of the dimensions still open, worth a try in this order; `left` may shrink."""
    tried: list[Layout] = []
    if units < 2:
        return
    for segments, packed in _choices(move, sorted(left), units):
        members = {d: member_of(move, d, units, segments.get(d, (1,))) for d in sorted(left)}
        layout = {d: m for d, m in members.items() if m is not None}
        if layout and layout not in tried:
            tried.append(layout)
            yield layout, packed


def _choices(move: Move, dims: Sequence[Dim], units: int) -> Iterator[tuple[Segments, bool]]:
    plain = {d: m for d in dims if (m := member_of(move, d, units, (1,)))}
    if not plain:
        return
    if move.fields.segments > 1:  # query heads inside of their key/value group
        equal = (1,) * move.fields.segments
        yield {d: equal for d in plain if plain[d].block % move.fields.segments == 0}, True
        return
    yield {}, False
    base = min(m.block for m in plain.values())
    ways: dict[Dim, list[tuple[int, ...]]] = {}
    for dim, member in plain.items():
        times, rest = divmod(member.block, base)
        ways[dim] = [(1,) * times] if not rest and 1 < times <= 64 else []
        for ratio in move.ratios:  # [q | k | v], `ratio` query heads for a key/value head
            if member.block % (ratio + 2) == 0 and member.block > base:
                ways[dim].append((ratio, 1, 1))
        ways[dim] = list(dict.fromkeys(ways[dim]))
    most = max(map(len, ways.values()))
    sizes = sorted({plain[d].block for d in plain if ways[d]})
    kinds = sorted({_kind(d) for d in plain if ways[d]})
    for at in range(most):
        chosen = {d: w[at] for d, w in ways.items() if len(w) > at}
        yield chosen, False
        for size in sizes if len(sizes) > 1 else ():
            yield {d: w for d, w in chosen.items() if plain[d].block == size}, False
        for kind in kinds if len(kinds) > 1 else ():
            yield {d: w for d, w in chosen.items() if _kind(d) == kind}, False


def _kind(dim: Dim) -> str:
    """The module, in whatever layer."""
    return re.sub(r"\d+", "#", dim[0].rpartition(".")[0])
