"""Find the axes of an architecture from its config alone, with no code per architecture.

Which dimensions a config field sets comes from `fields`, with which others it moves from `moves`,
which dimensions move together from a gradient test (`twins`, `layouts`) on a small copy with
random weights, mapped back to the full model by name and layer. Nothing found here counts as
proved: that is `proof`'s, on the loaded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, layer_of
from limbeck.architecture.fields import Build, Probe, Prober
from limbeck.architecture.layouts import Part, find_parts, member_of
from limbeck.architecture.moves import Fields, Move, hypotheses, measure
from limbeck.architecture.naming import (
    Spread,
    Stack,
    depth_axis,
    distinct,
    place,
    refused,
    vocab_axis,
    width_axes,
)
from limbeck.architecture.small import SmallCopy
from limbeck.architecture.twins import Dim

_TABLE_REASON = "its units are rows of a lookup table, told apart by the input: nothing to permute"

_STAGES_REASON = "what it counts are stages with layers of their own, which differ in size"


@dataclass(frozen=True)
class Found:
    """One hypothesis on the small copy that explains each of its dimensions."""

    probe: Probe
    move: Move
    parts: tuple[Part, ...]


def find_axes(config: PretrainedConfig, build: Build) -> tuple[Axis, ...]:
    """Every axis of the models that `build` makes from configs like this one; none is proved yet.

    `build` must accept changed copies of `config` (fewer layers, a small vocabulary) and give a
    model with logits. Axes that cannot be cut come too, without groups and with the reason.
    Raises `AxisError` where the model cannot be built or fed at all.
    """
    prober = Prober(config, build)
    probes = list(dict.fromkeys(prober.probe(name) for name in prober.fields))
    widths = [p for p in probes if p.kind == "width"]
    depths = [p for p in probes if p.kind == "depth"]
    outer = [p for p in depths if any(layer_of(p.pattern, q.pattern + ".") for q in depths)]
    depths = [p for p in depths if p not in outer]
    for layers in (2, None):  # all layers only where two do not speak for the rest
        small = SmallCopy(prober, probes, layers)
        stacks = [(p.pattern, int(p.value), int(small.values[p.fields[0]])) for p in depths]
        found, reasons = _search(small, widths, probes)
        moves = [measure(prober, one.move.fields) for one in found]
        spread = [[_in_full(p, stacks) for p in one.parts] for one in found]
        if all(
            move is not None and _speaks_for_all(small, move, one, parts)
            for one, move, parts in zip(found, moves, spread, strict=True)
        ):
            break
    axes: list[Axis] = []
    for one, move, parts in zip(found, moves, spread, strict=True):
        flat = [part for several in parts for part in several]
        if move is None:
            axes.append(refused(one.probe, "the full size does not shrink in even steps"))
        else:
            axes += width_axes(prober, small.values, one.probe, move, flat, stacks)
    axes += [refused(p, reason) for p, reason in reasons.items()]
    axes += [depth_axis(p) for p in depths]
    for p in probes:
        if p.kind == "table":
            axes += [vocab_axis(prober, p) or refused(p, _TABLE_REASON)]
    axes += [refused(p, _STAGES_REASON) for p in outer]
    axes += [refused(p, p.reason) for p in probes if p.kind == "refused"]
    return distinct(axes)


def _search(
    small: SmallCopy, widths: Sequence[Probe], probes: Sequence[Probe]
) -> tuple[list[Found], dict[Probe, str]]:
    """What explains each field on the small copy, or why nothing does."""
    silent = [p for p in probes if p.kind == "silent" and type(p.value) is int and p.value > 1]
    counts = [p for p in silent if small.regroups(p)]
    found: list[Found] = []
    reasons: dict[Probe, str] = {}
    for probe in widths:
        if any(set(probe.fields) <= set(one.move.fields.all) for one in found):
            continue
        if all(dim > 1 for _, dim in probe.dims):
            reasons[probe] = "it sets the size of kernels, not how many units there are"
            continue
        one, reason = _explain(small, probe, widths, counts)
        if one is None:
            reasons[probe] = reason
            continue
        found.append(one)
        found += _queries(small, one)
    covered = {f for one in found for f in one.move.fields.main}
    covered |= {f for one in found if not one.move.fields.segments > 1 and _is_joint(one)
                for f in one.move.fields.counts}  # fmt: skip
    reasons = {p: r for p, r in reasons.items() if not set(p.fields) <= covered}
    return found, reasons


def _is_joint(one: Found) -> bool:
    """Counts that move together and nothing else: query heads with their key/value heads."""
    return all(part.units == one.move.units and part.block > 1 for part in one.parts)


def _explain(
    small: SmallCopy, probe: Probe, widths: Sequence[Probe], counts: Sequence[Probe]
) -> tuple[Found | None, str]:
    small_probe = replace(probe, value=small.prober.fields.get(probe.fields[0], probe.value))
    second: Found | None = None
    reason = "no smaller size builds whose dimensions all shrink in even steps"
    for fields in hypotheses(small.prober, small_probe, widths, counts):
        move = measure(small.prober, fields)
        if move is None:
            continue
        parts, left = find_parts(small.bench, move)
        if not left:
            one = Found(probe, move, tuple(parts))
            if _is_joint(one) and _has_smaller_units(small, one):
                reason = f"{', '.join(fields.all)} move together only in units of several"
                continue
            if not _regroups(one, counts, small):
                return one, ""
            second = second or one
            continue
        if fields.all == probe.fields or "dimension" not in reason:
            where = "{} (dimension {})".format(*min(left))
            reason = f"{where} has no layout whose units are interchangeable"
    return second, reason


def _regroups(one: Found, counts: Sequence[Probe], small: SmallCopy) -> bool:
    """Whether its blocks are units of a count that does not move with it: of heads, most likely.
    It is theirs if it changes nothing once they are zero."""
    blocks = [part for part in one.parts if part.block > 1]
    units = {part.units for part in blocks}
    without = {dim[0] for part in blocks for dim in part.dims}
    return any(
        p.value in units and not set(p.fields) & set(one.move.fields.all)
        and not small.regroups(p, without)
        for p in counts
    )  # fmt: skip


def _has_smaller_units(small: SmallCopy, one: Found) -> bool:
    """Whether parts of its blocks are interchangeable too: experts, two for each that is used."""
    for part in one.parts:
        factor = next(f for f in range(2, part.block + 1) if part.block % f == 0)
        units = part.units * factor
        members = {d: member_of(one.move, d, units, s) for d, s in part.dims.items()}
        finer = {d: m for d, m in members.items() if m is not None}
        if len(finer) == len(members) and small.bench.survives(finer, units):
            return True
    return False


def _queries(small: SmallCopy, one: Found) -> list[Found]:
    """Query heads inside of each key/value head's group, where heads were found with these."""
    fields, values = one.move.fields, one.move.values
    if not _is_joint(one) or len(fields.main) != 1 or not fields.counts:
        return []
    groups = one.move.units
    alone = Fields(fields.main, (), groups)
    if values[fields.main[0]] == groups or any(values[f] != groups for f in fields.counts):
        return []
    move = measure(small.prober, alone)
    if move is None:
        return []
    parts, left = find_parts(small.bench, move)
    return [] if left else [Found(one.probe, move, tuple(parts))]


