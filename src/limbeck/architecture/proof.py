"""Prove each axis on the loaded model, or refuse it with a sentence.

- permuting the units of all its groups at random leaves the outputs as they were, and
- leaving one dimension out of the permutation changes them (else the test could not fail);
- an axis that can be cut alone equals the full model with the cut units zeroed, unless a norm
  spans it (then the permutation is the proof);
- a model with layers dropped equals the model with these layers skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group, find_axis, permuted
from limbeck.architecture.cut import Build, build_student
from limbeck.architecture.twins import logits_of
from limbeck.types import Shape

_TOLERANCE = 1e-4  # relative to the largest logit, fp32
_CONTROLS = 3


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
    """The same axes, each proved or refused with its reason. The model is left as it was."""
    model.eval()
    bench = _Bench(model, inputs, torch.Generator().manual_seed(seed))
    found = [_by_permutation(axis, bench) if axis.groups else axis for axis in axes]
    refused = {axis.name for axis in found if axis.groups and not axis.proved}
    found = [  # what is coupled to a refused axis cannot be cut either
        replace(axis, proved=False, reason=f"coupled to {'/'.join(refused & {*axis.coupled})}, refused")
        if refused & {*axis.coupled}
        else axis
        for axis in found
    ]
    coupled = {name for axis in found for name in axis.coupled}
    checked = [
        _by_zeroing(axis, bench, config, build, found)
        if axis.proved and not axis.coupled and axis.name not in coupled
        else axis
        for axis in found
    ]
    return tuple(
        _by_skipping(axis, bench, config, build) if axis.pattern else axis for axis in checked
    )


class _Bench:
    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], random: torch.Generator
    ) -> None:
        self.model, self.inputs, self.random = model, dict(inputs), random
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.reference = self.run(model)

    def run(self, model: nn.Module) -> Tensor:
        return logits_of(model(**self.inputs))

    def with_state(self, state: Mapping[str, Tensor]) -> Tensor:
        """Outputs under other weights; the model's own are put back."""
        try:
            self.model.load_state_dict(state)
            return self.run(self.model)
        finally:
            self.model.load_state_dict(self.state)

    def error(self, logits: Tensor, reference: Tensor | None = None) -> float:
        reference = self.reference if reference is None else reference
        scale = reference.abs().max().clamp_min(1e-6)
        return ((logits - reference).abs().max() / scale).item()


def _by_permutation(axis: Axis, bench: _Bench) -> Axis:
    orders = {g.name: torch.randperm(g.units, generator=bench.random) for g in axis.groups}
    moved = permuted(bench.state, axis.groups, orders)
    error = bench.error(bench.with_state(moved))
    if not error < _TOLERANCE:
        return replace(axis, proved=False, reason=f"permuting its units changes outputs by {error:.1e}")
    matrices = [
        (group, member.parameter)
        for group in axis.groups
        for member in group.members
        if bench.state[member.parameter].dim() > 1
    ]
    control = 0.0
    for _ in range(_CONTROLS):
        at = int(torch.randint(len(matrices), (1,), generator=bench.random))
        group, parameter = matrices[at]
        left_out = permuted(bench.state, [_without(group, parameter)], orders)
        control = max(control, bench.error(bench.with_state(left_out)))
    if not control > _TOLERANCE:
        return replace(
            axis, proved=False,
            reason=f"the outputs do not depend on its order at all ({control:.1e}): nothing is shown",
        )  # fmt: skip
    return replace(
        axis, proved=True,
        reason=f"permuted: outputs differ by {error:.0e}; with one dimension left out by {control:.0e}",
    )  # fmt: skip


def _without(group: Group, parameter: str) -> Group:
    return replace(group, members=tuple(m for m in group.members if m.parameter != parameter))


def _by_zeroing(
    axis: Axis, bench: _Bench, config: PretrainedConfig, build: Build, axes: Sequence[Axis]
) -> Axis:
    """Half of the units cut, against the same units zeroed in the full model."""
    kept = max(axis.granularity, axis.size // 2 // axis.granularity * axis.granularity)
    if kept >= axis.size:
        return axis
    zeroed = dict(bench.state)
    for group in axis.groups:
        for member in group.members:
            keep = torch.zeros(member.width(group.units))
            for start, length in member.pieces(group.units, kept):
                keep[start : start + length] = 1
            shape = [1] * zeroed[member.parameter].dim()
            shape[member.dim] = -1
            zeroed[member.parameter] = zeroed[member.parameter] * keep.view(shape)
    reference = bench.with_state(zeroed)
    layers = find_axis(axes, "layers")
    every = tuple(range(layers.size)) if layers else ()
    alone = [axis, *([replace(layers, proved=True)] if layers else [])]
    student = build_student(config, build, alone, Shape({axis.name: kept}, every), bench.state)
    error = bench.error(bench.run(student), reference)
    if not error < _TOLERANCE:
        return replace(
            axis, proved=False,
            reason=f"cutting it to {kept} differs from zeroing the same units by {error:.1e}",
        )  # fmt: skip
    return replace(axis, reason=f"{axis.reason}; cut equals zeroed to {error:.0e}")


def _by_skipping(axis: Axis, bench: _Bench, config: PretrainedConfig, build: Build) -> Axis:
    if axis.size < 2:
        return replace(axis, proved=False, reason="one layer only: nothing to drop")
    proved = replace(axis, proved=True)
    worst = 0.0
    for dropped in {0, axis.size - 1}:
        kept = tuple(i for i in range(axis.size) if i != dropped)
        student = build_student(config, build, [proved], Shape({}, kept), bench.state)
        with skipped(bench.model, axis.pattern.format(dropped)):
            reference = bench.run(bench.model)
        worst = max(worst, bench.error(bench.run(student), reference))
        if not worst < _TOLERANCE:
            return replace(
                axis, proved=False,
                reason=f"dropping layer {dropped} differs from skipping it by {worst:.1e}",
            )  # fmt: skip
    return replace(proved, reason=f"dropped equals skipped to {worst:.0e}")


@contextmanager
def skipped(model: nn.Module, layer: str) -> Iterator[None]:
    """Let the layer hand its input through."""

    def through(_module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.get_submodule(layer).register_forward_hook(through, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
