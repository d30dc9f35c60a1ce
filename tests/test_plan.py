"""Planning: every limit is kept, more room never means a worse student, costs are real ones."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.architecture.cut import build_student, full_shape, shape_parameters
from limbeck.architecture.plan import (
    Candidate,
    CostModel,
    Sample,
    candidates,
    plan_student,
    score,
)
from limbeck.errors import RecipeError
from limbeck.recipe import BudgetSpec, StudentSpec
from limbeck.types import Shape
from tiny_models import bert_axes, bert_config, build, random_model


@cache
def space(format: str = "hf") -> tuple[Candidate, ...]:
    with torch.device("meta"):
        model = build(bert_config())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return tuple(candidates(shapes, bert_axes(), format))


def never(candidate: Candidate) -> float:
    raise AssertionError("nobody asked for a latency")


def true_latency(candidate: Candidate) -> float:
    """A machine: 0.2 ms, and for each layer 0.05 ms and 40 ms for 10^6 parameters."""
    return 0.2 + candidate.num_layers * (0.05 + 40 * candidate.matrix_params_per_layer / 1e6)


def plan(measure=never, format="hf", **budget):
    student = StudentSpec(name="s", budget=BudgetSpec(**budget))
    return plan_student(
        student, "budget", space(format), bert_axes(), lambda n: tuple(range(n)),
        CostModel(timed(measure)), watts=2.0,
    )  # fmt: skip


def timed(measure, memory=lambda c: 1 + 200 * c.size_bytes / 1e6):
    return lambda c: Sample(measure(c), memory(c))


def score_of(planned) -> float:
    return score(candidate_of(planned), bert_axes())


def candidate_of(planned, format="hf") -> Candidate:
    found = [
        c for c in space(format)
        if c.sizes == planned.shape.sizes and c.num_layers == len(planned.shape.layers)
    ]  # fmt: skip
    assert len(found) == 1, "the plan is one of the space's shapes"
    return found[0]


SMALLEST = min(c.params for c in space())
FULL = sum(p.numel() for p in random_model(bert_config()).parameters())


def test_the_space_is_every_combination_on_the_axes_grids():
    axes = {axis.name: axis for axis in bert_axes()}
    widths = axes["hidden"].size // axes["hidden"].granularity
    ffn = axes["ffn"].size // axes["ffn"].granularity
    assert len(space()) == widths * ffn * axes["layers"].size
    assert len({c.key for c in space()}) == len(space())


def test_parameter_counts_are_those_of_models_that_are_really_built():
    """On the meta device for many shapes; with weights, forward and all, for three."""
    state = random_model(bert_config()).state_dict()
    for at, candidate in enumerate(space()[:: len(space()) // 25]):
        shape = Shape(candidate.sizes, tuple(range(candidate.num_layers)))
        assert candidate.params == shape_parameters(bert_config(), build, bert_axes(), shape)
        if at % 10 == 0:
            model = build_student(bert_config(), build, bert_axes(), shape, state)
            assert candidate.params == sum(p.numel() for p in model.parameters())


def test_the_teachers_own_shape_is_in_the_space_and_scores_zero():
    shape = full_shape(bert_axes())
    sizes = {name: size for name, size in shape.sizes.items() if name != "vocab"}  # never planned
    own = [c for c in space() if c.sizes == sizes and c.num_layers == len(shape.layers)]
    assert [c.params for c in own] == [FULL]
    assert score(own[0], bert_axes()) == 0
    assert all(score(c, bert_axes()) < 0 for c in space() if c is not own[0])


@given(st.integers(SMALLEST, 2 * FULL), st.integers(SMALLEST, 2 * FULL))
@settings(max_examples=60, deadline=None)
def test_a_larger_parameter_budget_never_gives_a_worse_shape(one, other):
    small, large = sorted((one, other))
    tight, loose = plan(params=small), plan(params=large)
    assert tight.cost.params <= small and loose.cost.params <= large
    assert score_of(tight) <= score_of(loose)
    assert tight.cost.params == candidate_of(tight).params


@given(st.floats(0.8, 2.0), st.floats(0.8, 2.0))
@settings(max_examples=40, deadline=None)
def test_a_larger_size_budget_never_gives_a_worse_shape(one, other):
    small, large = sorted((one, other))
    tight, loose = plan(size_mb=small), plan(size_mb=large)
    assert tight.cost.size_bytes <= small * 1e6 and loose.cost.size_bytes <= large * 1e6
    assert score_of(tight) <= score_of(loose)


@given(st.floats(0.5, 4.0), st.floats(0.5, 4.0))
@settings(max_examples=40, deadline=None)
def test_a_larger_latency_budget_never_gives_a_worse_shape_on_a_machine_as_modelled(one, other):
    """On a real one a measurement may disagree with the fit."""
    small, large = sorted((one, other))
    tight, loose = plan(true_latency, latency_ms=small), plan(true_latency, latency_ms=large)
    for planned, limit in ((tight, small), (loose, large)):
        assert true_latency(candidate_of(planned)) <= limit
        assert planned.cost.latency_ms == pytest.approx(true_latency(candidate_of(planned)))
    assert score_of(tight) <= score_of(loose)


@given(st.integers(SMALLEST, FULL), st.floats(0.5, 3.0), st.floats(0.76, 1.0))
@settings(max_examples=40, deadline=None)
def test_all_limits_are_kept_together_and_nothing_within_them_cuts_less(params, ms, mb):
    planned = plan(true_latency, params=params, latency_ms=ms, size_mb=mb)
    assert planned.cost.params <= params
    assert planned.cost.size_bytes <= mb * 1e6
    assert true_latency(candidate_of(planned)) <= ms
    margin = 0.9  # the plan leaves some room for a machine's noise
    better = [
        c for c in space()
        if c.params <= params and c.size_bytes <= mb * 1e6 and true_latency(c) <= ms * margin
        and score(c, bert_axes()) > score_of(planned) + 1e-12
    ]  # fmt: skip
    assert not better


def test_an_int8_file_has_the_same_shape_in_a_quarter_of_the_bytes():
    for fp32, int8 in zip(space("onnx-fp32"), space("onnx-int8"), strict=True):
        assert fp32.key == int8.key and fp32.params == int8.params
    biggest = max(range(len(space())), key=lambda i: space()[i].params)
    layers = space()[biggest].num_layers
    matrices = layers * space()[biggest].matrix_params_per_layer
    saved = space("onnx-fp32")[biggest].size_bytes - space("onnx-int8")[biggest].size_bytes
    assert saved >= 3 * matrices - 25_000 * layers, "three bytes of four, but for the graph's own"


def test_an_impossible_budget_names_the_smallest_that_is_possible():
    with pytest.raises(RecipeError, match=rf"^budget: .*allowed: {SMALLEST:,} param") as caught:
        plan(params=SMALLEST - 1)
    assert caught.value.exit_code == 2
    assert plan(params=SMALLEST).cost.params == SMALLEST
    megabytes = min(c.size_bytes for c in space()) / 1e6
    with pytest.raises(RecipeError, match=f"and {megabytes:.2f} MB or more"):
        plan(size_mb=0.01)


def test_an_impossible_latency_names_one_that_is_possible():
    with pytest.raises(RecipeError, match=r"^budget\.latency_ms: ") as caught:
        plan(true_latency, latency_ms=0.1)
    possible = float(caught.value.allowed.split()[1]) + 0.01  # it is rounded
    assert true_latency(candidate_of(plan(true_latency, latency_ms=possible))) <= possible
    fastest = min(map(true_latency, space()))
    assert possible == pytest.approx(fastest, rel=0.15)


def test_a_shape_that_is_slower_than_predicted_is_not_chosen():
    """The fit is from small shapes; a machine on which wide ones are far slower is noticed."""

    def measure(candidate: Candidate) -> float:
        return true_latency(candidate) * (5 if candidate.sizes["hidden"] == 32 else 1)

    planned = plan(measure, latency_ms=1.5)
    assert measure(candidate_of(planned)) <= 1.5
    fastest = min(space(), key=measure)
    assert score_of(planned) > score(fastest, bert_axes()), "nor is all given up"


weights = st.tuples(st.floats(0.01, 1), st.floats(0, 0.5), st.floats(0, 100))
choices = st.lists(st.integers(0, len(space()) - 1), min_size=1, max_size=9)


@given(weights, choices)
@settings(max_examples=60, deadline=None)
def test_the_latency_model_finds_the_law_that_it_is_shown(law, chosen):
    """Predictions of what was measured are the measurements; with enough of them, of all else."""
    base, layer, work = law

    def measure(c: Candidate) -> float:
        return base + c.num_layers * (layer + work * c.matrix_params_per_layer / 1e6)

    model = CostModel(timed(measure))
    for at in chosen:
        assert model.measure(space()[at]) == model.predict(space()[at])
        assert model.predict(space()[at]).latency_ms == measure(space()[at])
    rows = {(c.num_layers, c.matrix_params_per_layer) for c in (space()[at] for at in chosen)}
    design = np.array([[1, n, n * w / 1e6] for n, w in rows])
    if np.linalg.matrix_rank(design) == 3 and np.linalg.cond(design) < 1e4:
        for candidate in space()[::50]:
            found = model.predict(candidate).latency_ms
            assert math.isclose(found, measure(candidate), rel_tol=1e-3)


@given(st.lists(st.tuples(st.integers(0, len(space()) - 1), st.floats(1e-3, 1e3)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_a_latency_is_never_predicted_negative_whatever_was_measured(measured):
    times = {space()[at].key: ms for at, ms in measured}
    model = CostModel(timed(lambda c: times[c.key]))
    for at, _ in measured:
        model.measure(space()[at])
    assert all(model.predict(candidate).latency_ms >= 0 for candidate in space())


def test_a_shape_is_timed_once():
    asked = []

    def measure(candidate: Candidate) -> float:
        asked.append(candidate.key)
        return true_latency(candidate)

    model = CostModel(timed(measure))
    for ms in (3.0, 1.0, 3.0):
        student = StudentSpec(name="s", budget=BudgetSpec(latency_ms=ms))
        plan_student(student, "b", space(), bert_axes(), lambda n: tuple(range(n)), model)
    assert len(asked) == len({*asked}) <= 3 + 3 * 6


def test_memory_and_energy_are_budgets_too():
    whole = candidate_of(plan(true_latency, params=FULL))
    memory = 1 + 200 * whole.size_bytes / 1e6
    planned = candidate_of(plan(true_latency, memory_mb=0.98 * memory))
    assert 1 + 200 * planned.size_bytes / 1e6 <= 0.98 * memory
    assert planned.params < whole.params
    by_energy = plan(true_latency, energy_mj=3.0)  # at 2 W
    assert by_energy.shape == plan(true_latency, latency_ms=1.5).shape
    assert true_latency(candidate_of(by_energy)) <= 1.5
    with pytest.raises(RecipeError, match=r"^budget\.memory_mb: ") as caught:
        plan(true_latency, memory_mb=1)
    assert float(caught.value.allowed.split()[1]) > 1
