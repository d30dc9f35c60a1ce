"""The space of shapes that a plan chooses from, and what each costs. Pure: names and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from limbeck.architecture.axes import (
    Axis,
    find_axis,
    first_only,
    layer_of,
    members_by_parameter,
    stacks,
)
from limbeck.architecture.cut import keep_layers, usable
from limbeck.types import Shape

# Harm per unit of log ratio, from zero-shot cuts of Qwen3-30B-A3B (Model-Optimizer #467, MMLU):
# hidden 2048 -> 1536 cost 35.1 points, layers 48 -> 40 13.5, ffn 768 -> 512 15.7.
HARM = {"hidden": 1.22, "layers": 0.74, "ffn": 0.39}
_FFN_STEP = 64  # a multiple that every runtime's kernels like
_CHANNEL_STEP = 4  # the same for convolutions, where a quarter of an axis is no less
_HIDDEN_STEP = 32  # the same for a width that heads do not bind, and a block of GGUF's
_BYTES = {  # of a weight in (matrices, the rest)
    "hf": (4, 4), "onnx-fp32": (4, 4), "onnx-int8": (1, 4), "gguf-f16": (2, 4),
    "gguf-q8_0": (34 / 32, 4), "gguf-q4_0": (18 / 32, 4),
}  # fmt: skip


# matrices, the rest, bytes: outside of the layers, and inside of each stack's
_Counted = tuple[tuple[float, float, float], dict[str, tuple[float, float, float]]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape whose layers are only counted yet, and what it costs."""

    sizes: Mapping[str, int]
    num_layers: int
    params: int
    size_bytes: int
    matrix_params_per_layer: float  # what one token's forward multiplies, without embeddings
    stacks: Mapping[str, int] = field(default_factory=dict)  # layers of each, where there are more

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        depths = self.stacks.items() if self.stacks else [("layers", self.num_layers)]
        return (*sorted(self.sizes.items()), *sorted(depths))


def candidates(
    shapes: Mapping[str, tuple[int, ...]], axes: Sequence[Axis], format: str,
    overhead: tuple[int, int] = (0, 0),
) -> list[Candidate]:  # fmt: skip
    """Every shape of the space: proved axes, sizes by granularity.

    `shapes` are the teacher's parameters by name, tied ones once; `overhead` what a file has beside
    weights, once and for each layer, in bytes. Where each stage has a width and a depth of its own
    (a ResNet's `hidden_sizes`, `depths`) all widths are scaled alike, and all depths: OFA's and
    EfficientNet's finding that no stage does well alone, and a space that can be listed.
    """
    proved = usable(axes)
    depths = [axis for axis in stacks(proved) if axis.name != "layers"]
    return [
        _candidate(counted, proved, sizes, kept, depths, overhead)
        for sizes in _widths(proved)
        for counted in (_count(shapes, proved, sizes, format),)
        for kept in _depths(proved, depths)
    ]


def num_stages(axes: Sequence[Axis]) -> int:
    """Of models whose stages have widths of their own; one layer each, where depths are no axes."""
    fields = {field.partition("[")[2] for axis in axes for field in axis.fields}
    return len(fields - {""})


def _candidate(
    counted: _Counted, axes: Sequence[Axis], sizes: Mapping[str, int], kept: Mapping[str, int],
    depths: Sequence[Axis], overhead: tuple[int, int],
) -> Candidate:  # fmt: skip
    (matrices, rest, size_bytes), inside = counted
    for name, (own_matrices, own_rest, own_bytes) in inside.items():
        axis = find_axis(axes, name)
        assert axis is not None
        free = axis.size - len(axis.pinned)
        share = (kept[name] - len(axis.pinned)) / free if free else 0.0
        matrices, rest = matrices + own_matrices * share, rest + own_rest * share
        size_bytes += own_bytes * share
    n = sum(kept.values())
    size_bytes += overhead[0] + overhead[1] * (n or num_stages(axes))
    if depths:
        per_layer = matrices / n
    elif layers := find_axis(axes, "layers"):
        per_layer = inside["layers"][0] / max(1, layers.size - len(layers.pinned))
    else:
        per_layer = 0.0
    of_stacks = {axis.name: kept[axis.name] for axis in depths}
    return Candidate(
        dict(sizes), n, round(matrices + rest), round(size_bytes), per_layer, of_stacks
    )


