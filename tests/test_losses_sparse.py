"""Sparse targets: K + 1 outcomes by loops, bounds, an unbiased gradient, and no second tensor."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.losses import sparse
from limbeck.losses.divergence import forward_kl
from limbeck.losses.sparse import coarse_log_probs, sampled_cross_entropy, sparse_divergence
from losses_oracle import (
    CASES,
    DIVERGENCES,
    F_DIVERGENCES,
    assert_close,
    log_probs,
    ours,
    randn,
    two_sided,
    value_and_gradient,
)


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    if request.param == "many chunks":
        monkeypatch.setattr(sparse, "rows_per_chunk", lambda *_: 3)


def top_k(teacher, k, temperature=1.0):
    p = (teacher.double() / temperature).softmax(-1)
    probs, ids = p.topk(k, dim=-1)
    return ids, probs.float(), (1 - probs.sum(-1)).clamp_min(0).float()


def coarse(oracle, ids, log_p):
    """`oracle` over K + 1 outcomes; its teacher is `log_p`, whatever it is called with."""
    inside = set(ids)

    def of_outcomes(log_q):
        outside = [x for v, x in enumerate(log_q) if v not in inside]
        top = max(outside)
        tail = top + math.log(math.fsum(math.exp(x - top) for x in outside))
        return [log_q[v] for v in ids] + [tail]

    return lambda log_q, _, fixed: oracle(of_outcomes(log_q), log_p, of_outcomes(fixed))


@pytest.mark.parametrize("name", F_DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("case", ["random", "extreme", "offset", "both rule out", "bf16"])
def test_value_and_gradient_equal_loops_over_outcomes(name, temperature, case, chunks):
    function, oracle = DIVERGENCES[name]
    student, teacher = two_sided(case)
    ids, probs, tail = top_k(teacher, 3, temperature)
    values, gradient = ours(
        lambda s, _: sparse_divergence(function, s, ids, probs, tail, temperature=temperature),
        student, teacher,
    )  # fmt: skip
    for i in range(len(student)):
        log_p = [math.log(x) if x else -math.inf for x in [*probs[i].tolist(), float(tail[i])]]
        log_p = log_probs(log_p)  # fp32 probabilities do not quite sum to 1
        expected = value_and_gradient(
            coarse(oracle, ids[i].tolist(), log_p), student[i : i + 1], teacher[i : i + 1],
            temperature,
        )  # fmt: skip
        assert_close(values[i : i + 1], expected[0])
        assert_close(gradient[i : i + 1], expected[1], 2e-2 if case == "bf16" else 1e-5)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_never_above_the_dense_divergence_and_growing_with_k(name):
    student, teacher = randn(50, 12, scale=3), randn(50, 12, seed=1, scale=3)
    dense = DIVERGENCES[name][0](student, teacher)
    below = torch.zeros(50)
    for k in range(1, 12):
        here = sparse_divergence(DIVERGENCES[name][0], student, *top_k(teacher, k))
        assert (here <= dense + 1e-5).all()
        assert (here >= below - 1e-5).all()
        below = here


@pytest.mark.parametrize("name", F_DIVERGENCES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "bf16"])
def test_all_classes_and_no_tail_is_the_dense_divergence(name, case, chunks):
    function = DIVERGENCES[name][0]
    student, teacher = two_sided(case)
    ids, probs, tail = top_k(teacher, teacher.shape[-1])
    tail = torch.zeros_like(tail)
    found = ours(lambda s, _: sparse_divergence(function, s, ids, probs, tail), student, teacher)
    # the store holds probabilities, whose zeros are zeros
    stored = torch.zeros_like(probs).scatter(-1, ids, probs).log()
    expected = ours(function, student.double(), stored.double())
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


def test_a_tail_that_holds_almost_nothing_keeps_its_precision(chunks):
    # log(1 - sum) in fp32 would have no digit left of a tail of 1e-9
    student = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    found, gradient = ours(
        lambda s, _: coarse_log_probs(s, torch.tensor([[0]]))[..., -1], student, None
    )
    leaf = student.double().requires_grad_()
    expected = leaf[:, 1:].logsumexp(-1) - leaf.logsumexp(-1)
    assert_close(found, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def test_a_teacher_whose_best_are_the_students_gives_zero(chunks):
    student = randn(6, 9, scale=3)
    values, gradient = ours(
        lambda s, _: sparse_divergence(forward_kl, s, *top_k(student, 4)), student, None
    )
    assert values.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_gradcheck_with_leading_dimensions(chunks):
    student = randn(2, 4, 6, dtype=torch.float64).requires_grad_()
    ids, probs, tail = top_k(randn(2, 4, 6, seed=1), 2, temperature=2.0)
    weights = probs.double() * torch.tensor([1.5, 0.2])

    def check(function):
        assert torch.autograd.gradcheck(function, (student,))

    check(lambda s: coarse_log_probs(s, ids, temperature=2.0))
    check(lambda s: sparse_divergence(forward_kl, s, ids, probs, tail, temperature=2.0))
    check(lambda s: sampled_cross_entropy(s, ids, weights, temperature=2.0))
    assert sampled_cross_entropy(student, ids, weights).shape == (2, 4)


def test_a_graph_may_be_walked_twice(chunks):
    leaf = randn(5, 6).requires_grad_()
    loss = sparse_divergence(forward_kl, leaf, *top_k(randn(5, 6, seed=1), 2)).sum()
    loss = loss + sampled_cross_entropy(leaf, torch.zeros(5, 1, dtype=int), torch.ones(5, 1)).sum()
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", ["random", "extreme", "offset", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sampled_cross_entropy_is_minus_weights_times_log_q_also_of_repeated_ids(
    case, temperature, chunks
):
    student, _ = two_sided(case)
    ids = torch.tensor([[0, 3, 3]]).expand(8, -1)
    weights = torch.rand(8, 3, generator=torch.Generator().manual_seed(3))
    found = ours(
        lambda s, _: sampled_cross_entropy(s, ids, weights, temperature=temperature), student, None
    )
    leaf = student.double().requires_grad_()
    target = torch.zeros(8, 7).index_put(
        (torch.arange(8)[:, None], ids), weights, accumulate=True
    ).double()  # fmt: skip
    expected = F.cross_entropy(leaf / temperature, target, reduction="none")
    assert_close(found[0], expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    assert_close(found[1], gradient, 2e-2 if case == "bf16" else 1e-5)


@pytest.mark.parametrize("case", ["random", "single class", "teacher rules out"])
def test_the_sampled_gradient_is_unbiased_and_that_of_the_best_alone_is_not(case):
    student, teacher = two_sided(case)
    classes = teacher.shape[-1]
    proposal = torch.linspace(1, 2, classes).softmax(-1)  # any that reaches every class
    p = teacher.double().softmax(-1)
    expectation = torch.zeros(student.shape, dtype=torch.float64)
    for v in range(classes):  # one draw from the proposal, each outcome with its probability
        ids, weights = torch.full((8, 1), v), p[:, v : v + 1] / proposal[v]
        _, gradient = ours(
            lambda s, _, i=ids, w=weights: sampled_cross_entropy(s, i, w), student, 0
        )
        expectation += proposal[v] * gradient.double()
    _, dense = value_and_gradient(DIVERGENCES["forward_kl"][1], student, teacher)
    assert_close(expectation, dense)
    if case == "random":
        ids, probs, _ = top_k(teacher, 2)
        renormalised = probs / probs.sum(-1, keepdim=True)
        _, biased = ours(lambda s, _: sampled_cross_entropy(s, ids, renormalised), student, 0)
        assert (biased - dense).norm() > 0.05 * dense.norm()


class Sizes(TorchDispatchMode):
    """Sizes of all tensors that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = out if isinstance(out, (tuple, list)) else [out]
        new = [x for x in flat if isinstance(x, torch.Tensor) and not func.is_view]
        self.seen += [x.numel() for x in new]
        return out


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_no_second_tensor_of_the_logits_size_but_the_gradient(kind, monkeypatch):
    monkeypatch.setattr(sparse, "CHUNK_BYTES", {"cpu": 16 * 4 * 100})
    student = randn(64, 100).requires_grad_()
    ids, probs, tail = top_k(randn(64, 100, seed=1), 4)
    with Sizes() as forward:
        if kind == "top-k":
            loss = sparse_divergence(forward_kl, student, ids, probs, tail).sum()
        else:
            loss = sampled_cross_entropy(student, ids, probs).sum()
    with Sizes() as backward:
        loss.backward()
    assert max(forward.seen) == 16 * 100
    # the gradient itself, made empty and filled in place
    assert backward.seen.count(64 * 100) == 1
    assert student.grad.isfinite().all()


def test_what_only_the_student_rules_out_is_loud_finite_and_takes_no_gradient(chunks):
    student, teacher = two_sided("random")
    student[:, 0] = -torch.inf
    ids = torch.arange(7).expand(8, -1)
    probs, tail = teacher.softmax(-1), torch.zeros(8)
    dense = ours(forward_kl, student, teacher)
    found = ours(lambda s, _: sparse_divergence(forward_kl, s, ids, probs, tail), student, teacher)
    expected = probs[:, 0].double() * 1e30
    # the other classes share what is left of the teacher's mass: q (1 - p[0]) - p
    q = student.double().softmax(-1)
    gradient = q * (1 - probs[:, :1].double()) - probs.double()
    gradient[:, 0] = 0
    for values, grad in (dense, found):
        assert_close(values, expected)
        assert_close(grad, gradient)
