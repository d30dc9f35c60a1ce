"""Smaller models as prefixes of a sorted teacher: sort once, then every student is a view.

Sorting is a permutation along proved axes, so it changes no output. A student of any shape is the
first units of each group and a subset of the layers, renumbered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import (
    Axis,
    Member,
    find_axis,
    first_only,
    identity,
    layer_of,
    members_by_parameter,
    permuted,
    stacks,
)
from limbeck.architecture.blank import NothingDrawn
from limbeck.architecture.fields import Build, Value, changed, ratio_of, read_field
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


def kept_layers(axis: Axis, shape: Shape) -> tuple[int, ...]:
    """Which layers of this stack a shape keeps."""
    if axis.name == "layers":
        return shape.layers
    return tuple(shape.stacks.get(axis.name, range(axis.size)))


def sort_units(
    state_dict: Mapping[str, Tensor], axes: Sequence[Axis], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same function with the most important units first; ties keep their order.

    `scores` are by group name, (units,) each, as `Importance.units`. Entries that lie on no usable
    axis are the given tensors themselves; tied entries stay tied.
    """
    groups = [group for axis in usable(axes) if not axis.labels for group in axis.groups]
    orders = {}
    for group in groups:
        if group.name not in scores or len(scores[group.name]) != group.units:
            raise AxisError(
                group.name, f"has no score for each of its {group.units} units",
                fix="measure the importance on these axes",
            )  # fmt: skip
        orders[group.name] = torch.argsort(scores[group.name], descending=True, stable=True)
    return permuted(state_dict, groups, orders)


def keep_layers(scores: Tensor, n: int, pinned: Sequence[int] = ()) -> tuple[int, ...]:
    """The n layers with the highest scores (L,), ascending; of equals the earlier.

    The `pinned` ones are always among them.
    """
    least = max(1, len(pinned))
    if not least <= n <= len(scores):
        raise AxisError("layers", f"{n} asked for", allowed=f"{least} to {len(scores)}")
    scores = scores.clone()
    scores[list(pinned)] = torch.inf
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:n].tolist()))


def any_layers(axes: Sequence[Axis], n: int) -> tuple[int, ...]:
    """Some n layers that may be kept together: which ones matters to no size and no speed."""
    axis = find_axis(axes, "layers")
    return keep_layers(torch.zeros(axis.size), n, axis.pinned) if axis else ()


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
    _check_conflicts([a for a in axes if shape.sizes.get(a.name, a.size) < a.size])
    known = stacks(axes)
    unknown = sorted(shape.stacks.keys() - {axis.name for axis in known})
    if unknown or (shape.layers and not find_axis(known, "layers")):
        where = unknown[0] if unknown else "layers"
        raise AxisError(f"shape.{where}", "this architecture has no layers to choose from")
    for axis in known:
        _check_layers(axis, kept_layers(axis, shape))


def _check_conflicts(smaller: Sequence[Axis]) -> None:
    """Two axes through one dimension, or with one field, have no common cut."""
    for at, axis in enumerate(smaller):
        for other in smaller[:at]:
            places = [{(m.parameter, m.dim) for g in a.groups for m in g.members}
                      for a in (axis, other)]  # fmt: skip
            if places[0] & places[1] or axis.fields.keys() & other.fields.keys():
                raise AxisError(
                    f"shape.{axis.name}", f"runs through the same weights as {other.name}",
                    allowed="one of the two", fix=f"leave {axis.name} or {other.name} as it is",
                )  # fmt: skip


def _check_layers(axis: Axis, layers: tuple[int, ...]) -> None:
    where, count = f"shape.{axis.name}", axis.size
    if layers == tuple(range(count)):
        return
    if not axis.proved:
        raise AxisError(where, f"not proved for this model: {axis.reason}")
    if not layers or list(layers) != sorted(set(layers) & set(range(count))):
        allowed = f"some of 0 to {count - 1}, each once, ascending"
        raise AxisError(where, f"{list(layers)}", allowed=allowed)
    if lost := set(axis.pinned) - set(layers):
        raise AxisError(where, f"layer {min(lost)} cannot go: {axis.reason}", fix="keep it")


