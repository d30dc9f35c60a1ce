"""The same architecture, shallow and (if need be) narrow: what the gradient test runs on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from limbeck.architecture.fields import Probe, Prober, Value, changed
from limbeck.architecture.inputs import example_inputs, special_ids
from limbeck.architecture.twins import Bench, doubled, logits_of

_log = logging.getLogger(__name__)
_BUDGET = 1_500_000  # parameters of the small copy: a float64 backward takes some 20 ms
_TABLE = 64  # rows left of a long lookup table in the small copy
_SEED = 0


class SmallCopy:
    """Its config, the fields that differ, and a bench with random weights."""

    def __init__(self, full: Prober, probes: Sequence[Probe], layers: int | None) -> None:
        self.full = full
        values: dict[str, Value] = {f: p.value for p in probes for f in p.fields}
        top = max((v for v in special_ids(full.config) if v < 1024), default=0)
        for p in probes:
            if p.kind == "depth" and layers is not None:
                values[p.fields[0]] = min(p.value, layers)
            if p.kind == "table" and p.value > 1024 and p.dims & full.full.words:
                values[p.fields[0]] = _TABLE + top + 1
            elif p.kind == "table" and p.value > 1024:
                smaller = values | {p.fields[0]: min(int(p.value), _TABLE + top + 1)}
                values = smaller if full.survey(smaller) else values
        self.values = self._narrow(values, probes)
        self.config = changed(full.config, self.values)
        self.prober = Prober(self.config, full.build)
        self.bench = Bench(self.build(), example_inputs(self.build(), self.config))

    def _narrow(self, values: dict[str, Value], probes: Sequence[Probe]) -> dict[str, Value]:
        def whole(p: Probe) -> dict[str, int]:
            return dict.fromkeys(p.fields, p.value) if type(p.value) is int else {}

        widths = {f: v for p in probes if p.kind == "width" for f, v in whole(p).items()}
        divides = {
            f: c
            for p in probes
            if p.kind == "silent"
            for f, c in whole(p).items()
            if any(v % c == 0 for v in widths.values())
        }
        best, shrink = values, 1
        while (size := self.full.survey(best)) is None or size.parameters > _BUDGET:
            shrink *= 2
            even = {f: v // shrink for f, v in (widths | divides).items() if v % shrink == 0}
            smaller = best | {f: v for f, v in even.items() if v >= 2}
            if not even or self.full.survey(smaller) is None:
                break
            best = smaller
        return best

    def build(self, values: Mapping[str, Value] | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
            torch.manual_seed(_SEED)
            return doubled(self.full.build(changed(self.config, values or {}))).eval()

    def regroups(self, probe: Probe, without: Collection[str] = ()) -> bool:
        """Whether a field that changes no shape changes the result, also `without` these weights
        (zeros): a count of heads does."""
        field, value = probe.fields[0], self.values[probe.fields[0]]
        state = self.bench.model.state_dict()
        state |= {name: torch.zeros_like(state[name]) for name in without if name in state}
        for other in dict.fromkeys((1, value // 2, value - 1)):
            try:
                models = self.build(), self.build({field: other})
                for model in models:
                    model.load_state_dict(state)
                with torch.no_grad():
                    a, b = (logits_of(model(**self.bench.inputs)) for model in models)
                return a.shape == b.shape and not torch.allclose(a, b, rtol=1e-6, atol=0)
            except Exception as error:  # any way to say no, as in Prober.survey
                _log.debug("%s=%s does not run: %s", field, other, error)
        return False
