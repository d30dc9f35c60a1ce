"""From budgets to shapes, before a weight is trained. Pure: it costs what it is told things cost.

The rule: among the shapes that keep the budget, take the one that cuts least, where a cut's harm is
the log of the ratio along each axis, weighted by how much that axis was seen to hurt. Rankings
flip after distillation (NVIDIA's pruning guide), so this is where to start, not the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from limbeck.architecture.axes import Axis, find_axis, first_only, layer_of, members_by_parameter
from limbeck.architecture.cut import usable
from limbeck.errors import RecipeError
from limbeck.recipe import BudgetSpec, StudentSpec
from limbeck.types import Cost, Shape, StudentPlan

# Harm per unit of log ratio, from zero-shot cuts of Qwen3-30B-A3B (Model-Optimizer #467, MMLU):
# hidden 2048 -> 1536 cost 35.1 points, layers 48 -> 40 13.5, ffn 768 -> 512 15.7.
_HARM = {"hidden": 1.22, "layers": 0.74, "ffn": 0.39}
_FFN_STEP = 64  # a multiple that every runtime's kernels like
_BYTES = {"hf": (4, 4), "onnx-fp32": (4, 4), "onnx-int8": (1, 4)}  # of (matrices, the rest)
_OVERHEAD = {"hf": 740_000, "onnx-fp32": 250_000, "onnx-int8": 250_000}  # graph or tokenizer
_OVERHEAD_PER_LAYER = {"hf": 2_000, "onnx-fp32": 20_000, "onnx-int8": 45_000}
_ROUNDS = 6  # of measuring the choice and choosing again
_MARGIN = {"latency_ms": 0.92, "memory_mb": 0.97}  # of a budget: machines are noisy


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape whose layers are only counted yet, and what it costs."""

    sizes: Mapping[str, int]
    num_layers: int
    params: int
    size_bytes: int
    matrix_params_per_layer: float  # what one token's forward multiplies, without embeddings

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        return (*sorted(self.sizes.items()), ("layers", self.num_layers))