def _in_full(part: Part, stacks: Sequence[Stack]) -> list[Spread]:
    """The same part in the full model: one for each layer if it lies in one, else through all."""
    placed = {d: place(d[0], stacks) for d in part.dims}
    homes = {(p[0], p[1]) for p in placed.values() if p}
    shallow = {s for s in stacks if s[2] < s[1]}
    if not any(stack in shallow for stack, _ in homes):
        return [Spread(part, dict(part.dims))]
    if len(homes) == 1 and all(placed.values()):
        ((stack, layer),) = homes
        if layer > 0:
            return []  # layer 0 speaks for it; whether truly, `_speaks_for_all` looks
        return [
            Spread(part, {_moved(d, stack, i): s for d, s in part.dims.items()})
            for i in range(stack[1])
        ]
    dims: dict[Dim, tuple[int, ...]] = {}
    for dim, at in placed.items():
        if at is None or at[0] not in shallow:
            dims[dim] = part.dims[dim]
        elif at[1] == 0:
            dims |= {_moved(dim, at[0], i): part.dims[dim] for i in range(at[0][1])}
    return [Spread(part, dims)]


def _moved(dim: Dim, stack: Stack, layer: int) -> Dim:
    """The same dimension in another layer."""
    at = layer_of(stack[0], dim[0])
    assert at is not None
    return f"{stack[0].format(layer)}.{at[1]}", dim[1]


def _speaks_for_all(
    small: SmallCopy, move: Move, one: Found, full: Sequence[Sequence[Spread]]
) -> bool:
    """Whether the small copy's parts, spread over all layers, are the small copy's again, and
    leave out nothing of the full model."""
    spread = [frozenset(part.dims) for parts in full for part in parts]
    tensors = small.bench.tensors
    again = {frozenset(d for d in dims if d[0] in tensors) for dims in spread} - {frozenset()}
    complete = frozenset().union(*spread) == move.widths.keys()
    return again == {part.names for part in one.parts} and complete


