"""Smaller models as prefixes of a sorted teacher: sort once, then every student is a view.

Sorting is a permutation along proved axes, so it changes no output. A student of any shape is the
first units of each group and a subset of the layers, renumbered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from limbeck.architecture.axes import (
    Axis,
    Group,
    Member,
    find_axis,
    identity,
    layer_of,
    members_by_parameter,
    permuted,
)
from limbeck.architecture.importance import Importance
from limbeck.errors import AxisError
from limbeck.types import Shape

Build = Callable[[PretrainedConfig], nn.Module]


def full_shape(axes: Sequence[Axis]) -> Shape:
    """The teacher's own shape along the axes that are proved."""
    layers = find_axis(axes, "layers")
    sizes = {axis.name: axis.size for axis in axes if axis.proved and axis.groups}
    return Shape(sizes, tuple(range(layers.size)) if layers else ())


def sort_units(
    state_dict: Mapping[str, Tensor], axes: Sequence[Axis], importance: Importance
) -> dict[str, Tensor]:
    """The same function with the most important units first; ties keep their order.

    Entries that lie on no proved axis are the given tensors themselves; tied entries stay tied.
    """
    groups = [group for axis in axes if axis.proved for group in axis.groups]
    orders = {}
    for group in groups:
        scores = importance.units.get(group.name)
        if scores is None or len(scores) != group.units:
            raise AxisError(group.name, "the importance was not measured on these axes")
        orders[group.name] = torch.argsort(scores, descending=True, stable=True)
    return permuted(state_dict, groups, orders)


def keep_layers(importance: Importance, n: int) -> tuple[int, ...]:
    """The n most important layers, ascending; of equals the earlier."""
    count = len(importance.layers)
    if not 1 <= n <= count:
        raise AxisError("layers", f"{n} asked for", allowed=f"1 to {count}")
    order = torch.argsort(importance.layers, descending=True, stable=True)
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


def cut(
    state_dict: Mapping[str, Tensor], axes: Sequence[Axis], shape: Shape
) -> dict[str, Tensor]:
    """The student's weights as views of `state_dict`: no copies, and gradients flow back.

    Sort first (`sort_units`): the first units are kept. Layers are renumbered in their order. Only
    a dimension packed from several segments has to be put together anew.
    """
    check_shape(axes, shape)
    pattern = layers.pattern if (layers := find_axis(axes, "layers")) else ""
    kept = {old: new for new, old in enumerate(shape.layers)}
    places = {
        name: [(group, member, shape.sizes.get(axis.name, axis.size)) for group, member in found]
        for axis in axes
        for name, found in members_by_parameter(axis.groups).items()
    }
    for axis in axes:
        for name, found in members_by_parameter(axis.groups).items():
            size = shape.sizes.get(axis.name, axis.size)
            places.setdefault(name, []).extend((g, m, g.units * size // axis.size) for g, m in found)
    result: dict[str, Tensor] = {}
    done: dict[tuple[object, ...], Tensor] = {}
    for name, tensor in state_dict.items():
        place = layer_of(pattern, name)
        if place and place[0] not in kept:
            continue
        key = identity(tensor)
        if key not in done:
            done[key] = _narrowed(tensor, places.get(name, []))
        new = f"{pattern.format(kept[place[0]])}.{place[1]}" if place else name
        result[new] = done[key]
    return result
