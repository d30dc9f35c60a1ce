"""Proof of a cut: the smaller model equals the full one with the cut units zeroed.

It holds for every width: a count of heads that regroups channels unseen, a segment taken for a
block, or a size that code rounds would all differ. Two things follow the size by design, and the
full model is given them for the comparison, so that nothing else can differ:

- a norm's statistics: a norm whose weight lies on the axis is computed by the smaller model's norm
  over the kept channels. That is fair only if both take the same statistics (a group norm could
  form other groups): on values that repeat, so that the cut channels change no mean and no
  variance, the two have to give the same;
- constants that code computes from the size (Gemma's embedding scale, a key's scaling): they are
  set to the smaller model's, and named. So is one factor common to all outputs (T5's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Member, find_axis
from limbeck.architecture.fields import numbers
from limbeck.architecture.loaded import Loaded, Refused, difference

Places = Mapping[tuple[str, int], Tensor]  # (parameter, dimension) -> channels that are kept


def zeroing(axis: Axis, bench: Loaded) -> str:
    """What was shown, of this axis and those that it is coupled to. Raises Refused."""
    whole = next((other.name for other in bench.axes if axis.name in other.coupled), None)
    if whole:
        return f"it is cut together with {whole}: see there"
    together = (axis, *(o for name in axis.coupled if (o := find_axis(bench.axes, name))))
    moved = bench.moved([group for one in together for group in one.groups])
    sizes, student = _student(together, moved, bench)
    kept = _kept_channels(together, sizes)
    norms = _norms(together, sizes, bench.model)
    zeroed = _zeroed(moved, kept)
    constants = _computed(student, bench)
    names = {name.rpartition(".")[2] for name in constants}
    with _norms_of(student, bench, norms), _numbers_of(student, bench.model) as numbers:
        reference = bench.under({**zeroed, **constants})
    logits = bench.run(student)
    error, factor = difference(logits, reference), 1.0
    if not error < bench.limit and logits.shape == reference.shape:
        factor = float((logits * reference).sum() / reference.square().sum().clamp_min(1e-30))
        error = min(error, difference(logits, factor * reference))
    named = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if not error < bench.limit:
        raise Refused(f"cutting to {named} differs from zeroing the same units by {error:.1e}")
    said = [f"cut to {named} equals zeroed to {error:.0e}"]
    said += [f"but for a factor {factor:.3g} on all outputs"] if factor != 1 else []
    if followed := sorted(names | numbers):
        said.append(f"with {', '.join(followed)} computed from the smaller size")
    if norms:
        said.append("norms over what is left")
    return ", ".join(said)


def _student(
    together: Sequence[Axis], moved: Mapping[str, Tensor], bench: Loaded
) -> tuple[dict[str, int], nn.Module]:
    problem: Refused | None = None
    for sizes in _smaller(together):
        try:
            student = bench.student(bench.shape(sizes), moved)
            _check_config(student.config)  # type: ignore[arg-type]
            return sizes, student
        except Refused as refusal:  # one size may be special: a projection falls away
            problem = problem or refusal
    raise problem or Refused(f"there is no size below {together[0].size}")


def _check_config(config: PretrainedConfig) -> None:
    """Raises Refused where a config computes a number itself as soon as its file is read."""
    before, after = numbers(config), numbers(type(config).from_dict(config.to_dict()))
    for field, value in after.items():
        if before.get(field, value) != value:
            why = f"{before[field]} in the smaller model, and {value} once its config is read"
            raise Refused(f"{field} is {why}: it could not be loaded")


def _smaller(together: Sequence[Axis]) -> Iterator[dict[str, int]]:
    """Sizes to try: about half first, and two units of what is coupled, so that they can swap."""
    axis, *partners = together
    steps = axis.size // axis.granularity
    half = min(max(2, steps // 2), steps - 1)
    for kept in dict.fromkeys((half, half + 1, half - 1)):
        if 0 < kept < steps:
            size = kept * axis.granularity
            yield {axis.name: size, **{p.name: size // axis.coupled[p.name] for p in partners}}


def _kept_channels(together: Sequence[Axis], sizes: Mapping[str, int]) -> Places:
    return {
        (member.parameter, member.dim): _channels(
            member, group.units, group.kept(sizes[axis.name], axis.size)
        )
        for axis in together for group in axis.groups for member in group.members
    }  # fmt: skip


def _zeroed(state: Mapping[str, Tensor], kept: Places) -> dict[str, Tensor]:
    """Zeros in all channels that are not kept."""
    result = dict(state)
    for (name, dim), channels in kept.items():
        if name in result:  # else another name of a tied one
            shape = [-1 if d == dim else 1 for d in range(result[name].dim())]
            mask = torch.zeros(result[name].shape[dim]).index_fill(0, channels, 1)
            result[name] = result[name] * mask.view(shape)
    return result


def _norms(
    together: Sequence[Axis], sizes: Mapping[str, int], model: nn.Module
) -> dict[str, tuple[Member, int, int]]:
    """Modules whose statistics are taken over the units: (how they lie, all units, those left).

    A module of vectors alone, whose statistics are not stored as a batch norm's are.
    """
    found = {}
    for axis in together:
        for group in axis.groups:
            for member in group.members:
                owner, _, name = member.parameter.rpartition(".")
                module = model.get_submodule(owner)
                flat = all(p.dim() == 1 for p in module.parameters(recurse=False))
                if name == "weight" and flat and "running_mean" not in dict(module.named_buffers()):
                    kept = group.kept(sizes[axis.name], axis.size)
                    found[owner] = (member, group.units, kept)
    return found


@contextmanager
def _norms_of(
    student: nn.Module, bench: Loaded, norms: Mapping[str, tuple[Member, int, int]]
) -> Iterator[None]:
    """Let the model's norms be those of the student, over the kept channels; zeros elsewhere."""

    def restricted(small: nn.Module, path: str) -> Any:
        member, units, kept = norms[path]
        channels = _channels(member, units, kept)
        wide, narrow = _repeats(member, units, kept)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            # Where two dimensions are as wide the last is taken; a wrong one could only refuse.
            dim = max(d for d in range(output.dim()) if output.shape[d] == len(wide))

            def called(norm: nn.Module, change: Callable[[Tensor], Tensor]) -> Tensor:
                def given(value: Any) -> Any:
                    same = isinstance(value, Tensor) and value.shape == output.shape
                    return change(value) if same else value

                return norm.forward(*map(given, args), **{k: given(v) for k, v in kwargs.items()})

            shape = list(output.shape)
            shape[dim] = int(wide.max()) + 1
            some = torch.randn(shape, generator=bench.random, dtype=output.dtype)
            full = called(module, lambda _: some.index_select(dim, wide))
            few = called(small, lambda _: some.index_select(dim, narrow))
            error = difference(full.index_select(dim, channels), few)
            if not error < bench.limit:
                raise Refused(f"{path} takes other statistics in the smaller model ({error:.1e})")
            few = called(small, lambda value: value.index_select(dim, channels))
            return torch.zeros_like(output).index_copy(dim, channels, few)

        return hook

    handles = [
        bench.model.get_submodule(path).register_forward_hook(
            restricted(student.get_submodule(path), path), with_kwargs=True
        )
        for path in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(member: Member, units: int, kept: int) -> Tensor:
    """The channels that the first `kept` units own, and the tail."""
    pieces = member.pieces(units, kept)
    return torch.cat([torch.arange(start, start + length) for start, length in pieces])


def _repeats(member: Member, units: int, kept: int) -> tuple[Tensor, Tensor]:
    """Which value each channel gets, of all units and of those kept: in every segment some values
    over and over, so that both have the same mean and variance."""
    once = math.gcd(units, kept)
    wide, narrow, start = [], [], 0
    for times in member.segments:
        width = once * member.block * times
        if width < 2:
            raise Refused(f"{kept} of {units} units are too few to compare {member.parameter} by")
        values = torch.arange(start, start + width)
        wide.append(values.repeat(units // once))
        narrow.append(values.repeat(kept // once))
        start += width
    tail = torch.arange(start, start + member.tail)
    return torch.cat([*wide, tail]), torch.cat([*narrow, tail])


def _computed(student: nn.Module, bench: Loaded) -> dict[str, Tensor]:
    """Buffers of one number that are never stored, where the student's differ from the model's."""
    stored = student.state_dict().keys()
    return {
        name: buffer
        for name, buffer in student.named_buffers()
        if name not in stored and buffer.dim() == 0
        and name in bench.state and not torch.equal(buffer, bench.state[name])
    }  # fmt: skip


@contextmanager
def _numbers_of(student: nn.Module, model: nn.Module) -> Iterator[set[str]]:
    """Give the model's modules those of the student's floats that are others; gives their names."""
    saved: list[tuple[nn.Module, str, float]] = []
    for path, small in student.named_modules():
        module = model.get_submodule(path)
        for name, value in vars(small).items():
            own = vars(module).get(name)
            if type(value) is float and type(own) is float and own != value:
                saved.append((module, name, own))
                setattr(module, name, value)
    try:
        yield {name for _, name, _ in saved}
    finally:
        for module, name, own in saved:
            setattr(module, name, own)
