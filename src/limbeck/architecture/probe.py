"""Find the axes of an architecture from its config alone, with no code per architecture.

Which dimensions a config field sets comes from `fields`, which of them move together from a
gradient test (`twins`) on a small copy with random weights, mapped back to the full model by name
and layer. Nothing found here counts as proved: that is `proof`'s, on the loaded model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group, Member, layer_of
from limbeck.architecture.fields import Build, Probe, Prober, changed
from limbeck.architecture.twins import Bench, Dim, find_groups, logits_of
from limbeck.errors import AxisError

_log = logging.getLogger(__name__)
_BUDGET = 1_500_000  # parameters of the small copy: a float64 backward takes some 20 ms
_TABLE = 64  # rows left of a long lookup table in the small copy
_SEED = 0


def example_inputs(
    model: nn.Module, config: PretrainedConfig, seed: int = _SEED
) -> dict[str, Tensor]:
    """Two random examples for `model.main_input_name`."""
    random = torch.Generator().manual_seed(seed)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        special = [v for k, v in config.to_dict().items() if k.endswith("_token_id")]
        low = 1 + max((v for v in special if type(v) is int and v < 16), default=0)
        ids = torch.randint(
            min(low, config.vocab_size - 1), config.vocab_size, (2, 7), generator=random
        )
        return {name: ids}
    if name == "pixel_values" and isinstance(config.image_size, int):
        size = config.image_size
        return {name: torch.randn(2, config.num_channels, size, size, generator=random)}
    raise AxisError("model", f"reads {name!r}", allowed="input_ids or pixel_values")


class SmallCopy:
    """The same architecture, shallow and (if need be) narrow: what the gradient test runs on."""

    def __init__(self, prober: Prober, probes: Sequence[Probe], layers: int | None) -> None:
        self.prober = prober
        values = {f: p.value for p in probes for f in p.fields}
        for p in probes:
            if p.kind == "depth" and layers is not None:
                values[p.fields[0]] = min(p.value, layers)
            if p.kind == "table" and p.value > 1024:
                top = max(
                    (
                        v
                        for k, v in prober.config.to_dict().items()
                        if k.endswith("_token_id") and type(v) is int
                    ),
                    default=0,
                )
                values[p.fields[0]] = min(p.value, _TABLE + top + 1)
        self.values = self._narrow(values, probes)
        self.config = changed(prober.config, self.values)

    def _narrow(self, values: dict[str, int], probes: Sequence[Probe]) -> dict[str, int]:
        widths = {f: p.value for p in probes if p.kind == "width" for f in p.fields}
        divides = {
            p.fields[0]: p.value
            for p in probes
            if p.kind == "silent" and any(v % p.value == 0 for v in widths.values())
        }
        best, shrink = values, 1
        while (size := self.prober.survey(best)) is None or size.parameters > _BUDGET:
            shrink *= 2
            even = {f: v // shrink for f, v in (widths | divides).items() if v % shrink == 0}
            smaller = best | {f: v for f, v in even.items() if v >= 2}
            if not even or self.prober.survey(smaller) is None:
                break
            best = smaller
        return best

    def build(self, values: Mapping[str, int] | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
            torch.manual_seed(_SEED)
            return self.prober.build(changed(self.config, values or {})).double().eval()

    def regroups(self, probe: Probe, bench: Bench) -> bool:
        """Whether a field that changes no shape changes the result: a count of heads does."""
        field, value = probe.fields[0], self.values[probe.fields[0]]
        for other in dict.fromkeys((1, value // 2, value - 1)):
            try:
                twin = self.build({field: other})
                twin.load_state_dict(bench.model.state_dict())
                with torch.no_grad():
                    a, b = (logits_of(m(**bench.inputs)) for m in (bench.model, twin))
                return a.shape == b.shape and not torch.allclose(a, b, rtol=1e-6, atol=0)
            except Exception as error:  # any way to say no, as in Prober.survey
                _log.debug("%s=%d does not run: %s", field, other, error)
        return False


@dataclass(frozen=True)
class Part:
    """Dimensions that move together, as blocks whose number is the value of `field`."""

    field: str
    dims: frozenset[Dim]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.dims}


Stack = tuple[str, int, int]  # repeated block: its pattern, its layers in full, in the small copy

_OPEN = "not proved yet"
_ORDER = ("hidden", "heads", "ffn", "layers")
_TABLE_REASON = "its units are rows of a lookup table, told apart by the input: nothing to permute"


def find_axes(config: PretrainedConfig, build: Build) -> tuple[Axis, ...]:
    """Every axis of the models that `build` makes from configs like this one; none is proved yet.

    `build` must accept changed copies of `config` (fewer layers, a small vocabulary) and give a
    model with logits. Axes that cannot be cut come too, without groups and with the reason.
    Raises `AxisError` where the model cannot be built or fed at all.
    """
    prober = Prober(config, build)
    probes = list(dict.fromkeys(prober.probe(name) for name in prober.fields))
    widths = [p for p in probes if p.kind == "width"]
    for layers in (2, None):  # all layers only where two do not speak for the rest
        small = SmallCopy(prober, probes, layers)
        stacks = [(p.pattern, p.value, small.values[p.fields[0]]) for p in probes if p.pattern]
        bench = Bench(small.build(), example_inputs(small.build(), small.config))
        silent = [p for p in probes if p.kind == "silent" and p.value > 1]
        regroup = [p for p in silent if small.regroups(p, bench)]
        found = {p: _parts(bench, small, p, regroup) for p in widths}
        spread = {p: [_in_full(part, stacks) for part in found[p]] for p in widths}
        if all(_speaks_for_all(bench, p, found[p], spread[p]) for p in widths):
            break
    axes = []
    for p in widths:
        axes += _width_axes(prober, p, [q for parts in spread[p] for q in parts], stacks)
    depths = [p for p in probes if p.kind == "depth"]
    axes += [_depth_axis(p, first=p is depths[0]) for p in depths]
    axes += [_refused(p, _TABLE_REASON) for p in probes if p.kind == "table"]
    axes += [_refused(p, p.reason) for p in probes if p.kind == "refused"]
    rank = {name: at for at, name in enumerate(_ORDER)}
    return tuple(sorted(axes, key=lambda axis: rank.get(axis.name, len(rank))))


def _parts(bench: Bench, small: SmallCopy, probe: Probe, regroup: Sequence[Probe]) -> list[Part]:
    """The parts of one field's dimensions on the small copy: single units, then blocks."""
    left = sorted(dim for dim in probe.dims if dim[0] in bench.tensors)
    counts = [(f, small.values[f]) for f in (probe.fields[0], *(p.fields[0] for p in regroup))]
    parts: list[Part] = []
    bound: set[Dim] = set()
    for field, units in [counts[0], *sorted(counts[1:], key=lambda c: -c[1])]:
        fits = [d for d in left if units > 1 and bench.tensors[d[0]].shape[d[1]] % units == 0]
        if fits:
            found = find_groups(bench, fits, units)
            parts += [Part(field, dims) for dims in found.groups]
            bound |= found.bound
            left = [d for d in left if not any(d in part.dims for part in parts)]
    for dim in [d for d in left if d not in bound]:
        # What disturbs nothing goes where its module's weight goes (a key's bias under softmax),
        # or else with the largest part of single units (a mask token that no input uses).
        weight = (dim[0].rpartition(".")[0] + ".weight", 0)
        home = next((at for at, part in enumerate(parts) if weight in part.dims), None)
        if home is None and weight[0] not in bench.tensors:
            plain = [at for at, part in enumerate(parts) if part.field == probe.fields[0]]
            home = max(plain, key=lambda at: len(parts[at].dims), default=None)
        if home is not None:
            parts[home] = Part(parts[home].field, parts[home].dims | {dim})
    return parts