def candidates(
    shapes: Mapping[str, tuple[int, ...]], axes: Sequence[Axis], format: str
) -> list[Candidate]:
    """Every shape of the space: proved axes, uniform widths, sizes by granularity.

    `shapes` are the teacher's parameters by name, tied ones once.
    """
    proved = usable(axes)
    layers = find_axis(proved, "layers")
    coupled = {name for axis in proved for name in axis.coupled}
    # Heads with their key/value heads are better kept, a vocabulary's rows have
    # names, and of other axes nobody knows the harm: all of these stay as they are.
    free = [a for a in proved if a.groups and a.name in _HARM and a.name not in coupled]
    combinations: list[dict[str, int]] = [{}]
    for axis in free:
        combinations = [
            {**sizes, axis.name: size, **{k: size // f for k, f in axis.coupled.items()}}
            for sizes in combinations
            for size in _sizes(axis)
        ]
    found = []
    for sizes in combinations:
        outside, inside = _count(shapes, proved, sizes)
        pinned = len(layers.pinned) if layers else 0
        for n in range(max(1, pinned), layers.size + 1) if layers else (0,):
            free_layers = layers.size - pinned if layers else 0
            depth = (n - pinned) / free_layers if free_layers else 0.0
            matrices = outside[0] + inside[0] * depth
            rest = outside[1] + inside[1] * depth
            per_matrix, per_rest = _BYTES[format]
            size_bytes = matrices * per_matrix + rest * per_rest
            size_bytes += _OVERHEAD[format] + _OVERHEAD_PER_LAYER[format] * n
            per_layer = inside[0] / free_layers if free_layers else 0.0
            found.append(Candidate(sizes, n, round(matrices + rest), round(size_bytes), per_layer))
    return found


def _sizes(axis: Axis) -> list[int]:
    step = axis.granularity
    if axis.name == "ffn" and axis.size % _FFN_STEP == 0:
        step = math.lcm(step, _FFN_STEP)
    return list(range(step, axis.size + 1, step))


def _count(
    shapes: Mapping[str, tuple[int, ...]], axes: Sequence[Axis], sizes: Mapping[str, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """((matrices, rest) outside the layers, (matrices, rest) inside all layers), in parameters.

    Layers that cannot go count as outside.
    """
    kept = {
        group.name: group.kept(sizes.get(axis.name, axis.size), axis.size)
        for axis in axes for group in axis.groups
    }  # fmt: skip
    places = members_by_parameter([group for axis in axes for group in axis.groups])
    layers = find_axis(axes, "layers")
    shared = first_only(layers.pattern, shapes) if layers else set()
    outside, inside = [0.0, 0.0], [0.0, 0.0]
    for name, shape in shapes.items():
        dims = list(shape)
        for group, member in places.get(name, ()):
            dims[member.dim] = member.width(kept[group.name])
        place = layer_of(layers.pattern, name) if layers else None
        free = layers and place and place[0] not in layers.pinned and name not in shared
        where = inside if free else outside
        where[0 if len(dims) > 1 else 1] += math.prod(dims)
    return (outside[0], outside[1]), (inside[0], inside[1])


def score(candidate: Candidate, axes: Sequence[Axis]) -> float:
    """0 for the teacher's own shape, lower the more is cut; see the module's rule."""
    total = 0.0
    for axis in usable(axes):
        size = candidate.num_layers if axis.name == "layers" else candidate.sizes.get(axis.name)
        if size and axis.name in _HARM:
            total += _HARM[axis.name] * math.log(size / axis.size)
    return total


@dataclass(frozen=True, slots=True)
class Sample:
    """What one candidate's exported file takes, measured or predicted."""

    latency_ms: float  # median
    memory_mb: float  # peak of a process that holds nothing else


Measure = Callable[[Candidate], Sample]  # of the exported random-weight model


class CostModel:
    """latency = a + layers x (b + c x matrix parameters), memory = d + e x the file's size; fitted
    to what was measured."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.measured: dict[tuple, tuple[Candidate, Sample]] = {}
        self._latency, self._memory = np.zeros(3), np.zeros(2)

    def measure(self, candidate: Candidate) -> Sample:
        if candidate.key not in self.measured:
            self.measured[candidate.key] = (candidate, self._measure(candidate))
            seen = [c for c, _ in self.measured.values()]
            samples = [sample for _, sample in self.measured.values()]
            self._latency = _fitted(map(_work, seen), [s.latency_ms for s in samples])
            self._memory = _fitted(map(_weight, seen), [s.memory_mb for s in samples])
        return self.measured[candidate.key][1]

    def predict(self, candidate: Candidate) -> Sample:
        """The measurement itself where there is one."""
        if candidate.key in self.measured:
            return self.measured[candidate.key][1]
        return self.fitted(candidate)

    def fitted(self, candidate: Candidate) -> Sample:
        """What the model says, whether or not the candidate was measured."""
        return Sample(
            float(_work(candidate) @ self._latency), float(_weight(candidate) @ self._memory)
        )


def _work(c: Candidate) -> np.ndarray:
    return np.array([1.0, c.num_layers, c.num_layers * c.matrix_params_per_layer / 1e6])


def _weight(c: Candidate) -> np.ndarray:
    return np.array([1.0, c.size_bytes / 1e6])


def _fitted(rows: Iterable[np.ndarray], values: Sequence[float]) -> np.ndarray:
    """Weights of which none is negative; relative errors count alike for small and large values."""
    design, found = np.stack([*rows]), np.array(values)
    weights, active = np.zeros(design.shape[1]), [*range(design.shape[1])]
    while active:
        relative = design[:, active] / found[:, None]
        best = np.linalg.lstsq(relative, np.ones(len(found)), rcond=None)[0]
        if (best >= 0).all():
            weights[active] = best
            break
        active.remove(active[int(best.argmin())])
    return weights


def plan_student(
    student: StudentSpec,
    where: str,
    space: Sequence[Candidate],
    axes: Sequence[Axis],
    layers_of: Callable[[int], tuple[int, ...]],
    costs: CostModel,
    rank: Callable[[Candidate], float] | None = None,
    watts: float | None = None,
) -> StudentPlan:
    """The best shape for one budget: that with the highest `rank`, by the module's rule if there is
    none.

    `layers_of(n)` says which n layers are kept; `watts` is what the device draws while it computes,
    for a budget of energy. Raises RecipeError for a budget that no shape can
    meet, with the smallest that one can.
    """
    rank = rank or (lambda c: score(c, axes))
    ranked = sorted(space, key=lambda c: (-rank(c), c.params))
    limits = timed_limits(student.budget, watts)
    if limits and not costs.measured:
        for anchor in anchors(space):
            costs.measure(anchor)
    best = _choose(where, student.budget, limits, ranked, costs)
    predicted = costs.predict(best) if costs.measured else None
    return StudentPlan(
        name=student.name,
        shape=Shape(dict(best.sizes), layers_of(best.num_layers)),
        cost=Cost(
            params=best.params, size_bytes=best.size_bytes,
            latency_ms=predicted.latency_ms if predicted else None,
            memory_mb=predicted.memory_mb if predicted else None,
        ),
        reason=_reason(student.budget, best, axes, len(space)),
    )


def anchors(space: Sequence[Candidate]) -> list[Candidate]:
    """Three small and different shapes: enough for three weights, quick to export."""
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


def timed_limits(budget: BudgetSpec, watts: float | None = None) -> dict[str, float]:
    """What only a measurement says, by `Sample`'s names. Energy is power times latency."""
    found = {}
    if budget.latency_ms is not None:
        found["latency_ms"] = budget.latency_ms
    if budget.energy_mj is not None:
        assert watts is not None  # the recipe checked it
        found["latency_ms"] = min(budget.energy_mj / watts, found.get("latency_ms", math.inf))
    if budget.memory_mb is not None:
        found["memory_mb"] = budget.memory_mb
    return found


def _choose(
    where: str, budget: BudgetSpec, limits: Mapping[str, float], ranked: Sequence[Candidate],
    model: CostModel,
) -> Candidate:  # fmt: skip
    fits = within_budget(where, budget, ranked)
    if not limits:
        return fits[0]

    def used(candidate: Candidate, names: Iterable[str] = limits) -> float:
        """The largest share of a limit, margins included."""
        sample = model.predict(candidate)
        return max(getattr(sample, name) / (limits[name] * _MARGIN[name]) for name in names)

    for _ in range(_ROUNDS):
        best = next((c for c in fits if used(c) <= 1), None)
        if best is None:
            break
        if best.key in model.measured:
            return best
        model.measure(best)
    # This machine is not as modelled: of what was measured, then, not of what is predicted.
    seen = [c for c in fits if c.key in model.measured and used(c) <= 1]
    if seen:
        return seen[0]
    least = min(fits, key=used)
    model.measure(least)
    if used(least) <= 1:
        return least
    name = max(limits, key=lambda name: used(least, [name]))
    possible = getattr(model.predict(least), name) / _MARGIN[name]
    raise RecipeError(
        f"{where}.{name}", f"no shape meets {_listed({name: limits[name]})}",
        allowed=f"about {possible:.2f} {name.rpartition('_')[2].replace('mb', 'MB')} or more, "
        "on this machine",
        fix="raise the budget",
    )  # fmt: skip


def within_budget(
    where: str, budget: BudgetSpec, space: Sequence[Candidate]
) -> list[Candidate]:
    """The shapes that keep the budget, but for what has to be measured.

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
    kept = [
        f"{100 * size / axis.size:.0f} % of {axis.name}"
        for axis in usable(axes)
        if axis.name in _HARM
        and (size := best.num_layers if axis.name == "layers" else best.sizes.get(axis.name))
    ]
    asked = _listed(budget.model_dump(exclude_none=True))
    return f"Of {considered:,} shapes the one within {asked} that cuts least: {', '.join(kept)}."


def _listed(asked: Mapping[str, float]) -> str:
    units = {
        "params": "{:,} parameters", "size_mb": "{:g} MB", "latency_ms": "{:g} ms",
        "memory_mb": "{:g} MB of memory", "energy_mj": "{:g} mJ", "retention": "{:.0%} kept",
    }  # fmt: skip
    return " and ".join(units[key].format(value) for key, value in asked.items())
