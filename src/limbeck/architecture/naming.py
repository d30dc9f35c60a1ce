"""From dimensions that move together to axes with names, in the full model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from limbeck.architecture.axes import Axis, Group, Member, layer_of
from limbeck.architecture.fields import Probe, Prober, Value
from limbeck.architecture.layouts import Part, member_of
from limbeck.architecture.moves import Move
from limbeck.architecture.twins import Dim

Stack = tuple[str, int, int]  # repeated block: its pattern, its layers in full, in the small copy

_OPEN = "not proved yet"
_ORDER = ("hidden", "heads", "queries", "ffn", "layers", "vocab")


@dataclass(frozen=True)
class Spread:
    """A part of the small copy and its dimensions in the full model, with their segments."""

    part: Part
    dims: Mapping[Dim, tuple[int, ...]]


@dataclass(frozen=True)
class _Row:
    """A group to be: how many units, as a count of heads or not."""

    units: int
    counted: bool
    members: tuple[Member, ...]


def place(name: str, stacks: Sequence[Stack]) -> tuple[Stack, int] | None:
    for stack in stacks:
        if at := layer_of(stack[0], name):
            return stack, at[0]
    return None


def width_axes(
    prober: Prober, small: Mapping[str, Value], probe: Probe, move: Move,
    parts: Sequence[Spread], stacks: Sequence[Stack],
) -> list[Axis]:  # fmt: skip
    """The axis of a field's own units and, where blocks of a count were found, the one coupled."""
    position = {name: at for at, name in enumerate(prober.full.shapes)}
    rows = []
    for spread in parts:
        units, counted = _units_in_full(spread.part, small, move)
        members = {d: member_of(move, d, units, s) if units else None
                   for d, s in spread.dims.items() if d in move.widths}  # fmt: skip
        known = [m for m in members.values() if m is not None]
        if len(known) != len(spread.dims):
            return [refused(probe, "its units are others in the full size than in a small copy")]
        known.sort(key=lambda m: (position[m.parameter], m.dim))
        rows.append(_Row(units, counted, tuple(known)))
    seen = {(m.parameter, m.dim) for row in rows for m in row.members}
    if seen != move.widths.keys():
        where = "{} (dimension {})".format(*min(move.widths.keys() - seen))
        return [refused(probe, f"{where} moves with it, but not in the small copy")]
    rows.sort(key=lambda row: (position[row.members[0].parameter], row.members[0].dim))
    own = [row for row in rows if not row.counted]
    heads = [row for row in rows if row.counted]
    fields = move.fields
    if not own or not heads:
        names = fields.all
        return [_axis(prober, names, _size(move, rows, own=bool(own)), rows, stacks, move)]
    main = _axis(prober, fields.main, int(move.values[fields.main[0]]), own, stacks, move)
    count = math.gcd(*(int(move.values[f]) for f in fields.counts))
    inner = _axis(prober, fields.counts, count, heads, stacks, move)
    return [replace(main, coupled={inner.name: main.size // count}), inner]


def _units_in_full(part: Part, small: Mapping[str, Value], move: Move) -> tuple[int, bool]:
    """(units, whether they are a count's): as many times the field as in the small copy."""
    fields = move.fields
    if fields.segments > 1:
        return move.units, False
    for field in fields.counts if part.block > 1 or not _divides(part, small, move) else ():
        if small.get(field, move.values[field]) == part.units:
            return int(move.values[field]), True
    main, value = fields.main[0], move.values[fields.main[0]]
    if type(value) is float:
        return math.gcd(*(move.sizes[d] for d in part.dims if d in move.sizes)), False
    ratio = Fraction(part.units, int(small.get(main, value)))
    units = ratio * int(value)
    return (int(units) if units.denominator == 1 else 0), False


def _divides(part: Part, small: Mapping[str, Value], move: Move) -> bool:
    main = move.fields.main[0]
    return part.units == small.get(main, move.values[main])


def _size(move: Move, rows: Sequence[_Row], *, own: bool) -> int:
    values = [move.values[f] for f in (move.fields.main if own else move.fields.all)]
    if move.fields.segments > 1 or not own:
        whole = math.gcd(*(int(v) for v in values))
        return whole // move.fields.segments
    smallest = min(row.units for row in rows)
    if type(values[0]) is float or smallest >= 4 * values[0]:
        return smallest  # a ratio, such as mlp_ratio=4: sizes are channels
    return int(values[0])


def _axis(
    prober: Prober, fields: Sequence[str], size: int, rows: Sequence[_Row],
    stacks: Sequence[Stack], move: Move,
) -> Axis:  # fmt: skip
    aliases = prober.full.aliases
    homes = [{place(m.parameter, stacks) for m in row.members} for row in rows]
    inside = [len(home) == 1 and None not in home for home in homes]
    name = fields[0]
    if move.fields.segments > 1:
        name = "queries"
    elif all(max(m.block for m in row.members) > 1 for row in rows):
        name = "heads"
    elif any(_spans(home, stacks) for home in homes):
        name = "hidden" if "[" not in name else name
    elif all(inside):
        name = "ffn"
    groups: dict[str, Group] = {}
    for row, home, alone in zip(rows, homes, inside, strict=True):
        at = next(iter(home)) if alone else None
        first = row.members[0]
        if at is not None:
            title = f"{name}.{at[1]}"
        else:
            title = name if home - {None} else f"{name}.{first.parameter.rpartition('.')[0]}"
        if title in groups:
            title = f"{title}.{first.parameter}.{first.dim}"
        members = tuple(
            replace(m, parameter=parameter)
            for m in row.members
            for parameter in (m.parameter, *aliases.get(m.parameter, ()))
        )
        groups[title] = Group(title, row.units, members)
    values = {f: _per_unit(move.values[f], size) for f in fields}
    step = max(1, size // move.units)
    return Axis(
        name=name, fields=values, size=size, groups=tuple(groups.values()), reason=_OPEN,
        granularity=step,
    )  # fmt: skip


def _spans(home: set[tuple[Stack, int] | None], stacks: Sequence[Stack]) -> bool:
    """Whether it runs through all layers of a stack and beyond: a residual stream."""
    layers = Counter(at[0] for at in home if at is not None)
    return len(home) > 1 and any(layers[s] == s[1] for s in stacks)


def _per_unit(value: Value, size: int) -> float:
    return value // size if type(value) is int and value % size == 0 else value / size


def vocab_axis(prober: Prober, probe: Probe) -> Axis | None:
    """The rows that token ids name, with the columns of logits; None for any other table."""
    if not probe.dims & prober.full.words:
        return None
    size, shapes = int(probe.value), prober.full.shapes
    if any(shapes[name][dim] != size for name, dim in probe.dims):
        return None
    members = tuple(
        Member(parameter, dim)
        for name, dim in sorted(probe.dims)
        for parameter in (name, *prober.full.aliases.get(name, ()))
    )
    fields = dict.fromkeys(probe.fields, 1)
    return Axis(name="vocab", fields=fields, size=size, groups=(Group("vocab", size, members),),
                labels=True, reason=_OPEN)  # fmt: skip


def depth_axis(probe: Probe) -> Axis:
    (field,) = probe.fields
    return Axis(
        name="layers", fields={field: 1}, size=int(probe.value), pattern=probe.pattern,
        reason=_OPEN,
    )  # fmt: skip


def refused(probe: Probe, reason: str) -> Axis:
    fields = dict.fromkeys(probe.fields, 1)
    size = int(probe.value) if type(probe.value) is int else 1
    return Axis(name=probe.fields[0], fields=fields, size=size, reason=reason)


def distinct(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """In a fixed order, each with a name of its own: two of a kind are called by their fields."""
    number = Counter(axis.name for axis in axes)
    renamed = {
        id(axis): "+".join(axis.fields) if axis.name == "queries" else next(iter(axis.fields))
        for axis in axes
        if number[axis.name] > 1 and axis.name in _ORDER
        and "num_hidden_layers" not in axis.fields  # of several stacks the one all configs have
    }
    found = []
    for axis in axes:
        new = renamed.get(id(axis), axis.name)
        groups = tuple(
            replace(g, name=new + g.name.removeprefix(axis.name)) for g in axis.groups
        )
        coupled = {
            renamed.get(id(other), other.name): times
            for name, times in axis.coupled.items()
            for other in axes[axes.index(axis) :]
            if other.name == name
        }
        if len(coupled) > 1:
            coupled = dict([next(iter(coupled.items()))])
        found.append(replace(axis, name=new, groups=groups, coupled=coupled))
    rank = {name: at for at, name in enumerate(_ORDER)}
    return tuple(sorted(found, key=lambda axis: rank.get(axis.name, len(rank))))
