"""Which fields of a config have to move together: alone, with equals, with counts of heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from limbeck.architecture.fields import Probe, Prober, Value, ratio_of
from limbeck.architecture.twins import Dim

_STEPS = 24  # of a unit's step, tried from the smallest
_TRIES = 20  # hypotheses for one field: each costs a few builds and backwards


@dataclass(frozen=True)
class Fields:
    """A hypothesis: these fields keep their proportion."""

    main: tuple[str, ...]
    counts: tuple[str, ...] = ()
    segments: int = 1  # the units lie in that many segments (query heads in key/value groups)

    @property
    def all(self) -> tuple[str, ...]:
        return self.main + self.counts


@dataclass(frozen=True)
class Move:
    """What one step of all these fields takes from each dimension."""

    fields: Fields
    values: Mapping[str, Value]
    units: int  # steps in all
    widths: Mapping[Dim, tuple[int, int]]  # channels a step, channels that never move
    sizes: Mapping[Dim, int]
    others: tuple[int, ...] = ()  # whole numbers in the config, which may count groups

    @property
    def ratios(self) -> tuple[int, ...]:
        """Query heads for each key/value head, as far as the counts tell."""
        counts = [v for f in self.fields.all if type(v := self.values[f]) is int]
        return tuple(dict.fromkeys([1, *(a // b for a in counts for b in counts if a % b == 0)]))

    def unit_counts(self) -> list[int]:
        """How many units the dimensions may have, finest first."""
        if self.fields.segments > 1:
            return [self.units]
        sizes = {self.sizes[d] - tail for d, (_, tail) in self.widths.items()}
        found = sizes | {v for v in self.values.values() if type(v) is int} | {self.units}
        found |= {s // g for s in sizes for g in self.others if s % g == 0}
        return sorted((u for u in found if u > 1 and u % self.units == 0), reverse=True)


def measure(prober: Prober, fields: Fields) -> Move | None:
    """The smallest step at which all dimensions shrink evenly; None if there is none."""
    values = {f: prober.fields[f] for f in fields.all}
    ratio = any(type(v) is float for v in values.values())
    whole = _channels(prober, values) if ratio else math.gcd(*map(int, values.values()))
    if fields.segments > 1:
        whole //= fields.segments
    for step in [s for s in range(1, whole) if whole % s == 0][:_STEPS]:
        units = whole // step
        widths = _widths(prober, values, units, units - 1)
        smaller = {units - 2, units // 2} if units > 3 else set()  # rounding hides in one step
        if ratio:  # and more so where sizes are products
            smaller = {*range(1, units - 1, max(1, units // 16))}
        if not widths or any(_widths(prober, values, units, n) not in (None, widths)
                             for n in smaller):  # fmt: skip
            continue
        others = sorted({v for v in prober.fields.values() if type(v) is int and v > 1})
        sizes = {d: prober.full.shapes[d[0]][d[1]] for d in widths}
        return Move(fields, values, units, widths, sizes, tuple(others))
    return None


def _channels(prober: Prober, values: Mapping[str, Value]) -> int:
    """How many steps a ratio of sizes (mlp_ratio) may have: its dimensions' common divisor."""
    outcome = prober.compare({f: _part(v, 2, 1) for f, v in values.items()})
    if outcome is None or outcome[0]:
        return 0
    return math.gcd(*(prober.full.shapes[name][dim] for name, dim in outcome[1]))


def _part(value: Value, units: int, kept: int) -> Value:
    if type(value) is int:
        return value * kept // units
    return ratio_of(value * kept / units)


def _widths(
    prober: Prober, values: Mapping[str, Value], units: int, fewer: int
) -> dict[Dim, tuple[int, int]] | None:
    """None where the smaller size has no such model, nothing where it shrinks unevenly."""
    if any(type(v) is int and v * fewer % units for v in values.values()):
        return {}
    smaller = {f: _part(v, units, fewer) for f, v in values.items()}
    outcome = prober.compare(smaller)
    new = prober.survey(smaller)
    if outcome is None or new is None or outcome[0]:
        return None
    widths = {}
    for name, dim in outcome[1]:
        if name in prober.full.computed:  # a rotary table: another head size computes other things
            return {}
        size = prober.full.shapes[name][dim]
        width, rest = divmod(size - new.shapes[name][dim], units - fewer)
        if rest or width <= 0 or size < width * units:
            return {}
        widths[name, dim] = (width, size - width * units)
    return widths


def hypotheses(
    prober: Prober, probe: Probe, widths: Sequence[Probe], counts: Sequence[Probe]
) -> Iterator[Fields]:
    """What to try for one field: it alone, then with others, the likeliest first.

    `counts` change no shape but the result.
    """
    main, value = probe.fields, probe.value
    yield Fields(main)
    if type(value) is float:  # a width stated beside its ratio has to follow
        yield from (Fields(main + p.fields) for p in widths if type(p.value) is int)
        return
    silent = _bundles(f for p in counts for f in p.fields if in_reach(f, main))
    shaped = [p for p in widths if not set(p.fields) & set(main) and type(p.value) is int]
    shaped.sort(key=lambda p: not p.dims & probe.dims)  # what touches the same dimensions first
    bundles = silent + _bundles(f for p in shaped for f in p.fields)
    fitting = [b for b in bundles if all(_fits(prober.fields[f], value) for f in b)]
    equals = tuple(
        f for f, v in prober.fields.items()
        if v == value and type(v) is int and any(f in b for b in bundles)
    )  # fmt: skip
    quiet = tuple(f for b in fitting if b in silent for f in b)
    tried: set[Fields] = set()
    near = [b for b in fitting if any(set(p.fields) & set(b) and p.dims & probe.dims
                                      for p in shaped)]  # fmt: skip
    pairs = [a + b for a, b in itertools.combinations(near, 2)]
    choices: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for more in [()] + [(f,) for f in equals] * (len(equals) > 1) + [equals]:
        in_part = _bundles(f for p in counts for f in p.fields if in_reach(f, main + more))
        some = [b for b in in_part if all(_fits(prober.fields[f], value) for f in b)]
        choices += [(main + more, b) for b in [(), *some, tuple(f for b in some for f in b)]]
    choices += [(main, b) for b in fitting] + [(main, p) for p in pairs]
    choices += [(main, quiet + b) for b in near]
    for fields in (Fields(m, c) for m, c in choices):
        if fields not in tried and fields != Fields(main) and len(tried) < _TRIES:
            tried.add(fields)
            yield fields


def in_reach(count: str, main: Sequence[str]) -> bool:
    """Whether a count may be one of these widths': not if it stands in another part of the config
    (an image encoder's heads are not a text encoder's)."""
    parts = {field.rpartition(".")[0] for field in main}
    return "" in parts or count.rpartition(".")[0] in parts | {""}


def _fits(count: Value, value: Value) -> bool:
    return type(count) is int and 1 < count < value and value % count == 0


def _bundles(fields: Iterator[str]) -> list[tuple[str, ...]]:
    """Items of one list, such as the head counts of all stages, move together."""
    found: dict[str, tuple[str, ...]] = {}
    for field in fields:
        name = field.partition("[")[0]
        found[name] = (*found.get(name, ()), field)
    return list(found.values())
