"""From budgets to shapes, before a weight is trained. Pure: it costs what it is told things cost.

The rule: among the shapes that keep the budget, take the one that cuts least, where a cut's harm is
the log of the ratio along each axis, weighted by how much that axis was seen to hurt. Rankings
flip after distillation (NVIDIA's pruning guide), so this is where to start, not the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
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
from limbeck.errors import RecipeError
from limbeck.recipe import BudgetSpec, StudentSpec
from limbeck.types import Cost, Shape, StudentPlan

# Harm per unit of log ratio, from zero-shot cuts of Qwen3-30B-A3B (Model-Optimizer #467, MMLU):
# hidden 2048 -> 1536 cost 35.1 points, layers 48 -> 40 13.5, ffn 768 -> 512 15.7.
_HARM = {"hidden": 1.22, "layers": 0.74, "ffn": 0.39}
_FFN_STEP = 64  # a multiple that every runtime's kernels like
_BYTES = {"hf": (4, 4), "onnx-fp32": (4, 4), "onnx-int8": (1, 4)}  # of (matrices, the rest)
_CHANNEL_STEP = 4  # the same for convolutions, where a quarter of an axis is no less
_ROUNDS = 6  # of measuring the choice and choosing again
_MARGIN = 0.92  # of a latency budget that the choice may use: machines are noisy


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
        _candidate(shapes, proved, sizes, kept, depths, format, overhead)
        for sizes in _widths(proved)
        for kept in _depths(proved, depths)
    ]


def _candidate(
    shapes: Mapping[str, tuple[int, ...]], axes: Sequence[Axis], sizes: Mapping[str, int],
    kept: Mapping[str, int], depths: Sequence[Axis], format: str, overhead: tuple[int, int],
) -> Candidate:  # fmt: skip
    outside, inside = _count(shapes, axes, sizes)
    matrices, rest = outside
    for name, (own_matrices, own_rest) in inside.items():
        axis = find_axis(axes, name)
        assert axis is not None
        free = axis.size - len(axis.pinned)
        share = (kept[name] - len(axis.pinned)) / free if free else 0.0
        matrices, rest = matrices + own_matrices * share, rest + own_rest * share
    n = sum(kept.values())
    per_matrix, per_rest = _BYTES[format]
    size_bytes = matrices * per_matrix + rest * per_rest + overhead[0] + overhead[1] * n
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
    combinations: list[dict[str, int]] = [{}]
    for axis in open_:
        if axis.name in _HARM:
            combinations = [
                {**sizes, axis.name: size, **{k: size // f for k, f in axis.coupled.items()}}
                for sizes in combinations
                for size in _sizes(axis)
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


def _sizes(axis: Axis) -> list[int]:
    step = axis.granularity
    if axis.name == "ffn" and axis.size % _FFN_STEP == 0:
        step = math.lcm(step, _FFN_STEP)
    return list(range(step, axis.size + 1, step))


def _count(
    shapes: Mapping[str, tuple[int, ...]], axes: Sequence[Axis], sizes: Mapping[str, int]
) -> tuple[tuple[float, float], dict[str, tuple[float, float]]]:
    """((matrices, rest) outside the layers, and of each stack inside all its layers): parameters.

    A convolution's kernel is a matrix. Layers that cannot go count as outside.
    """
    kept = {
        group.name: group.kept(sizes.get(axis.name, axis.size), axis.size)
        for axis in axes for group in axis.groups
    }  # fmt: skip
    places = members_by_parameter([group for axis in axes for group in axis.groups])
    repeated = stacks(axes)
    shared = {name for axis in repeated for name in first_only(axis.pattern, shapes)}
    outside = [0.0, 0.0]
    inside = {axis.name: [0.0, 0.0] for axis in repeated}
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
    return (outside[0], outside[1]), {name: (a, b) for name, (a, b) in inside.items()}


def score(candidate: Candidate, axes: Sequence[Axis]) -> float:
    """0 for the teacher's own shape, lower the more is cut; see the module's rule."""
    return sum(_HARM[name] * math.log(share) for name, share in _kept(candidate, axes).items())


def _kept(candidate: Candidate, axes: Sequence[Axis]) -> dict[str, float]:
    """Share of each kind of axis that is left. Widths of stages count as the hidden width, and
    stacks of layers as one: what these kinds of axes hurt was seen in transformers only."""
    shares: dict[str, float] = {}
    of_stages = [
        candidate.sizes[a.name] / a.size
        for a in axes
        if a.name in candidate.sizes and candidate.stacks and a.name not in _HARM
    ]
    if of_stages:
        shares["hidden"] = sum(of_stages) / len(of_stages)
    if candidate.stacks:
        full = sum(a.size for a in axes if a.name in candidate.stacks)
        shares["layers"] = candidate.num_layers / full
    for axis in usable(axes):
        size = candidate.sizes.get(axis.name)
        if axis.name == "layers":
            size = candidate.num_layers
        if size and axis.name in _HARM and axis.name not in shares:
            shares[axis.name] = size / axis.size
    return shares


Measure = Callable[[Candidate], float]  # median latency in ms of the exported random-weight model


class LatencyModel:
    """latency = a + layers x (b + c x matrix parameters), fitted to what was measured."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.measured: dict[tuple, tuple[Candidate, float]] = {}
        self._weights = np.zeros(3)

    def measure(self, candidate: Candidate) -> float:
        if candidate.key not in self.measured:
            self.measured[candidate.key] = (candidate, self._measure(candidate))
            self._fit()
        return self.measured[candidate.key][1]

    def predict(self, candidate: Candidate) -> float:
        """Milliseconds; the measurement itself where there is one."""
        if candidate.key in self.measured:
            return self.measured[candidate.key][1]
        return float(self._row(candidate) @ self._weights)

    @staticmethod
    def _row(c: Candidate) -> np.ndarray:
        return np.array([1.0, c.num_layers, c.num_layers * c.matrix_params_per_layer / 1e6])

    def _fit(self) -> None:
        rows = np.stack([self._row(c) for c, _ in self.measured.values()])
        times = np.array([t for _, t in self.measured.values()])
        # relative errors count alike for fast and slow shapes; no weight may be negative
        active = [0, 1, 2]
        while active:
            weights = np.linalg.lstsq(
                rows[:, active] / times[:, None], np.ones(len(times)), rcond=None
            )[0]
            if (weights >= 0).all():
                break
            active.remove(active[int(weights.argmin())])
        self._weights = np.zeros(3)
        self._weights[active] = weights


