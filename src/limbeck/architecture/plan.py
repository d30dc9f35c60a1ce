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

from limbeck.architecture.axes import Axis
from limbeck.architecture.cut import usable
from limbeck.architecture.space import HARM, Candidate, num_stages, shape_of
from limbeck.errors import RecipeError
from limbeck.recipe import BudgetSpec, StudentSpec
from limbeck.types import Cost, StudentPlan

_ROUNDS = 6  # of measuring the choice and choosing again
_MARGIN = {"latency_ms": 0.92, "memory_mb": 0.97}  # of a budget: machines are noisy


def score(candidate: Candidate, axes: Sequence[Axis]) -> float:
    """0 for the teacher's own shape, lower the more is cut; see the module's rule."""
    return sum(HARM[name] * math.log(share) for name, share in _kept(candidate, axes).items())


def _kept(candidate: Candidate, axes: Sequence[Axis]) -> dict[str, float]:
    """Share of each kind of axis that is left. Widths of stages count as the hidden width, and
    stacks of layers as one: what these kinds of axes hurt was seen in transformers only."""
    shares: dict[str, float] = {}
    of_stages = [
        candidate.sizes[a.name] / a.size
        for a in axes
        if a.name in candidate.sizes and a.name not in HARM
    ]
    if of_stages and num_stages(axes):
        shares["hidden"] = sum(of_stages) / len(of_stages)
    if candidate.stacks:
        full = sum(a.size for a in axes if a.name in candidate.stacks)
        shares["layers"] = candidate.num_layers / full
    for axis in usable(axes):
        size = candidate.sizes.get(axis.name)
        if axis.name == "layers":
            size = candidate.num_layers
        if size and axis.name in HARM and axis.name not in shares:
            shares[axis.name] = size / axis.size
    return shares


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
        shape=shape_of(best, axes, layers_of),
        cost=Cost(
            params=best.params, size_bytes=best.size_bytes,
            latency_ms=predicted.latency_ms if predicted else None,
            memory_mb=predicted.memory_mb if predicted else None,
        ),
        reason=_reason(student.budget, best, axes, len(space)),
    )


def anchors(space: Sequence[Candidate]) -> list[Candidate]:
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
            fix="raise the budget" if len(space) > 1 else "raise the budget, or name another "
            "model as recipe.base: nothing of this one can be cut",
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
    units = {
        "params": "{:,} parameters", "size_mb": "{:g} MB", "latency_ms": "{:g} ms",
        "memory_mb": "{:g} MB of memory", "energy_mj": "{:g} mJ", "retention": "{:.0%} kept",
    }  # fmt: skip
    return " and ".join(units[key].format(value) for key, value in asked.items())
