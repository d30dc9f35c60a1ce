"""A family: one set of shared weights, and plain models of several sizes that are views of it.

Each size is a model of its own config whose parameters lie in the shared storage: its forward needs
nothing special, threads may run it side by side, the gradient of its loss is as small as it is, and
what one size learns the others have. A dedicated student is a family of one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import (
    Axis,
    Group,
    identity,
    layer_of,
    stacks,
)
from limbeck.architecture.cut import build_student, check_shape, kept_layers, student_config
from limbeck.architecture.fields import Build
from limbeck.errors import AxisError
from limbeck.types import Shape

Region = tuple[slice, ...]

_TABLE = 64  # rows from which on a table's gradient is kept by rows


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter of one size lies: regions of a shared tensor, each with one of its own."""

    shared: str  # name among the family's weights
    regions: tuple[tuple[Region, Region], ...]

    @property
    def is_view(self) -> bool:
        return len(self.regions) == 1

    def of(self, tensor: Tensor) -> Tensor:
        """A view of a tensor that is laid out as the shared one, where there is one region."""
        if self.is_view:
            return tensor[self.regions[0][0]]
        size = [max(own[d].stop for _, own in self.regions) for d in range(tensor.dim())]
        small = tensor.new_empty(size)
        for big, own in self.regions:
            small[own] = tensor[big]
        return small


@dataclass(frozen=True)
class Size:
    """One member: a plain model whose parameters are views of the shared weights.

    A parameter that is packed from several segments cannot be a view: `refresh` renews its copy.
    """

    name: str
    shape: Shape
    model: nn.Module
    places: Mapping[str, Place] = field(repr=False)  # by the model's own names

    @cached_property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @property
    def work(self) -> int:
        """Weights that each position is multiplied with: matrices, but not tables of embeddings
        that are looked up only. What a size costs grows with it, slower than in proportion."""
        modules = (m for m in self.model.modules() if not isinstance(m, nn.Embedding))
        found = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
        return sum(p.numel() for p in found.values() if p.dim() > 1)

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """Before a forward, where the weights may have changed."""
        with torch.no_grad():
            for name, parameter in self.trainable:
                place = self.places[name]
                if not place.is_view:
                    parameter.copy_(place.of(weights[place.shared]))


