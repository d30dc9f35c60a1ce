"""What an axis is: a config field and the parameter dimensions that must move with it.

A *member* is one dimension of one parameter or buffer, a *group* is the dimensions that have to be
permuted together (the residual stream; one layer's feed-forward units; one layer's heads), and an
*axis* is the groups whose size one config field sets. Found by `probe`, proved by `proof`, used by
`cut`. Method and its traps: axes.md, the duplicate-and-perturb gradient test.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import AxisError


@dataclass(frozen=True, slots=True)
class Member:
    """One dimension, laid out as a row of segments and then a tail that never moves.

    Segment s holds, for every unit in turn, `block * segments[s]` consecutive channels. A plain
    dimension is `block=1`; attention's inside has `block=head_dim`; a packed [q | k | v] has
    `segments=(1, 1, 1)`, and `(3, 1, 1)` where three query heads share a key/value head.
    """

    parameter: str
    dim: int
    block: int = 1
    segments: tuple[int, ...] = (1,)
    tail: int = 0

    def width(self, units: int) -> int:
        """Channels in all, for so many units."""
        return units * self.block * sum(self.segments) + self.tail

    def pieces(self, units: int, kept: int) -> Iterator[tuple[int, int]]:
        """(start, length) of the channels that the first `kept` of `units` units own."""
        start = 0
        for times in self.segments:
            yield start, kept * self.block * times
            start += units * self.block * times
        if self.tail:
            yield start, self.tail

    def channels(self, order: Tensor) -> Tensor:
        """Indices that put the units into `order`, a permutation (units,); the tail stays last."""
        units, start, found = len(order), 0, []
        for times in self.segments:
            width = self.block * times
            inner = torch.arange(width, device=order.device)
            found.append((start + order[:, None] * width + inner).flatten())
            start += units * width
        found.append(torch.arange(start, start + self.tail, device=order.device))
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class Group:
    """Dimensions that carry the same units: permute one and all must follow.

    `units` may be a multiple or a part of the axis's size (4 channels for each of the width, one
    head for 64); a smaller axis has as many fewer.
    """

    name: str
    units: int
    members: tuple[Member, ...]

    def kept(self, size: int, full: int) -> int:
        """Units that are left when its axis goes from `full` to `size`."""
        units, rest = divmod(self.units * size, full)
        if rest:
            raise AxisError(self.name, f"{size} of {full} leaves no whole number of units")
        return units


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Something about an architecture that can be made smaller, or the reason why it cannot."""

    name: str
    """'hidden', 'heads' (with their key/value heads), 'queries' (per key/value head), 'ffn',
    'layers', 'vocab'; any other, and a second one of these: the config field's own name."""
    fields: Mapping[str, float]
    """Config field ('hidden_sizes[1]', 'text_config.hidden_size') -> its value per unit of `size`;
    a ratio such as mlp_ratio has a fraction."""
    size: int
    granularity: int = 1  # sizes are multiples of this
    groups: tuple[Group, ...] = ()
    coupled: Mapping[str, int] = field(default_factory=dict)
    """Axis name -> k: this size is always k times that one's (hidden = head_dim * heads)."""
    pattern: str = ""
    """Of layers: the repeated block's module path, such as 'encoder.layer.{}'."""
    pinned: tuple[int, ...] = ()
    """Of layers: those that no student can do without (one that owns a stride, a norm fewer)."""
    labels: bool = False
    """Its units are named by the inputs (token ids): a student keeps the first ones as they are."""
    proved: bool = False
    reason: str = ""  # what proved it, with numbers, or one sentence that says why it is refused


def axes_to_json(axes: Sequence[Axis]) -> str:
    return json.dumps([dataclasses.asdict(axis) for axis in axes], indent=1)


def axes_from_json(text: str) -> tuple[Axis, ...]:
    """Raises `AxisError` where the text is not what `axes_to_json` writes."""
    try:
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise TypeError(f"it is a {type(rows).__name__}")
        return tuple(map(_axis, rows))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AxisError("axes", f"not a list of axes ({error})", fix="find them again") from error


def _axis(data: Mapping[str, object]) -> Axis:
    def members(rows: list[dict[str, Any]]) -> tuple[Member, ...]:
        return tuple(Member(**{**row, "segments": tuple(row["segments"])}) for row in rows)

    values: dict[str, Any] = dict(data)
    values["pinned"] = tuple(values["pinned"])
    values["groups"] = tuple(
        Group(g["name"], g["units"], members(g["members"])) for g in values["groups"]
    )
    return Axis(**values)


def find_axis(axes: Sequence[Axis], name: str) -> Axis | None:
    return next((axis for axis in axes if axis.name == name), None)


def stacks(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes that count layers."""
    return tuple(axis for axis in axes if axis.pattern)


def layer_of(pattern: str, name: str) -> tuple[int, str] | None:
    """('encoder.layer.{}', 'encoder.layer.3.x.weight') -> (3, 'x.weight'); None if outside."""
    if not pattern:
        return None
    head, _, tail = pattern.partition("{}")
    found = re.match(re.escape(head) + r"(\d+)" + re.escape(tail) + r"\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def first_only(pattern: str, names: Iterable[str]) -> set[str]:
    """Names in the first layer that no other layer has its own of: a table that all of them read
    (T5's relative bias). It stays with whichever layer is the first."""
    places = {name: place for name in names if (place := layer_of(pattern, name))}
    others = {rest for at, rest in places.values() if at > 0}
    first = {name for name, (at, rest) in places.items() if at == 0 and rest not in others}
    return first if others else set()


def members_by_parameter(groups: Sequence[Group]) -> dict[str, list[tuple[Group, Member]]]:
    found: dict[str, list[tuple[Group, Member]]] = {}
    for group in groups:
        for member in group.members:
            found.setdefault(member.parameter, []).append((group, member))
    return found


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor: `state_dict()` wraps tied entries anew each time."""
    storage = tensor.untyped_storage()._cdata  # the pointer to data is 0 on the meta device
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def permuted(
    state: Mapping[str, Tensor], groups: Sequence[Group], orders: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with each group's units in `orders[group.name]`; untouched entries are the same.

    Tied entries (one tensor under two names) stay tied.
    """
    result = dict(state)
    done: dict[tuple[object, ...], Tensor] = {}
    for name, places in members_by_parameter([g for g in groups if g.name in orders]).items():
        if name not in state:
            continue
        source = state[name]
        key = identity(source)
        if key not in done:
            moved = source
            for group, member in places:
                channels = member.channels(orders[group.name].to(source.device))
                moved = moved.index_select(member.dim, channels)
            done[key] = moved
        result[name] = done[key]
    return result