def student_config(
    config: PretrainedConfig, axes: Sequence[Axis], shape: Shape
) -> PretrainedConfig:
    """`config` at that shape. Raises `AxisError` as `check_shape` does."""
    check_shape(axes, shape)
    values: dict[str, Value] = {}
    for name, size in shape.sizes.items():
        axis = find_axis(axes, name)
        assert axis is not None  # check_shape
        if size != axis.size:
            values |= {f: _value(config, f, size * times) for f, times in axis.fields.items()}
    lists: dict[str, list[object]] = {}
    for axis in stacks(axes):
        kept = kept_layers(axis, shape)
        if len(kept) < axis.size:
            values |= {f: _value(config, f, len(kept) * n) for f, n in axis.fields.items()}
            kinds = vars(config).get("layer_types")  # transformers' one per-layer list
            if kinds and len(kinds) == axis.size:
                lists["layer_types"] = [kinds[at] for at in kept]
    new = changed(config, values)
    for name, items in lists.items():
        setattr(new, name, items)
    _name_stages(new)
    return new


def _name_stages(config: PretrainedConfig) -> None:
    """A backbone's config names its stages when it is made, some from the number of layers: one
    that no longer exists would be refused when the student is loaded. Then the last is its output,
    which is the default."""
    names = getattr(config, "stage_names", None)
    if names:
        made = {"stage_names", "out_features", "out_indices"}
        kept = {k: v for k, v in config.to_dict().items() if k not in made}
        now = type(config).from_dict(kept).stage_names
        if now != names:
            config.stage_names = now
            config.set_output_features_output_indices(out_features=None, out_indices=None)


def _value(config: PretrainedConfig, field: str, value: float) -> Value:
    """As the config's own type: a count must be whole."""
    if type(read_field(config, field)) is float:
        return ratio_of(value)
    if abs(value - round(value)) > 1e-6:
        raise AxisError(field, f"{value:.3f} is no whole number")
    return round(value)


def cut(state_dict: Mapping[str, Tensor], axes: Sequence[Axis], shape: Shape) -> dict[str, Tensor]:
    """The student's weights as views of `state_dict`: no copies, and gradients flow back.

    Sort first (`sort_units`): the first units are kept. Layers are renumbered in their order. Only
    a dimension packed from several segments has to be put together anew.
    """
    check_shape(axes, shape)
    kept = {
        axis.pattern: {old: new for new, old in enumerate(kept_layers(axis, shape))}
        for axis in stacks(axes)
    }
    shared = {name for pattern in kept for name in first_only(pattern, state_dict)}
    sizes = {
        g.name: g.kept(shape.sizes.get(axis.name, axis.size), axis.size)
        for axis in axes for g in axis.groups
    }  # fmt: skip
    places = members_by_parameter([group for axis in axes for group in axis.groups])
    result: dict[str, Tensor] = {}
    done: dict[tuple[object, ...], Tensor] = {}  # tied entries stay one tensor
    for name, tensor in state_dict.items():
        pattern, place = _place(name, kept)
        if place and place[0] not in kept[pattern] and name not in shared:
            continue
        key = identity(tensor)
        if key not in done:
            small = tensor
            for group, member in places.get(name, ()):
                small = _first_units(small, member, group.units, sizes[group.name])
            done[key] = small
        value = done[key]
        if place and name not in shared:
            name = f"{pattern.format(kept[pattern][place[0]])}.{place[1]}"
        result[name] = value
    return result


def _place(name: str, patterns: Iterable[str]) -> tuple[str, tuple[int, str] | None]:
    for pattern in patterns:
        if place := layer_of(pattern, name):
            return pattern, place
    return "", None


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
    with torch.random.fork_rng(devices=[]), NothingDrawn():  # all of them are overwritten
        student = build(student_config(config, axes, shape)).eval()
    for tensor in student.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    try:
        found = student.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes differ; its first line only names the class
        which = str(error).splitlines()[1:2] or [str(error)]
        raise AxisError("student", f"the cut weights do not fit: {which[0].strip()}") from error
    if found.unexpected_keys:
        raise AxisError("student", f"{found.unexpected_keys[0]} has no place in it")
    for name, tensor in student.state_dict().items():
        missing = name in found.missing_keys  # a tied name may be: its other name was set
        if _holds_nan(tensor) if tensor.is_floating_point() else missing:
            why = "is missing from the weights" if missing else "holds NaN"
            raise AxisError("student", f"{name} was never initialised: it {why}")
    return student


def _holds_nan(tensor: Tensor) -> bool:
    """A NaN makes the sum one too, which is found in a tenth of the time."""
    return bool(tensor.sum().isnan()) and bool(tensor.isnan().any())