def _widths(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """Heads with their key/value heads are better kept, a vocabulary's rows have names, and of
    other axes nobody knows the harm: all of these stay as they are."""
    coupled = {name for axis in axes for name in axis.coupled}
    open_ = [a for a in axes if a.groups and a.name not in coupled and not a.labels]
    staged = [a for a in open_ if all(float(n).is_integer() for n in a.fields.values())]
    stages = any("[" in field for axis in staged for field in axis.fields)
    if stages and find_axis(axes, "layers") is None:
        return _scaled(staged)
    heads = find_axis(axes, "heads")
    num_heads = int(heads.fields.get("num_attention_heads", 0)) * heads.size if heads else 0
    combinations: list[dict[str, int]] = [{}]
    for axis in open_:
        if axis.name in HARM:
            combinations = [
                {**sizes, axis.name: size, **{k: size // f for k, f in axis.coupled.items()}}
                for sizes in combinations
                for size in _sizes(axis, num_heads)
            ]
    return combinations


def _scaled(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """All of these axes by a common factor; no two that differ become equal, as a projection
    between two stages may hang on that."""
    steps = {a.name: math.lcm(a.granularity, _CHANNEL_STEP) for a in axes}
    steps = {a.name: steps[a.name] if a.size % steps[a.name] == 0 and a.size >= 4 * steps[a.name]
             else a.granularity for a in axes}  # fmt: skip
    most = max(a.size // steps[a.name] for a in axes)
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for k in range(1, most + 1):
        sizes = {
            a.name: max(1, round(k * a.size / most / steps[a.name])) * steps[a.name] for a in axes
        }
        full = {a.name: a.size for a in axes}
        if len({(full[n], size) for n, size in sizes.items()}) == len({*sizes.values()}):
            found[tuple(sizes.values())] = sizes
    return [*found.values()]


def _depths(axes: Sequence[Axis], staged: Sequence[Axis]) -> list[dict[str, int]]:
    """How many layers of each stack: all n of the only one, or about the same share of each."""
    if not staged:
        layers = find_axis(axes, "layers")
        if layers is None:
            return [{}]
        return [{"layers": n} for n in range(max(1, len(layers.pinned)), layers.size + 1)]
    deepest = max(axis.size for axis in staged)
    shares = [
        {a.name: max(1, len(a.pinned), round(a.size * k / deepest)) for a in staged}
        for k in range(1, deepest + 1)
    ]
    return [dict(kept) for kept in dict.fromkeys(tuple(share.items()) for share in shares)]


def _sizes(axis: Axis, num_heads: int) -> list[int]:
    step = axis.granularity
    if axis.name == "ffn" and axis.size % _FFN_STEP == 0:
        step = math.lcm(step, _FFN_STEP)
    if axis.name == "hidden" and step == 1 and num_heads and axis.size % num_heads == 0:
        # heads have a width of their own; but transformers' configs want a multiple all the same
        blocks = math.lcm(num_heads, _HIDDEN_STEP)
        step = blocks if axis.size % blocks == 0 and axis.size >= 256 else num_heads
    return list(range(step, axis.size + 1, step))


def _count(
    shapes: Mapping[str, tuple[int, ...]], axes: Sequence[Axis], sizes: Mapping[str, int],
    format: str,
) -> _Counted:  # fmt: skip
    """((matrices, rest, bytes) outside the layers, and of each stack inside all its layers):
    parameters, and what they take in a file.

    A convolution's kernel is a matrix. Layers that cannot go count as outside.
    """
    kept = {
        group.name: group.kept(sizes.get(axis.name, axis.size), axis.size)
        for axis in axes for group in axis.groups
    }  # fmt: skip
    places = members_by_parameter([group for axis in axes for group in axis.groups])
    repeated = stacks(axes)
    shared = {name for axis in repeated for name in first_only(axis.pattern, shapes)}
    outside = [0.0, 0.0, 0.0]
    inside = {axis.name: [0.0, 0.0, 0.0] for axis in repeated}
    for name, shape in shapes.items():
        dims = list(shape)
        for group, member in places.get(name, ()):
            dims[member.dim] = member.width(kept[group.name])
        where = outside
        for axis in repeated:
            place = layer_of(axis.pattern, name)
            if place and place[0] not in axis.pinned and name not in shared:
                where = inside[axis.name]
        where[0 if len(dims) > 1 else 1] += math.prod(dims)
        where[2] += math.prod(dims) * _per_weight(format, dims, inside=where is not outside)
    return _three(outside), {name: _three(found) for name, found in inside.items()}


def _three(counts: Sequence[float]) -> tuple[float, float, float]:
    matrices, rest, size_bytes = counts
    return matrices, rest, size_bytes


def _per_weight(format: str, dims: Sequence[int], *, inside: bool) -> float:
    """Bytes. GGUF: see `export.gguf`, which rows do not divide into blocks, and what is in Q8_0
    beside Q4_0."""
    if len(dims) < 2:
        return _BYTES[format][1]
    if format in ("gguf-q8_0", "gguf-q4_0") and dims[-1] % 32:
        format = "gguf-f16"
    elif format == "gguf-q4_0" and not inside:
        format = "gguf-q8_0"
    return _BYTES[format][0]


def shape_of(
    candidate: Candidate, axes: Sequence[Axis], layers_of: Callable[[int], tuple[int, ...]]
) -> Shape:
    """With the layers chosen: of several stacks the first ones, which own strides and widths."""
    layers = () if candidate.stacks else layers_of(candidate.num_layers)
    kept = {
        axis.name: keep_layers(torch.zeros(axis.size), candidate.stacks[axis.name], axis.pinned)
        for axis in axes if axis.name in candidate.stacks
    }  # fmt: skip
    return Shape(dict(candidate.sizes), layers, kept)
