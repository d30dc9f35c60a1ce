"""Every divergence against loops over Python floats, and what must hold whatever the logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from limbeck.losses.divergence import (
    dkd_parts,
    forward_kl,
    jsd,
    skew_kl,
    skew_reverse_kl,
    standardize,
    tvd,
)
from limbeck.losses.ranking import ranking
from losses_oracle import (
    CASES,
    DIVERGENCES,
    assert_close,
    log_probs,
    ours,
    randn,
    two_sided,
    value_and_gradient,
)

each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


@each_divergence
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_equal_the_loops(name, case, temperature):
    function, oracle = DIVERGENCES[name]
    student, teacher = two_sided(case)
    values, gradient = ours(function, student, teacher, temperature=temperature)
    expected, expected_gradient = value_and_gradient(oracle, student, teacher, temperature)
    assert values.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert_close(values, expected)
    assert_close(gradient, expected_gradient, 2e-2 if case == "bf16" else 1e-5)


@each_divergence
@pytest.mark.parametrize("case", CASES)
def test_equals_give_zero_and_no_gradient(name, case):
    _, teacher = two_sided(case)
    values, gradient = ours(DIVERGENCES[name][0], teacher, teacher)
    assert values.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@each_divergence
def test_never_negative_and_indifferent_to_the_order_of_classes(name):
    student, teacher = randn(200, 9, seed=3, scale=4), randn(200, 9, seed=4, scale=4)
    order = torch.tensor([0, 5, 2, 8, 1, 7, 3, 6, 4])  # dkd's label is class 0
    values = DIVERGENCES[name][0](student, teacher)
    assert values.min() > -1e-6
    torch.testing.assert_close(DIVERGENCES[name][0](student[:, order], teacher[:, order]), values)


@each_divergence
def test_the_teacher_gets_no_gradient_and_shapes_must_match(name):
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    DIVERGENCES[name][0](student, teacher).sum().backward()
    assert teacher.grad is None
    with pytest.raises(ValueError, match="must match"):
        DIVERGENCES[name][0](student, teacher[:, :3])


@each_divergence
def test_gradcheck_and_leading_dimensions(name):
    student = randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    teacher = randn(2, 3, 4, seed=1, dtype=torch.float64)
    if name != "akl":  # its weights are constants by definition
        assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name][0](s, teacher), (student,))
    values = DIVERGENCES[name][0](student, teacher)
    one = DIVERGENCES[name][0](student[1, 2], teacher[1, 2])
    torch.testing.assert_close(values[1, 2], one)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_bounds(beta, scale):
    student, teacher = randn(100, 6, scale=scale), randn(100, 6, seed=1, scale=scale)
    coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert jsd(student, teacher, beta=beta).max() <= coin + 1e-6
    assert tvd(student, teacher).max() <= 1 + 1e-6
    for skewed in (skew_kl, skew_reverse_kl):
        assert skewed(student, teacher, alpha=beta).max() <= -math.log(beta) + 1e-6


numbers = st.one_of(st.floats(-1e4, 1e4, width=32), st.just(-math.inf))
rows = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6)


@each_divergence
@settings(max_examples=40, deadline=None)
@given(rows=rows)
def test_whatever_the_logits_value_and_gradient_are_finite(name, rows):
    # class 0 is possible on both sides: a distribution has at least one
    student, teacher = torch.tensor([(0.0, 0.0), *rows]).T.unsqueeze(1)
    values, gradient = ours(DIVERGENCES[name][0], student, teacher)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert values.min() > -1e-5


def test_a_temperature_per_position():
    student, teacher = two_sided("random")
    temperature = torch.linspace(1, 4, 8)
    together = forward_kl(student, teacher, temperature=temperature)
    rows = zip(student, teacher, temperature.tolist(), strict=True)
    apart = [forward_kl(s, t, temperature=one) for s, t, one in rows]
    torch.testing.assert_close(together, torch.stack(apart))


def test_jsd_tends_to_the_kls_at_its_ends_and_says_so():
    # JSD(beta) / (1 - beta) -> KL(q || p) as beta -> 1, the teacher's share
    student, teacher = two_sided("random")
    double = student.double(), teacher.double()
    near = jsd(*double, beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(near, DIVERGENCES["reverse_kl"][0](*double), rtol=1e-3, atol=1e-5)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="forward_kl and reverse_kl"):
            jsd(student, teacher, beta=beta)
    with pytest.raises(ValueError, match="use reverse_kl"):
        skew_reverse_kl(student, teacher, alpha=0.0)


def test_dkd_parts_make_up_forward_kl():
    student, teacher = two_sided("random")
    labels = torch.arange(8) % 7
    target, others = dkd_parts(student, teacher, labels)
    p = teacher.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(target + (1 - p) * others, forward_kl(student, teacher))


def test_standardized_logits_do_not_depend_on_range_and_shift():
    logits = randn(5, 9, dtype=torch.float64)
    standard = standardize(logits)
    torch.testing.assert_close(standard.mean(-1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(standard.std(-1, correction=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(standardize(logits * 40 - 7), standard)
    assert torch.autograd.gradcheck(standardize, (logits.requires_grad_(),))
    some = logits.detach().clone()
    some[:, 4] = -torch.inf
    torch.testing.assert_close(
        standardize(some)[:, [0, 1, 2, 3, 5, 6, 7, 8]], standardize(some[:, some[0].isfinite()])
    )
    assert (standardize(some)[:, 4] == -torch.inf).all()


@pytest.mark.parametrize("logits", [torch.zeros(3, 1), torch.full((3, 4), 7.0)])
def test_standardizing_equal_logits_gives_zero_and_a_finite_gradient(logits):
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(standardize(leaf), logits).sum(), leaf)
    assert (standardize(logits) == 0).all()
    assert gradient.isfinite().all()


def ranking_by_loops(student, teacher, top_k, temperature):
    best = sorted(range(len(teacher)), key=lambda c: -teacher[c])[:top_k]
    total, pairs = 0.0, 0
    for a, i in enumerate(best):
        for j in best[a + 1 :]:
            if math.inf in map(abs, (student[i], student[j], teacher[i], teacher[j])):
                continue
            p = log_probs([teacher[i], teacher[j]], temperature)
            q = log_probs([student[i], student[j]], temperature)
            total += sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))
            pairs += 1
    return total / max(pairs, 1)


@pytest.mark.parametrize("case", CASES)
def test_ranking_equals_the_loops(case):
    student, teacher = two_sided(case)
    values, gradient = ours(ranking, student, teacher, top_k=4, temperature=2.0)
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    expected = [ranking_by_loops(s, t, 4, 2.0) for s, t in rows]
    assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert gradient.isfinite().all()
    assert values.min() >= -1e-6
    assert ranking(teacher, teacher).abs().max() < 1e-6


def test_ranking_sees_order_and_not_shift_and_passes_gradcheck():
    student, teacher = randn(4, 6, dtype=torch.float64), randn(4, 6, seed=1, dtype=torch.float64)
    torch.testing.assert_close(ranking(student + 5, teacher), ranking(student, teacher))
    assert torch.autograd.gradcheck(lambda s: ranking(s, teacher), (student.requires_grad_(),))
    with pytest.raises(ValueError, match="must match"):
        ranking(student, teacher[:, :5])


def test_forward_kl_equals_torchs_kl_div():
    student, teacher = randn(30, 500, scale=3), randn(30, 500, seed=1, scale=3)
    reference = F.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    assert_close(forward_kl(student, teacher), reference)
