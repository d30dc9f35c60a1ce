"""Prove each axis on the loaded model, or refuse it with a sentence.

- permuting the units of all its groups at random leaves the outputs as they were;
- in every group leaving one dimension out, or moving half units, does not (else nothing is shown);
- where each group lies in one layer, the cut equals the full model with the cut units zeroed;
  elsewhere norms span the axis, and the smaller model must be found to have the same units;
- a model with layers dropped equals the model with these layers skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group, find_axis, layer_of, stacks
from limbeck.architecture.cut import cut
from limbeck.architecture.fields import Build
from limbeck.architecture.loaded import TOLERANCE, Loaded, Refused, difference
from limbeck.architecture.proof_layers import skipping
from limbeck.architecture.proof_vocab import renaming
from limbeck.types import Shape

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
        bench = Loaded(model, config, build, trusted, inputs, seed)
        found = [_verdict(axis, bench) for axis in axes]
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
    tests: tuple[Callable[[Axis, Loaded], str], ...]
    if axis.labels:
        tests = (_layout, renaming)
    elif axis.groups:
        inside = _lies_inside_layers(axis, bench) or _is_coupled(axis, bench)
        tests = (_layout, _permutation, _zeroing if inside else _same_units)
    elif not axis.pattern:
        return axis  # refused when it was looked for
    try:
        if axis.pattern:
            pinned, reason = skipping(axis, bench)
            return replace(axis, proved=True, pinned=pinned, reason=reason)
        reason = "; ".join(sentence for test in tests if (sentence := test(axis, bench)))
        return replace(axis, proved=True, reason=reason)
    except Refused as refusal:
        return replace(axis, proved=False, reason=str(refusal))


def _lies_inside_layers(axis: Axis, bench: Loaded) -> bool:
    def home(parameter: str) -> tuple[str, int] | None:
        for stack in stacks(bench.axes):
            if place := layer_of(stack.pattern, parameter):
                return stack.pattern, place[0]
        return None

    homes = [{home(m.parameter) for m in group.members} for group in axis.groups]
    return all(len(found) == 1 and None not in found for found in homes)


def _is_coupled(axis: Axis, bench: Loaded) -> bool:
    return any(axis.name in other.coupled for other in bench.axes)


def _layout(axis: Axis, bench: Loaded) -> str:
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
    return ""


def _flat(tensor: Tensor, dim: int) -> bool:
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


def _permutation(axis: Axis, bench: Loaded) -> str:
    error = difference(bench.under(bench.moved(axis.groups)), bench.reference)
    if not error < TOLERANCE:
        culprit = _culprit(list(axis.groups), bench)
        raise Refused(
            f"permuting the units of {culprit} changes the outputs by {error:.1e}: they are not "
            "interchangeable, or not all of their dimensions are known"
        )
    control = min(_control(group, bench) for group in axis.groups)
    return f"permuted: outputs differ by {error:.0e}, with one dimension left out by {control:.0e}"


def _culprit(groups: list[Group], bench: Loaded) -> str:
    while len(groups) > 1:
        half = groups[: len(groups) // 2]
        failed = not difference(bench.under(bench.moved(half)), bench.reference) < TOLERANCE
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
        seen = bench.change(rest, bench.order(group.units))
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
    return not bench.change(finer, torch.arange(finer.units).roll(1))  # each block gets mixed


def _zeroing(axis: Axis, bench: Loaded) -> str:
    """Half of the units, drawn at random, cut; against the same units zeroed."""
    kept = max(axis.granularity, axis.size // 2 // axis.granularity * axis.granularity)
    if kept >= axis.size:
        raise Refused(f"there is no size below {axis.size}")
    moved = bench.moved(axis.groups)
    zeroed = dict(moved)
    for group in axis.groups:
        for member in group.members:
            if member.parameter not in zeroed:
                continue
            keep = torch.zeros(member.width(group.units))
            for start, length in member.pieces(group.units, group.kept(kept, axis.size)):
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
        logits = bench.run(bench.student(bench.shape({axis.name: kept}), moved))
    error = difference(logits, reference)
    if error < TOLERANCE:
        return f"cut equals zeroed to {error:.0e}"
    if _is_coupled(axis, bench):  # the full model's code regroups the smaller weights, or a norm
        return "not cut alone; see the axis it is coupled to"
    if _spanned_by_norm(axis, bench):
        return f"a norm spans it, so a cut is not the zeroed model; {_same_units(axis, bench)}"
    raise Refused(f"cutting it to {kept} differs from zeroing the same units by {error:.1e}")


def _spanned_by_norm(axis: Axis, bench: Loaded) -> bool:
    """Whether statistics are taken over the units: a module of vectors alone, whose statistics are
    not stored as a batch norm's are."""
    for parameter in {m.parameter for group in axis.groups for m in group.members}:
        owner, _, name = parameter.rpartition(".")
        module = bench.model.get_submodule(owner)
        flat = all(p.dim() == 1 for p in module.parameters(recurse=False))
        if name == "weight" and flat and "running_mean" not in dict(module.named_buffers()):
            return True
    return False


def _same_units(axis: Axis, bench: Loaded) -> str:
    """A smaller model runs, and sees the same units: a count of heads regroups them unseen."""
    partners = [other for name in axis.coupled if (other := find_axis(bench.axes, name))]
    moved = bench.moved([group for one in (axis, *partners) for group in one.groups])
    problem: Refused | None = None
    for sizes in _smaller(axis, partners):
        try:
            student = bench.student(bench.shape(sizes), moved)
            break
        except Refused as refusal:  # one size may be special: a projection falls away
            problem = refusal
    else:
        raise problem or Refused(f"there is no size below {axis.size}")
    small = Loaded(student, bench.config, bench.build, bench.axes, bench.inputs, 0)
    small.random = bench.random
    worst = 0.0
    for one in (axis, *partners):
        size = sizes[one.name]
        groups = [replace(group, units=group.kept(size, one.size)) for group in one.groups]
        groups = [group for group in groups if group.units > 1]
        error = difference(small.under(small.moved(groups)), small.reference)
        if not error < TOLERANCE:
            raise Refused(f"a model of {one.name}={size} has other units ({error:.1e})")
        worst = max(worst, error)
        if any(_has_smaller_units(group, small) for group in groups):
            raise Refused(f"a model of {one.name}={size} has smaller units")
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
