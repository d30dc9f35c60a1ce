"""Prove each axis on the loaded model, or refuse it with a sentence.

- permuting the units of all its groups at random leaves the outputs as they were;
- in every group leaving one dimension out, or moving half units, does not (else nothing is shown);
- where each group lies in one layer, the cut equals the full model with the cut units zeroed;
  elsewhere norms span the axis, and the smaller model must be found to have the same units;
- a model with layers dropped equals the model with these layers skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group, find_axis, layer_of, permuted
from limbeck.architecture.cut import build_student, cut
from limbeck.architecture.fields import Build
from limbeck.architecture.twins import logits_of
from limbeck.errors import AxisError
from limbeck.types import Shape

_TOLERANCE = 1e-4  # relative to the largest logit, fp32; rounding is near 1e-6
_SEEN = 1e-9  # the same in fp64, for effects that fp32 would hide in its rounding
_CONTROLS = 3  # dimensions of a group to leave out, in turn, until one is missed


@torch.no_grad()
def prove_axes(
    model: nn.Module,
    config: PretrainedConfig,
    build: Build,
    axes: Sequence[Axis],
    inputs: Mapping[str, Tensor],
    *,
    seed: int,
) -> tuple[Axis, ...]:
    """The same axes, each proved or refused with its reason. The model (fp32) is left as it was."""
    training = model.training
    model.eval()
    try:
        trusted = [replace(axis, proved=True) for axis in axes]  # what a cut would presuppose
        bench = _Bench(model, config, build, trusted, inputs, seed)
        verdicts = {axis.name: _verdict(axis, bench) for axis in axes}
    finally:
        model.train(training)
    found = [replace(axis, proved=p, reason=r) for axis in axes for p, r in [verdicts[axis.name]]]
    lost = {axis.name for axis in found if not axis.proved}
    for at, axis in enumerate(found):
        partners = {*axis.coupled, *(other.name for other in axes if axis.name in other.coupled)}
        if axis.proved and partners & lost:
            why = f"it moves only together with {min(partners & lost)}, which is refused"
            found[at] = replace(axis, proved=False, reason=why)
    return tuple(found)


class _Refused(Exception):
    """The sentence that says why."""


class _Bench:
    """The loaded model, run under other weights without being touched."""

    def __init__(
        self, model: nn.Module, config: PretrainedConfig, build: Build, axes: Sequence[Axis],
        inputs: Mapping[str, Tensor], seed: int,
    ) -> None:  # fmt: skip
        self.model, self.config, self.build, self.axes = model, config, build, axes
        self.inputs = dict(inputs)
        self.random = torch.Generator().manual_seed(seed)
        self.state = {k: v.detach() for k, v in model.named_parameters()}  # tied ones once
        self.state |= dict(model.named_buffers())
        self.saved = model.state_dict().keys()
        self.reference = self.run(model)
        self._reference64: Tensor | None = None

    def run(self, model: nn.Module) -> Tensor:
        return logits_of(model(**self.inputs))

    def under(self, state: Mapping[str, Tensor], model: nn.Module | None = None) -> Tensor:
        """Logits under other weights; entries not given stay the model's own."""
        return logits_of(functional_call(model or self.model, dict(state), (), self.inputs))

    def moved(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        orders = {group.name: self.order(group.units) for group in groups}
        return permuted(self.state, groups, orders)

    def order(self, units: int) -> Tensor:
        """At random, but never the order they have."""
        order = torch.randperm(units, generator=self.random)
        return order.roll(1) if torch.equal(order, torch.arange(units)) else order

    def change(self, group: Group, order: Tensor) -> float:
        """How much this permutation changes the outputs; 0 if not beyond rounding."""
        moved = permuted(self.state, [group], {group.name: order})
        change = _difference(self.under(moved), self.reference)
        if change > _TOLERANCE:
            return change
        # Heads that all attend evenly differ little: look again where rounding is out of the way.
        if self._reference64 is None:
            self._reference64 = self._under64(self.state)
        change = _difference(self._under64(moved), self._reference64)
        return change if change > _SEEN else 0.0

    def _under64(self, state: Mapping[str, Tensor]) -> Tensor:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.double() if tensor.is_floating_point() else tensor

        inputs = {name: wide(tensor) for name, tensor in self.inputs.items()}
        weights = {name: wide(tensor) for name, tensor in state.items()}
        return logits_of(functional_call(self.model, weights, (), inputs))

    def student(self, shape: Shape, state: Mapping[str, Tensor]) -> nn.Module:
        saved = {name: tensor for name, tensor in state.items() if name in self.saved}
        try:
            return build_student(self.config, self.build, self.axes, shape, saved)
        except AxisError as error:
            raise _Refused(f"the smaller model does not take its cut weights: {error}") from error

    @property
    def every_layer(self) -> tuple[int, ...]:
        layers = find_axis(self.axes, "layers")
        return tuple(range(layers.size)) if layers else ()


def _difference(logits: Tensor, reference: Tensor) -> float:
    """Largest, relative to the largest logit; infinite where a value is not finite."""
    if not logits.isfinite().all():
        return float("inf")
    scale = reference.abs().max().clamp_min(1e-6)
    return ((logits - reference).abs().max() / scale).item()


def _verdict(axis: Axis, bench: _Bench) -> tuple[bool, str]:
    tests: tuple[Callable[[Axis, _Bench], str], ...]
    if axis.pattern:
        tests = (_skipping,)
    elif axis.groups:
        inside = _lies_inside_layers(axis, bench) or _is_coupled(axis, bench)
        tests = (_layout, _permutation, _zeroing if inside else _same_units)
    else:
        return False, axis.reason  # refused when it was looked for
    try:
        return True, "; ".join(sentence for test in tests if (sentence := test(axis, bench)))
    except _Refused as refusal:
        return False, str(refusal)


def _lies_inside_layers(axis: Axis, bench: _Bench) -> bool:
    layers = find_axis(bench.axes, "layers")
    pattern = layers.pattern if layers else ""
    homes = [[layer_of(pattern, m.parameter) for m in g.members] for g in axis.groups]
    return all(None not in home and len({p[0] for p in home if p}) == 1 for home in homes)


def _is_coupled(axis: Axis, bench: _Bench) -> bool:
    return any(axis.name in other.coupled for other in bench.axes)


def _layout(axis: Axis, bench: _Bench) -> str:
    for group in axis.groups:
        if group.units != axis.size:
            raise _Refused(f"{group.name} has {group.units} units, not {axis.size}")
        for member in group.members:
            tensor = bench.state.get(member.parameter)
            if tensor is None:
                if member.parameter not in bench.saved:  # else another name of a tied one
                    raise _Refused(f"{member.parameter} is not in this model")
                continue
            if member.dim >= tensor.dim() or tensor.shape[member.dim] != member.width(group.units):
                raise _Refused(f"{member.parameter} has not the size that {group.name} needs")
            if member.parameter not in bench.saved and not _flat(tensor, member.dim):
                why = "is computed anew when a model loads, so it cannot follow a permutation"
                raise _Refused(f"{member.parameter} {why}")
    return ""


def _flat(tensor: Tensor, dim: int) -> bool:
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


def _permutation(axis: Axis, bench: _Bench) -> str:
    error = _difference(bench.under(bench.moved(axis.groups)), bench.reference)
    if not error < _TOLERANCE:
        culprit = _culprit(list(axis.groups), bench)
        raise _Refused(
            f"permuting the units of {culprit} changes the outputs by {error:.1e}: they are not "
            "interchangeable, or not all of their dimensions are known"
        )
    control = min(_control(group, bench) for group in axis.groups)
    return f"permuted: outputs differ by {error:.0e}, with one dimension left out by {control:.0e}"


def _culprit(groups: list[Group], bench: _Bench) -> str:
    while len(groups) > 1:
        half = groups[: len(groups) // 2]
        failed = not _difference(bench.under(bench.moved(half)), bench.reference) < _TOLERANCE
        groups = half if failed else groups[len(groups) // 2 :]
    return groups[0].name


def _control(group: Group, bench: _Bench) -> float:
    """How much a wrong permutation of this group changes the outputs."""
    known = [m for m in group.members if m.parameter in bench.state]
    known.sort(key=lambda m: bench.state[m.parameter].dim() < 2)  # matrices first
    matrices = [m for m in known if bench.state[m.parameter].dim() > 1] or known
    seen = 0.0
    for at in torch.randperm(len(matrices), generator=bench.random).tolist()[:_CONTROLS]:
        rest = replace(group, members=tuple(m for m in group.members if m != matrices[at]))
        seen = bench.change(rest, bench.order(group.units))
        if seen:
            break
    if not seen:
        raise _Refused(f"the order of {group.name} does not reach the outputs: nothing is shown")
    if _has_smaller_units(group, bench):
        raise _Refused(f"{group.name} has smaller units than the blocks it was given")
    return seen


def _has_smaller_units(group: Group, bench: _Bench) -> bool:
    """Whether halves (thirds, ...) of the blocks are interchangeable too: then the blocks are not
    the units, but several of them."""
    block = min(member.block for member in group.members)
    part = next((d for d in range(2, block + 1) if block % d == 0), 1)
    if part == 1 or group.units < 2 or any(m.block % part for m in group.members):
        return False
    members = tuple(replace(m, block=m.block // part) for m in group.members)
    finer = replace(group, units=group.units * part, members=members)
    return not bench.change(finer, torch.arange(finer.units).roll(1))  # each block gets mixed


def _zeroing(axis: Axis, bench: _Bench) -> str:
    """Half of the units, drawn at random, cut; against the same units zeroed."""
    kept = max(axis.granularity, axis.size // 2 // axis.granularity * axis.granularity)
    if kept >= axis.size:
        raise _Refused(f"there is no size below {axis.size}")
    moved = bench.moved(axis.groups)
    zeroed = dict(moved)
    for group in axis.groups:
        for member in group.members:
            if member.parameter not in zeroed:
                continue
            keep = torch.zeros(member.width(group.units))
            for start, length in member.pieces(group.units, kept):
                keep[start : start + length] = 1
            shape = [-1 if d == member.dim else 1 for d in range(zeroed[member.parameter].dim())]
            zeroed[member.parameter] = zeroed[member.parameter] * keep.view(shape)
    reference = bench.under(zeroed)
    if _is_coupled(axis, bench):
        # No config has these sizes alone: the full model's code, run on the smaller weights.
        alone = [replace(axis, proved=True)]
        try:
            logits = bench.under(cut(moved, alone, Shape({axis.name: kept}, ())))
        except (RuntimeError, ValueError):  # its code insists on the full size
            return "not cut alone; see the axis it is coupled to"
    else:
        logits = bench.run(bench.student(Shape({axis.name: kept}, bench.every_layer), moved))
    error = _difference(logits, reference)
    if not error < _TOLERANCE:
        raise _Refused(f"cutting it to {kept} differs from zeroing the same units by {error:.1e}")
    return f"cut equals zeroed to {error:.0e}"


def _same_units(axis: Axis, bench: _Bench) -> str:
    """A smaller model runs, and sees the same units: a count of heads regroups them unseen."""
    partners = [other for name in axis.coupled if (other := find_axis(bench.axes, name))]
    moved = bench.moved([group for one in (axis, *partners) for group in one.groups])
    problem: _Refused | None = None
    for sizes in _smaller(axis, partners):
        try:
            student = bench.student(Shape(sizes, bench.every_layer), moved)
            break
        except _Refused as refusal:  # one size may be special: a projection falls away
            problem = refusal
    else:
        raise problem or _Refused(f"there is no size below {axis.size}")
    small = _Bench(student, bench.config, bench.build, bench.axes, bench.inputs, 0)
    small.random = bench.random
    worst = 0.0
    for one in (axis, *partners):
        size = sizes[one.name]
        if size < 2:
            continue
        groups = [replace(group, units=size) for group in one.groups]
        error = _difference(small.under(small.moved(groups)), small.reference)
        if not error < _TOLERANCE:
            raise _Refused(f"a model of {one.name}={size} has other units ({error:.1e})")
        worst = max(worst, error)
        if any(_has_smaller_units(group, small) for group in groups):
            raise _Refused(f"a model of {one.name}={size} has smaller units")
    named = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return f"a model of {named} has the same units, to {worst:.0e}"


def _smaller(axis: Axis, partners: Sequence[Axis]) -> Iterator[dict[str, int]]:
    """Sizes to try: about half first, and two units of what is coupled, so that they can swap."""
    steps = axis.size // axis.granularity
    half = min(max(2, steps // 2), steps - 1)
    for kept in dict.fromkeys((half, half + 1, half - 1)):
        if 0 < kept < steps:
            size = kept * axis.granularity
            yield {axis.name: size, **{p.name: size // axis.coupled[p.name] for p in partners}}


def _skipping(axis: Axis, bench: _Bench) -> str:
    if axis.size < 2:
        raise _Refused("one layer only: nothing to drop")
    worst = 0.0
    drops = [{0}, {axis.size - 1}]
    some = torch.randperm(axis.size, generator=bench.random)[: axis.size // 2].tolist()
    if set(some) not in drops:
        drops.append(set(some))
    for dropped in drops:
        kept = tuple(i for i in range(axis.size) if i not in dropped)
        logits = bench.run(bench.student(Shape({}, kept), bench.state))
        with skipped(bench.model, *(axis.pattern.format(i) for i in dropped)):
            error = _difference(logits, bench.run(bench.model))
        if not error < _TOLERANCE:
            which = ", ".join(map(str, sorted(dropped)))
            raise _Refused(f"dropping layer {which} differs from skipping it by {error:.1e}")
        worst = max(worst, error)
    return f"dropped equals skipped to {worst:.0e}"


@contextmanager
def skipped(model: nn.Module, *layers: str) -> Iterator[None]:
    """Let these layers (module names) hand their input through."""

    def through(_module: nn.Module, args: Any, kwargs: Any, output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [
        model.get_submodule(name).register_forward_hook(through, with_kwargs=True)
        for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