def _in_full(part: Part, stacks: Sequence[Stack]) -> list[Part]:
    """The same part in the full model: one for each layer if it lies in one, else through all."""
    placed = {d: _place(d[0], stacks) for d in part.dims}
    homes = {(place[0], place[1]) for place in placed.values() if place}
    shallow = {s for s in stacks if s[2] < s[1]}
    if not any(stack in shallow for stack, _ in homes):
        return [part]
    if len(homes) == 1 and all(placed.values()):
        ((stack, layer),) = homes
        if layer > 0:
            return []  # layer 0 speaks for it; whether truly, `_speaks_for_all` looks
        copies = range(stack[1])
        return [Part(part.field, frozenset(_moved(d, stack, i) for d in part.dims)) for i in copies]
    dims: set[Dim] = set()
    for dim, place in placed.items():
        if place is None or place[0] not in shallow:
            dims.add(dim)
        elif place[1] == 0:
            dims |= {_moved(dim, place[0], i) for i in range(place[0][1])}
    return [Part(part.field, frozenset(dims))]


def _place(name: str, stacks: Sequence[Stack]) -> tuple[Stack, int] | None:
    for stack in stacks:
        if place := layer_of(stack[0], name):
            return stack, place[0]
    return None


def _moved(dim: Dim, stack: Stack, layer: int) -> Dim:
    """The same dimension in another layer."""
    place = layer_of(stack[0], dim[0])
    assert place is not None
    return f"{stack[0].format(layer)}.{place[1]}", dim[1]


