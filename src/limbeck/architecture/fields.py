"""What each field of a config does to the shapes of the model it builds, on the meta device."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import layer_of
from limbeck.architecture.twins import Dim
from limbeck.errors import AxisError

Build = Callable[[PretrainedConfig], nn.Module]
Value = int | float

_log = logging.getLogger(__name__)
_LABELS = re.compile(r"_(token|type)_id$|(^|\.)(num_labels|id2label|label2id)")  # not sizes


@dataclass(frozen=True)
class Survey:
    """Names and shapes of a model, without its weights."""

    shapes: Mapping[str, tuple[int, ...]]  # parameters and float buffers, tied ones once
    aliases: Mapping[str, tuple[str, ...]]  # first name -> other names of the same parameter
    rows: frozenset[Dim]  # rows of lookup tables
    words: frozenset[Dim]  # rows of the tables that token ids are looked up in
    parameters: int
    computed: frozenset[str] = frozenset()  # buffers made anew from the config, never stored


@dataclass(frozen=True)
class Probe:
    """What changing one config field (or several of equal value, together) does to the shapes."""

    fields: tuple[str, ...]
    value: Value
    kind: str  # 'depth', 'width', 'table', 'silent', 'refused'
    dims: frozenset[Dim] = frozenset()
    pattern: str = ""
    reason: str = ""


def read_field(config: PretrainedConfig, path: str) -> Any:
    value: Any = config
    for step in re.findall(r"[^.\[\]]+", path):
        value = value[int(step)] if isinstance(value, list | tuple) else getattr(value, step)
    return value


def ratio_of(value: float) -> float:
    """Up by a hair where it is a fraction: int(383 / 96 * 96) could be 382."""
    return value if value == round(value) else value * (1 + 1e-12)


def changed(config: PretrainedConfig, values: Mapping[str, Value]) -> PretrainedConfig:
    """A copy with other values; a path is 'a', 'part.a' or 'a[1]'."""
    new = copy.deepcopy(config)
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        holder = read_field(new, owner) if owner else new
        name, *at = re.findall(r"[^\[\]]+", name)
        if at:
            items = list(getattr(holder, name))
            items[int(at[0])] = value
            value = type(getattr(holder, name))(items)
        setattr(holder, name, value)
    return new


def numbers(config: PretrainedConfig) -> dict[str, Value]:
    """Every number of a config that could be a size or a ratio of sizes, by its path."""
    found: dict[str, Value] = {}

    def collect(prefix: str, part: PretrainedConfig) -> None:
        for name in part.to_dict():
            path, value = f"{prefix}{name}", getattr(part, name, None)
            if isinstance(value, PretrainedConfig):
                collect(f"{path}.", value)
            elif isinstance(value, list | tuple):
                found.update({f"{path}[{i}]": v for i, v in enumerate(value)})
            else:
                found[path] = value  # type: ignore[assignment]

    collect("", config)
    return {
        path: value
        for path, value in found.items()
        if ((type(value) is int and value >= 1) or (type(value) is float and value > 0))
        and not _LABELS.search(path)
    }


def survey(model: nn.Module) -> Survey:
    first: dict[int, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[known] = (*aliases.get(known, ()), name)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {n: tuple(b.shape) for n, b in model.named_buffers() if b.is_floating_point()}
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    rows = {name: (first[id(table.weight)], 0) for name, table in tables.items()}
    words = set()
    for part in model.modules():
        try:
            words.add(id(part.get_input_embeddings()))  # type: ignore[operator]
        except (AttributeError, NotImplementedError, TypeError):
            continue  # no transformers model, or one that reads no tokens
    return Survey(
        shapes, aliases, frozenset(rows.values()),
        frozenset(rows[name] for name, table in tables.items() if id(table) in words),
        sum(p.numel() for p in model.parameters()),
        frozenset(shapes.keys() - model.state_dict().keys()),
    )  # fmt: skip


class Prober:
    """One config and the shapes it gives; asks what other values would give."""

    def __init__(self, config: PretrainedConfig, build: Build) -> None:
        self.config, self.build = config, build
        self._known: dict[tuple[tuple[str, Value], ...], Survey | None] = {}
        full = self.survey({})
        if full is None:
            raise AxisError("model", "its config does not build a model")
        self.full = full
        self.fields = numbers(config)

    def survey(self, values: Mapping[str, Value]) -> Survey | None:
        key = tuple(sorted(values.items()))
        if key not in self._known:
            try:
                with torch.device("meta"):
                    self._known[key] = survey(self.build(changed(self.config, values)))
            except Exception as error:  # a config may refuse a value in any way it likes
                _log.debug("%s does not build: %s", dict(values), error)
                self._known[key] = None
        return self._known[key]

    def compare(self, values: Mapping[str, Value]) -> tuple[set[str], set[Dim]] | None:
        """Names that come or go, and dimensions that change; None if it does not build."""
        new = self.survey(values)
        if new is None:
            return None
        old = self.full.shapes
        moved = {
            name for name in old.keys() & new.shapes if len(old[name]) != len(new.shapes[name])
        }
        dims = {
            (name, dim)
            for name in (old.keys() & new.shapes.keys()) - moved
            for dim, (a, b) in enumerate(zip(old[name], new.shapes[name], strict=True))
            if a != b
        }
        return (old.keys() ^ new.shapes.keys()) | moved, dims

    def candidates(self, name: str) -> list[Value]:
        """Smaller values to try: next, half, and the steps that another field would demand."""
        value = self.fields[name]
        if isinstance(value, float):
            return [value / 2, value * 0.75]
        others = sorted({v for v in self.fields.values() if type(v) is int and v < value})
        steps = [value - value // k for k in others if value % k == 0]
        return list(dict.fromkeys(v for v in [value - 1, value // 2, *steps] if 0 < v < value))

    def probe(self, name: str) -> Probe:
        value = self.fields[name]
        if value == 1 and type(value) is int:
            # Of what there is one, only a stack of layers is told apart: by adding one.
            moved, dims = self.compare({name: 2}) or (set(), set())
            if moved and not dims and (pattern := self._stack(moved, value, grown=True)):
                return Probe((name,), value, "depth", pattern=pattern)
            return Probe((name,), value, "silent")
        refusal: Probe | None = None
        for smaller in self.candidates(name):
            outcome = self.compare({name: smaller})
            if outcome is None:
                continue
            moved, dims = outcome
            if isinstance(value, float):
                kind = "width" if dims and not moved else "silent"
                return Probe((name,), value, kind, frozenset(dims))
            if moved and not dims and (pattern := self._stack(moved, value)):
                return Probe((name,), value, "depth", pattern=pattern)
            if moved:  # that one value may be special: a projection falls away
                refusal = refusal or self._together(name, smaller, moved)
                if refusal.kind == "width":
                    return refusal
                continue
            half = self.compare({name: value // 2})
            if not dims and half and half[1] and not half[0]:
                continue  # rounded: some values are as good as this one
            if not dims or half == (set(), set()):
                # That one value changes shapes and another none is rounding: 32 // 3 heads x 3.
                return Probe((name,), value, "silent")
            kind = "table" if dims & self.full.rows else "width"
            return Probe((name,), value, kind, frozenset(dims))
        return refusal or Probe((name,), value, "silent", reason="no smaller value builds")

    def _stack(self, gone: set[str], value: int, *, grown: bool = False) -> str:
        """The repeated block that lost (or got) a last copy, as a pattern; empty if it did not."""
        parts = min(gone).split(".")
        for at, part in enumerate(parts):
            pattern = ".".join([*parts[:at], "{}"])
            if not part.isdigit() or not all(layer_of(pattern, name) for name in gone):
                continue
            names = {n: place[0] for n in self.full.shapes if (place := layer_of(pattern, n))}
            last = {name for name, layer in names.items() if layer == value - 1}
            if set(names.values()) == set(range(value)) and (grown or last <= gone):
                return pattern
        return ""

    def _together(self, name: str, smaller: Value, moved: set[str]) -> Probe:
        """A field whose change adds or removes parameters may have to move with an equal one."""
        value = self.fields[name]
        for other in self.fields:
            if other != name and self.fields[other] == value:
                outcome = self.compare({name: smaller, other: smaller})
                if outcome and outcome[1] and not outcome[0]:
                    fields = tuple(f for f in self.fields if f in (name, other))
                    return Probe(fields, value, "width", frozenset(outcome[1]))
        reason = f"changing it changes which parameters there are, such as {min(moved)}"
        return Probe((name,), value, "refused", reason=reason)
