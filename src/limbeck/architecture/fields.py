"""What each field of a config does to the shapes of the model it builds, on the meta device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import layer_of
from limbeck.architecture.twins import Dim
from limbeck.errors import AxisError

Build = Callable[[PretrainedConfig], nn.Module]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Names and shapes of a model, without its weights."""

    shapes: Mapping[str, tuple[int, ...]]  # parameters and float buffers, tied ones once
    aliases: Mapping[str, tuple[str, ...]]  # first name -> other names of the same parameter
    rows: frozenset[Dim]  # rows of lookup tables
    parameters: int


@dataclass(frozen=True)
class Probe:
    """What changing one config field (or several of equal value, together) does to the shapes."""

    fields: tuple[str, ...]
    value: int
    kind: str  # 'depth', 'width', 'table', 'silent', 'refused'
    dims: frozenset[Dim] = frozenset()
    pattern: str = ""
    reason: str = ""


def changed(config: PretrainedConfig, values: Mapping[str, int]) -> PretrainedConfig:
    new = copy.deepcopy(config)
    for name, value in values.items():
        setattr(new, name, value)
    return new


def survey(model: nn.Module) -> Survey:
    first: dict[int, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[known] = (*aliases.get(known, ()), name)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {n: tuple(b.shape) for n, b in model.named_buffers() if b.is_floating_point()}
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    rows = frozenset((f"{name}.weight", 0) for name in tables)
    return Survey(shapes, aliases, rows, sum(p.numel() for p in model.parameters()))


class Prober:
    """One config and the shapes it gives; asks what other values would give."""

    def __init__(self, config: PretrainedConfig, build: Build) -> None:
        self.config, self.build = config, build
        full = self.survey({})
        if full is None:
            raise AxisError("model", "its config does not build a model")
        self.full = full
        # Token ids are labels, not sizes.
        self.fields = {
            name: value
            for name, value in config.to_dict().items()
            if type(value) is int and value >= 1 and not name.endswith("_token_id")
        }

    def survey(self, values: Mapping[str, int]) -> Survey | None:
        try:
            with torch.device("meta"):
                return survey(self.build(changed(self.config, values)))
        except Exception as error:  # a config may refuse a value in any way it likes
            _log.debug("%s does not build: %s", dict(values), error)
            return None

    def compare(self, values: Mapping[str, int]) -> tuple[set[str], set[Dim]] | None:
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

    def candidates(self, value: int) -> list[int]:
        """Smaller values to try: next, half, and the steps that another field would demand."""
        others = sorted({v for v in self.fields.values() if v < value})
        steps = [value - value // k for k in others if value % k == 0]
        return list(dict.fromkeys(v for v in [value - 1, value // 2, *steps] if 0 < v < value))

    def probe(self, name: str) -> Probe:
        value = self.fields[name]
        if value == 1:  # of what there is one, only a stack of layers is told apart: by adding one
            moved, dims = self.compare({name: 2}) or (set(), set())
            if moved and not dims and (pattern := self._stack(moved, value)):
                return Probe((name,), value, "depth", pattern=pattern)
            return Probe((name,), value, "silent")
        for smaller in self.candidates(value):
            outcome = self.compare({name: smaller})
            if outcome is None:
                continue
            moved, dims = outcome
            if moved and not dims and (pattern := self._stack(moved, value)):
                return Probe((name,), value, "depth", pattern=pattern)
            if moved:
                return self._together(name, smaller, moved)
            if not dims or self.compare({name: value // 2}) == (set(), set()):
                # That one value changes shapes and another none is rounding: 32 // 3 heads x 3.
                return Probe((name,), value, "silent")
            table = dims & self.full.rows
            return Probe((name,), value, "table" if table else "width", frozenset(dims))
        return Probe((name,), value, "silent", reason="no smaller value builds")

    def _stack(self, gone: set[str], value: int) -> str:
        """The repeated block that lost its last copy, as a pattern; empty if it is not that."""
        parts = min(gone).split(".")
        for at, part in enumerate(parts):
            pattern = ".".join([*parts[:at], "{}"])
            if not part.isdigit() or not all(layer_of(pattern, name) for name in gone):
                continue
            found = {place[0] for n in self.full.shapes if (place := layer_of(pattern, n))}
            if found == set(range(value)):
                return pattern
        return ""

    def _together(self, name: str, smaller: int, moved: set[str]) -> Probe:
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