def _speaks_for_all(
    bench: Bench,
    probe: Probe,
    small: Sequence[Part],
    full: Sequence[Sequence[Part]],
) -> bool:
    """Whether the small copy's parts, spread over all layers, are the small copy's again, and
    leave out of the full model only what they leave out of the small copy."""
    spread = [part.dims for parts in full for part in parts]
    again = {frozenset(d for d in dims if d[0] in bench.tensors) for dims in spread} - {frozenset()}
    left = {d for d in probe.dims if d[0] in bench.tensors}.difference(*(p.dims for p in small))
    complete = frozenset().union(*spread) == probe.dims
    return again == {part.dims for part in small} and (complete or bool(left))


def _width_axes(
    prober: Prober, probe: Probe, parts: Sequence[Part], stacks: Sequence[Stack]
) -> list[Axis]:
    """The axis of single units and, where blocks of a count were found, the one coupled to it."""
    rest = probe.dims.difference(*(part.dims for part in parts))
    if rest:
        where = "{} (dimension {})".format(*min(rest))
        return [_refused(probe, f"{where} has no layout whose units are interchangeable")]
    field, value, coupled = probe.fields[0], probe.value, {}
    by_field = {f: [p for p in parts if p.field == f] for f in {p.field for p in parts} - {field}}
    axes = []
    for count, blocks in by_field.items():
        units = prober.fields[count]
        joint = dict.fromkeys(probe.fields, value // units * (units - 1)) | {count: units - 1}
        outcome = prober.compare(joint)
        if value % units or outcome is None or outcome[0] or outcome[1] != probe.dims:
            return [_refused(probe, f"it does not move together with {count}")]
        axes.append(_axis(prober, (count,), units, blocks, stacks))
        coupled[axes[-1].name] = value // units
    singles = [part for part in parts if part.field == field]
    main = _axis(prober, probe.fields, value, singles, stacks)
    step = math.lcm(*coupled.values())
    return [replace(main, coupled=coupled, granularity=step), *axes]


def _axis(
    prober: Prober,
    fields: Sequence[str],
    units: int,
    parts: Sequence[Part],
    stacks: Sequence[Stack],
) -> Axis:
    shapes, aliases = prober.full.shapes, prober.full.aliases
    position = {name: at for at, name in enumerate(shapes)}
    rows = [sorted(part.dims, key=lambda d: (position[d[0]], d[1])) for part in parts]
    rows.sort(key=lambda dims: (position[dims[0][0]], dims[0][1]))
    homes = [{_place(d[0], stacks) for d in dims} for dims in rows]
    inside = [len(home) == 1 and None not in home for home in homes]
    single = all(shapes[d[0]][d[1]] == units for dims in rows for d in dims)
    name = fields[0]
    if any(home - {None} and not alone for home, alone in zip(homes, inside, strict=True)):
        name = "hidden"
    elif all(inside):
        name = "ffn" if single else "heads"
    groups: dict[str, Group] = {}
    for dims, home, alone in zip(rows, homes, inside, strict=True):
        place = next(iter(home)) if alone else None
        if place is not None:
            title = f"{name}.{place[1]}"
        else:
            title = name if home - {None} else f"{name}.{dims[0][0].rpartition('.')[0]}"
        if title in groups:
            title = f"{title}.{dims[0][0]}.{dims[0][1]}"
        members = tuple(
            Member(parameter, d[1], shapes[d[0]][d[1]] // units)
            for d in dims
            for parameter in (d[0], *aliases.get(d[0], ()))
        )
        groups[title] = Group(title, units, members)
    values = dict.fromkeys(fields, 1)
    return Axis(name=name, fields=values, size=units, groups=tuple(groups.values()), reason=_OPEN)


def _depth_axis(probe: Probe, *, first: bool) -> Axis:
    (field,) = probe.fields
    if not first:
        return _refused(probe, "a second stack of layers: a shape keeps layers of one stack only")
    return Axis(
        name="layers", fields={field: 1}, size=probe.value, pattern=probe.pattern, reason=_OPEN
    )


def _refused(probe: Probe, reason: str) -> Axis:
    fields = dict.fromkeys(probe.fields, 1)
    return Axis(name=probe.fields[0], fields=fields, size=probe.value, reason=reason)