class Family:
    """The shared weights by the teacher's names, cut to what the sizes need of them.

    `state` are the sorted teacher's weights and buffers; nothing of them is changed. Buffers, such
    as BatchNorm's statistics, are each size's own.

    Raises AxisError for a shape that does not lie on the axes.
    """

    def __init__(
        self, config: PretrainedConfig, build: Build, axes: Sequence[Axis],
        shapes: Mapping[str, Shape], state: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        assert shapes
        self.config, self.build, self.teachers_axes = config, build, tuple(axes)
        shapes = {name: _complete(axes, shape) for name, shape in shapes.items()}
        hull = _hull(shapes.values())
        self.axes = tuple(_resized(axis, hull) for axis in axes)
        names: dict[tuple[object, ...], str] = {}  # of tied entries the first
        self.first_names: dict[str, str] = {}  # by the teacher's names
        self.weights: dict[str, Tensor] = {}
        self.tables: set[str] = set()  # weights whose gradient comes by rows
        self.sizes: dict[str, Size] = {}
        self.apart: dict[str, Family] = {}
        for size, shape in shapes.items():
            model = build_student(config, build, axes, shape, state)  # buffers stay its own
            places = {}
            for name, _ in model.named_parameters():
                teachers = _teachers_name(axes, shape, name)
                shared = names.setdefault(identity(state[teachers]), teachers)
                self.first_names[teachers] = shared
                if shared not in self.weights:
                    regions = _regions(state[shared], shared, axes, hull)
                    self.weights[shared] = Place(shared, regions).of(state[shared]).clone()
                regions = _regions(self.weights[shared], shared, self.axes, shape)
                places[name] = Place(shared, regions)
            self.sizes[size] = Size(size, shape, model, places)
            self._adopt(self.sizes[size])

    @classmethod
    def of_one(cls, model: nn.Module, name: str = "model") -> Family:
        """A model as it is: its own parameters are the weights. Any `nn.Module`."""
        family = cls.__new__(cls)
        family.weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        family.tables, family.apart = set(), {}
        places = {n: Place(n, (_everything(w),)) for n, w in family.weights.items()}
        family.sizes = {name: Size(name, Shape({}, ()), model, places)}
        return family

    @torch.no_grad()
    def to(self, device: torch.device) -> None:
        """The weights and every size's model, in place; the models' parameters stay views."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        for size in self.sizes.values():
            size.model.to(device)
            for name, parameter in size.model.named_parameters():
                place = size.places.get(name)  # none where it does not learn
                if place is not None and place.is_view:
                    parameter.data = place.of(self.weights[place.shared])

    def _adopt(self, size: Size) -> None:
        """Puts views of the shared weights in place of the model's own parameters."""
        new: dict[int, nn.Parameter] = {}
        for name, parameter in size.model.named_parameters():
            place = size.places[name]
            new[id(parameter)] = nn.Parameter(place.of(self.weights[place.shared]))
        for module in size.model.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    module._parameters[name] = new[id(old)]  # tied ones stay tied
            if isinstance(module, nn.Embedding):
                # its gradient then has a row for each token of the batch and not of the vocabulary
                uses = sum(p is module.weight for p in _all_parameters(size.model))
                module.sparse = uses == 1 and len(module.weight) >= _TABLE
        for name, module in size.model.named_modules():
            if isinstance(module, nn.Embedding) and module.sparse:
                self.tables.add(size.places[f"{name}.weight"].shared)

    def state(self) -> dict[str, Tensor]:
        """The shared weights, and each size's own buffers as 'size/name'."""
        buffers = {
            f"{size.name}/{name}": buffer
            for size in self.sizes.values()
            for kept in (size.model.state_dict().keys(),)
            for name, buffer in size.model.named_buffers()
            if name in kept
        }
        return self.weights | buffers

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """In place. Raises KeyError for what is missing."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def size_of(self, shape: Shape) -> str | None:
        """The name of the size that has this shape."""
        shape = _complete(self.teachers_axes, shape)
        return next((name for name, size in self.sizes.items() if size.shape == shape), None)

    def cut(
        self, shape: Shape, *, settle: Callable[[nn.Module], None] | None = None
    ) -> nn.Module:
        """A plain model of its own at any shape within the family's, in eval mode: `ffn` and
        `layers` between two sizes, say. `settle` measures its running statistics.

        Raises AxisError for a shape that the family does not hold, and without `settle` for models
        with running statistics, which each size has of its own.
        """
        shape = _complete(self.teachers_axes, shape)
        largest = {axis.name: axis.size for axis in self.axes}
        for name, size in shape.sizes.items():
            if size > largest[name]:
                raise AxisError(
                    f"shape.{name}", f"{size} was never trained", allowed=f"up to {largest[name]}"
                )
        model = self.build(student_config(self.config, self.teachers_axes, shape)).eval()
        kept = model.state_dict()
        states = any(b.is_floating_point() for n, b in model.named_buffers() if n in kept)
        if states and settle is None:
            raise AxisError(
                "shape", "this model keeps statistics of what it saw, which a new size lacks",
                allowed="the sizes that were trained",
            )  # fmt: skip
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                teachers = _teachers_name(self.teachers_axes, shape, name)
                shared = self.first_names.get(teachers)
                if shared is None:
                    layers = f"shape.layers={list(shape.layers)}"
                    raise AxisError(layers, f"{teachers} was never trained")
                weight = self.weights[shared]
                place = Place(shared, _regions(weight, shared, self.axes, shape))
                parameter.copy_(place.of(weight))
        if settle is not None:
            settle(model)
        return model

    def alone(self, size: str) -> Family:
        """A family of this size only, which starts from copies of the weights. Put into `apart`, it
        is what `extract` takes the size from, whatever the shared weights become."""
        member = self.sizes[size]
        used = {place.shared for place in member.places.values()}
        other = copy.copy(self)
        other.weights = {name: w.clone() for name, w in self.weights.items() if name in used}
        other.tables, other.apart = set(), {}
        other.sizes = {size: replace(member, model=self.extract(size))}
        other._adopt(other.sizes[size])
        return other

    def extract(self, size: str) -> nn.Module:
        """A plain model of its own, with copies of its weights, in eval mode."""
        if size in self.apart:
            return self.apart[size].extract(size)
        member = self.sizes[size]
        member.refresh(self.weights)
        with torch.random.fork_rng(devices=[]):  # weights that are overwritten cost no luck
            config = student_config(self.config, self.teachers_axes, member.shape)
            model = self.build(config).eval()
        model.load_state_dict(member.model.state_dict())
        return model


def _everything(tensor: Tensor) -> tuple[Region, Region]:
    region = tuple(slice(0, n) for n in tensor.shape)
    return region, region


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter | None]:
    """Tied ones as often as they are used."""
    return (p for module in model.modules() for p in module._parameters.values())


def _complete(axes: Sequence[Axis], shape: Shape) -> Shape:
    """Every axis named."""
    check_shape(axes, shape)
    sizes = {axis.name: shape.sizes.get(axis.name, axis.size) for axis in axes if axis.groups}
    return Shape(sizes, shape.layers, {
        axis.name: kept_layers(axis, shape) for axis in stacks(axes) if axis.name != "layers"
    })  # fmt: skip


def _hull(shapes: Iterable[Shape]) -> Shape:
    """The least shape that holds all of these."""
    sizes: dict[str, int] = {}
    layers: set[int] = set()
    kept: dict[str, set[int]] = {}
    for shape in shapes:
        layers |= {*shape.layers}
        for name, own in shape.stacks.items():
            kept.setdefault(name, set()).update(own)
        for name, size in shape.sizes.items():
            sizes[name] = max(size, sizes.get(name, 0))
    return Shape(sizes, tuple(sorted(layers)), {n: tuple(sorted(k)) for n, k in kept.items()})


def _resized(axis: Axis, hull: Shape) -> Axis:
    size = hull.sizes.get(axis.name, axis.size)
    groups = tuple(
        Group(group.name, group.kept(size, axis.size), group.members) for group in axis.groups
    )
    return replace(axis, size=size, groups=groups)


def _teachers_name(axes: Sequence[Axis], shape: Shape, name: str) -> str:
    """The name before `cut` renumbered the layers."""
    for axis in stacks(axes):
        if place := layer_of(axis.pattern, name):
            return f"{axis.pattern.format(kept_layers(axis, shape)[place[0]])}.{place[1]}"
    return name


def _regions(
    tensor: Tensor, name: str, axes: Sequence[Axis], shape: Shape
) -> tuple[tuple[Region, Region], ...]:
    """What a size keeps of a tensor, and where it lies in the size's own."""
    by_dim: list[list[tuple[slice, slice]]] = [[(slice(0, n),) * 2] for n in tensor.shape]
    places = (
        (group, member, group.kept(shape.sizes[axis.name], axis.size))
        for axis in axes for group in axis.groups for member in group.members
        if member.parameter == name
    )  # fmt: skip
    for group, member, kept in places:
        if kept == group.units:
            continue
        at, found = 0, []
        for start, length in member.pieces(group.units, kept):
            found.append((slice(start, start + length), slice(at, at + length)))
            at += length
        by_dim[member.dim] = found
    return tuple(
        (tuple(big for big, _ in pieces), tuple(own for _, own in pieces))
        for pieces in itertools.product(*by_dim)
    )
