"""Smaller models as prefixes of a sorted teacher: sort once, then every student is a view.

Sorting is a permutation along proved axes, so it changes no output. A student of any shape is the
first units of each group and a subset of the layers, renumbered.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import (
    Axis,
    Member,
    find_axis,
    identity,
    layer_of,
    members_by_parameter,
    permuted,
)
from limbeck.architecture.fields import Build
from limbeck.errors import AxisError
from limbeck.types import Shape


def usable(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes that can be cut: proved, and whatever they are coupled to proved as well."""
    bad = {axis.name for axis in axes if not axis.proved}
    lost = set(bad)
    for axis in axes:  # a coupling holds both ways: heads alone would regroup the channels
        if axis.coupled and (axis.name in bad or bad & set(axis.coupled)):
            lost |= {axis.name, *axis.coupled}
    return tuple(axis for axis in axes if axis.name not in lost)


def full_shape(axes: Sequence[Axis]) -> Shape:
    """The teacher's own shape, along the axes that can be cut."""
    layers = find_axis(axes, "layers")
    sizes = {axis.name: axis.size for axis in usable(axes) if axis.groups}
    return Shape(sizes, tuple(range(layers.size)) if layers else ())


def sort_units(
    state_dict: Mapping[str, Tensor], axes: Sequence[Axis], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same function with the most important units first; ties keep their order.

    `scores` are by group name, (units,) each, as `Importance.units`. Entries that lie on no usable
    axis are the given tensors themselves; tied entries stay tied.
    """
    groups = [group for axis in usable(axes) for group in axis.groups]
    orders = {}
    for group in groups:
        if group.name not in scores or len(scores[group.name]) != group.units:
            raise AxisError(
                group.name, f"has no score for each of its {group.units} units",
                fix="measure the importance on these axes",
            )  # fmt: skip
        orders[group.name] = torch.argsort(scores[group.name], descending=True, stable=True)
    return permuted(state_dict, groups, orders)


def keep_layers(scores: Tensor, n: int) -> tuple[int, ...]:
    """The n layers with the highest scores (L,), ascending; of equals the earlier."""
    if not 1 <= n <= len(scores):
        raise AxisError("layers", f"{n} asked for", allowed=f"1 to {len(scores)}")
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:n].tolist()))


def check_shape(axes: Sequence[Axis], shape: Shape) -> None:
    """Raises `AxisError` unless every size lies on a proved axis, on its grid, and they agree.

    An axis that `shape.sizes` does not name keeps the teacher's size.
    """
    names = sorted(axis.name for axis in axes if axis.groups)
    for name, size in shape.sizes.items():
        axis = find_axis(axes, name)
        if axis is None or not (axis.groups or size == axis.size):
            reason = axis.reason if axis else "no such axis"
            raise AxisError(f"shape.{name}", reason, allowed=", ".join(names))
        if size == axis.size:
            continue
        if not axis.proved:
            raise AxisError(f"shape.{name}", f"not proved for this model: {axis.reason}")
        if not 0 < size < axis.size or size % axis.granularity:
            allowed = f"multiples of {axis.granularity} up to {axis.size}"
            raise AxisError(f"shape.{name}", f"{size} cannot be", allowed=allowed)
    for axis in axes:
        if not axis.groups:
            continue
        for other, times in axis.coupled.items():
            partner = find_axis(axes, other)
            size = shape.sizes.get(axis.name, axis.size)
            theirs = shape.sizes.get(other, partner.size if partner else 0)
            if size != times * theirs:
                raise AxisError(
                    f"shape.{axis.name}",
                    f"{size} does not fit {other}={theirs}",
                    allowed=f"{axis.name} = {times} * {other}",
                    fix="change both together",
                )
    _check_layers(axes, shape.layers)


def _check_layers(axes: Sequence[Axis], layers: tuple[int, ...]) -> None:
    axis = find_axis(axes, "layers")
    count = axis.size if axis else 0
    if layers == tuple(range(count)):
        return
    if axis is None:
        raise AxisError("shape.layers", "this architecture has no layers to choose from")
    if not axis.proved:
        raise AxisError("shape.layers", f"not proved for this model: {axis.reason}")
    if not layers or list(layers) != sorted(set(layers) & set(range(count))):
        allowed = f"some of 0 to {count - 1}, each once, ascending"
        raise AxisError("shape.layers", f"{list(layers)}", allowed=allowed)


def student_config(
    config: PretrainedConfig, axes: Sequence[Axis], shape: Shape
) -> PretrainedConfig:
    """`config` at that shape. Raises `AxisError` as `check_shape` does."""
    check_shape(axes, shape)
    new = copy.deepcopy(config)
    for name, size in shape.sizes.items():
        axis = find_axis(axes, name)
        assert axis is not None  # check_shape
        for field, times in axis.fields.items():
            setattr(new, field, size * times)
    layers = find_axis(axes, "layers")
    if layers is not None:
        for field, times in layers.fields.items():
            setattr(new, field, len(shape.layers) * times)
        kinds = getattr(config, "layer_types", None)  # transformers' one per-layer list
        if kinds and len(kinds) == layers.size:
            new.layer_types = [kinds[at] for at in shape.layers]
    return new


def cut(state_dict: Mapping[str, Tensor], axes: Sequence[Axis], shape: Shape) -> dict[str, Tensor]:
    """The student's weights as views of `state_dict`: no copies, and gradients flow back.

    Sort first (`sort_units`): the first units are kept. Layers are renumbered in their order. Only
    a dimension packed from several segments has to be put together anew.
    """
    check_shape(axes, shape)
    layers = find_axis(axes, "layers")
    pattern = layers.pattern if layers else ""
    kept = {old: new for new, old in enumerate(shape.layers)}
    sizes = {g.name: shape.sizes.get(axis.name, g.units) for axis in axes for g in axis.groups}
    places = members_by_parameter([group for axis in axes for group in axis.groups])
    result: dict[str, Tensor] = {}
    done: dict[tuple[object, ...], Tensor] = {}  # tied entries stay one tensor
    for name, tensor in state_dict.items():
        place = layer_of(pattern, name)
        if place and place[0] not in kept:
            continue
        key = identity(tensor)
        if key not in done:
            small = tensor
            for group, member in places.get(name, ()):
                small = _first_units(small, member, group.units, sizes[group.name])
            done[key] = small
        new = f"{pattern.format(kept[place[0]])}.{place[1]}" if place else name
        result[new] = done[key]
    return result


def _first_units(tensor: Tensor, member: Member, units: int, kept: int) -> Tensor:
    if kept == units:
        return tensor
    pieces = [tensor.narrow(member.dim, *piece) for piece in member.pieces(units, kept)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, member.dim)


def shape_parameters(
    config: PretrainedConfig, build: Build, axes: Sequence[Axis], shape: Shape
) -> int:
    """Exact number of parameters of the student of that shape, tied ones once; no weights made."""
    with torch.device("meta"):
        model = build(student_config(config, axes, shape))
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def build_student(
    config: PretrainedConfig,
    build: Build,
    axes: Sequence[Axis],
    shape: Shape,
    state: Mapping[str, Tensor],
) -> nn.Module:
    """A model of its own at that shape, with copies of the first units of `state`; in eval mode.

    Its weights are NaN until they are set, so that none keeps a random start unseen. Raises
    `AxisError` where weights and model do not fit each other or a weight was never initialised.
    """
    weights = cut(state, axes, shape)
    with torch.random.fork_rng(devices=[]):  # weights that are overwritten cost no luck
        student = build(student_config(config, axes, shape)).eval()
    for tensor in student.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    try:
        found = student.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes differ
        raise AxisError("student", f"the cut weights do not fit: {error}") from error
    if found.unexpected_keys:
        raise AxisError("student", f"{found.unexpected_keys[0]} has no place in it")
    for name, tensor in student.state_dict().items():
        missing = name in found.missing_keys  # a tied name may be: its other name was set
        if tensor.isnan().any() if tensor.is_floating_point() else missing:
            why = "is missing from the weights" if missing else "holds NaN"
            raise AxisError("student", f"{name} was never initialised: it {why}")
    return student