def plan_student(
    student: StudentSpec,
    where: str,
    space: Sequence[Candidate],
    axes: Sequence[Axis],
    layers_of: Callable[[int], tuple[int, ...]],
    latency: LatencyModel,
    rank: Callable[[Candidate], float] | None = None,
) -> StudentPlan:
    """The best shape for one budget: that with the highest `rank`, by the module's rule if there is
    none.

    `layers_of(n)` says which n layers are kept. Raises RecipeError for a budget that no shape can
    meet, with the smallest that one can.
    """
    rank = rank or (lambda c: score(c, axes))
    ranked = sorted(space, key=lambda c: (-rank(c), c.params))
    if student.budget.latency_ms and not latency.measured:
        for anchor in _anchors(space):
            latency.measure(anchor)
    best = _choose(where, student.budget, ranked, latency)
    predicted = latency.predict(best) if latency.measured else None
    return StudentPlan(
        name=student.name,
        shape=shape_of(best, axes, layers_of),
        cost=Cost(params=best.params, size_bytes=best.size_bytes, latency_ms=predicted),
        reason=_reason(student.budget, best, axes, len(space)),
    )


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


def _anchors(space: Sequence[Candidate]) -> list[Candidate]:
    """Three small and different shapes: enough for three weights, quick to export."""
    if space[0].stacks:  # of stages all depths belong together
        by_size = sorted(space, key=lambda c: c.params)
        picked = [by_size[0], by_size[len(by_size) // 4], by_size[len(by_size) // 2]]
        return [*{c.key: c for c in picked}.values()]
    work = sorted(space, key=lambda c: c.matrix_params_per_layer)
    deepest = max(c.num_layers for c in space)
    small, middle = work[len(work) // 20], work[len(work) // 2]
    same = {
        (c.matrix_params_per_layer, c.num_layers): c for c in space
    }  # any of equal work stands for the others
    wanted = [
        (small.matrix_params_per_layer, 1),
        (small.matrix_params_per_layer, min(3, deepest)),
        (middle.matrix_params_per_layer, min(2, deepest)),
    ]
    return [same[key] for key in dict.fromkeys(wanted)]


def _choose(
    where: str, budget: BudgetSpec, ranked: Sequence[Candidate], model: LatencyModel
) -> Candidate:
    fits = within_budget(where, budget, ranked)
    limit = budget.latency_ms
    if limit is None:
        return fits[0]
    for _ in range(_ROUNDS):
        best = next((c for c in fits if model.predict(c) <= limit * _MARGIN), None)
        if best is None:
            break
        if best.key in model.measured:
            return best
        model.measure(best)
    # This machine is not as modelled: of what was measured, then, not of what is predicted.
    seen = [c for c in fits if c.key in model.measured and model.predict(c) <= limit * _MARGIN]
    if seen:
        return seen[0]
    fastest = min(fits, key=model.predict)
    if model.measure(fastest) <= limit * _MARGIN:
        return fastest
    raise RecipeError(
        f"{where}.latency_ms", f"no shape meets {_listed({'latency_ms': limit})}",
        allowed=f"about {model.predict(fastest) / _MARGIN:.2f} ms or more, on this machine",
        fix="raise the budget",
    )  # fmt: skip


def within_budget(
    where: str, budget: BudgetSpec, space: Sequence[Candidate]
) -> list[Candidate]:
    """The shapes that keep the budget, but for its latency, which has to be measured.

    Raises RecipeError where there is none, with the smallest that there is.
    """
    fits = [c for c in space if _within(c, budget)]
    if not fits:
        smallest = min(c.params for c in space), min(c.size_bytes for c in space) / 1e6
        asked = budget.model_dump(exclude_none=True)
        raise RecipeError(
            where, f"no shape meets {_listed(asked)}",
            allowed=f"{smallest[0]:,} parameters or more, and {smallest[1]:.2f} MB or more",
            fix="raise the budget",
        )  # fmt: skip
    return fits


def _within(candidate: Candidate, budget: BudgetSpec) -> bool:
    return (budget.params is None or candidate.params <= budget.params) and (
        budget.size_mb is None or candidate.size_bytes <= budget.size_mb * 1e6
    )


def _reason(budget: BudgetSpec, best: Candidate, axes: Sequence[Axis], considered: int) -> str:
    kept = [f"{100 * share:.0f} % of {name}" for name, share in _kept(best, axes).items()]
    asked = _listed(budget.model_dump(exclude_none=True))
    return f"Of {considered:,} shapes the one within {asked} that cuts least: {', '.join(kept)}."


def _listed(asked: Mapping[str, float]) -> str:
    units = {"params": "{:,} parameters", "size_mb": "{:g} MB", "latency_ms": "{:g} ms"}
    return " and ".join(units[key].format(value) for key, value in asked.items())
