"""Prove each axis on the loaded model, or refuse it with a sentence.

- permuting the units of all its groups at random leaves the outputs as they were;
- in every group leaving one dimension out, or moving half units, does not (else nothing is shown);
- the smaller model equals the full one with the cut units zeroed (`proof_cut`): each axis alone,
  and those that only move together together;
- a model with layers dropped equals the model with these layers skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group
from limbeck.architecture.fields import Build
from limbeck.architecture.loaded import Loaded, Refused, difference
from limbeck.architecture.proof_cut import zeroing
from limbeck.architecture.proof_layers import skipping
from limbeck.architecture.proof_vocab import renaming

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
    told: Callable[[int], object] | None = None,
) -> tuple[Axis, ...]:
    """The same axes, each proved or refused with its reason. The model (fp32) is left as it was.

    `told` the number of axes done since it was last told.
    """
    training = model.training
    model.eval()
    try:
        trusted = [replace(axis, proved=True) for axis in axes]  # what a cut would presuppose
        bench = Loaded(model, config, build, trusted, inputs, seed)
        found = []
        for axis in axes:
            found.append(_verdict(axis, bench))
            if told is not None:
                told(1)
    finally:
        model.train(training)
    lost = {axis.name for axis in found if not axis.proved}
    for at, axis in enumerate(found):
        partners = {*axis.coupled, *(other.name for other in axes if axis.name in other.coupled)}
        if axis.proved and partners & lost:
            why = f"it moves only together with {min(partners & lost)}, which is refused"
            found[at] = replace(axis, proved=False, reason=why)
    return tuple(found)


def _verdict(axis: Axis, bench: Loaded) -> Axis:
    if not axis.groups and not axis.pattern:
        return axis  # refused when it was looked for
    try:
        if axis.pattern:
            pinned, reason = skipping(axis, bench)
            return replace(axis, proved=True, pinned=pinned, reason=reason)
        _layout(axis, bench)
        reason = renaming(axis, bench) if axis.labels else _units(axis, bench)
        return replace(axis, proved=True, reason=reason)
    except Refused as refusal:
        return replace(axis, proved=False, reason=str(refusal))


def _units(axis: Axis, bench: Loaded) -> str:
    said, control = _permutation(axis, bench)
    if control < 10 * bench.limit:  # rounding would hide a mistake
        bench = bench.wide
        said, _ = _permutation(axis, bench)
    return f"{said}; {zeroing(axis, bench)}"


def _layout(axis: Axis, bench: Loaded) -> None:
    for group in axis.groups:
        if group.units * (axis.size - axis.granularity) % axis.size:
            raise Refused(f"{group.name} has {group.units} units, which do not follow {axis.size}")
        for member in group.members:
            tensor = bench.state.get(member.parameter)
            if tensor is None:
                if member.parameter not in bench.held:  # else another name of a tied one
                    raise Refused(f"{member.parameter} is not in this model")
                continue
            if member.dim >= tensor.dim() or tensor.shape[member.dim] != member.width(group.units):
                raise Refused(f"{member.parameter} has not the size that {group.name} needs")
            if member.parameter not in bench.saved and not _flat(tensor, member.dim):
                why = "is computed anew when a model loads, so it cannot follow a permutation"
                raise Refused(f"{member.parameter} {why}")


def _flat(tensor: Tensor, dim: int) -> bool:
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


def _permutation(axis: Axis, bench: Loaded) -> tuple[str, float]:
    """(What was shown, how much a wrong permutation of some group changes the outputs.)"""
    error = difference(bench.under(bench.moved(axis.groups)), bench.reference)
    if not error < bench.limit:
        culprit = _culprit(list(axis.groups), bench)
        raise Refused(
            f"permuting the units of {culprit} changes the outputs by {error:.1e}: they are not "
            "interchangeable, or not all of their dimensions are known"
        )
    control = min(_control(group, bench) for group in axis.groups)
    shown = f"outputs differ by {error:.0e}, with one dimension left out by {control:.0e}"
    return f"permuted: {shown}", control


def _culprit(groups: list[Group], bench: Loaded) -> str:
    while len(groups) > 1:
        half = groups[: len(groups) // 2]
        failed = not difference(bench.under(bench.moved(half)), bench.reference) < bench.limit
        groups = half if failed else groups[len(groups) // 2 :]
    return groups[0].name


def _control(group: Group, bench: Loaded) -> float:
    """How much a wrong permutation of this group changes the outputs."""
    known = [m for m in group.members if m.parameter in bench.state]
    known.sort(key=lambda m: bench.state[m.parameter].dim() < 2)  # matrices first
    matrices = [m for m in known if bench.state[m.parameter].dim() > 1] or known
    seen = 0.0
    for at in torch.randperm(len(matrices), generator=bench.random).tolist()[:_CONTROLS]:
        rest = replace(group, members=tuple(m for m in group.members if m != matrices[at]))
        order = bench.order(group.units)
        seen = bench.change(rest, order) or bench.wide.change(rest, order)
        if seen:
            break
    if not seen:
        raise Refused(f"the order of {group.name} does not reach the outputs: nothing is shown")
    if _has_smaller_units(group, bench):
        raise Refused(f"{group.name} has smaller units than the blocks it was given")
    return seen


def _has_smaller_units(group: Group, bench: Loaded) -> bool:
    """Whether halves (thirds, ...) of the blocks are interchangeable too: then the blocks are not
    the units, but several of them."""
    block = min(member.block for member in group.members)
    part = next((d for d in range(2, block + 1) if block % d == 0), 1)
    if part == 1 or group.units < 2 or any(m.block % part for m in group.members):
        return False
    members = tuple(replace(m, block=m.block // part) for m in group.members)
    finer = replace(group, units=group.units * part, members=members)
    mixed = torch.arange(finer.units).roll(1)  # every block
    return not (bench.change(finer, mixed) or bench.wide.change(finer, mixed))
