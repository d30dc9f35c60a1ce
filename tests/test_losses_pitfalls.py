"""One test per error that other projects have shipped and that a pure loss can make.

The numbers are those of PITFALLS.md in the project's notes; the others concern bookkeeping, and
how a capture or a training goes.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from limbeck.losses.crosstokenizer import uld
from limbeck.losses.divergence import forward_kl, jsd, reverse_kl, skew_kl, tvd
from limbeck.losses.fused import (
    Head,
    Term,
    against_head,
    against_labels,
    against_logits,
    against_sample,
    against_sparse,
    fused_loss,
)
from limbeck.losses.sparse import sampled_cross_entropy, sparse_divergence
from losses_oracle import randn

P, D, V = 40, 16, 50


def fused_values(hidden, head, loss):
    return fused_loss(hidden, head, [Term(loss=loss, weight=torch.ones(len(hidden)))]).values[0]


def test_1_forward_is_from_teacher_to_student():
    # p = (1/2, 1/2), q = (3/4, 1/4): KL(p || q) = ln(2 / sqrt 3), KL(q || p) = ln 2 - H(q)
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    assert forward_kl(student, teacher).item() == pytest.approx(0.143841, abs=1e-6)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_2_a_fused_student_equal_to_its_teacher_has_loss_0(temperature):
    hidden, head = randn(P, D), Head(weight=randn(V, D, seed=1))
    for loss in (
        against_head(forward_kl, hidden, head, temperature=temperature),
        against_logits(forward_kl, head.logits(hidden), temperature=temperature),
    ):
        assert fused_values(hidden, head, loss).abs().max() < 1e-5


def test_3_a_position_that_is_to_be_ignored_is_and_a_label_that_is_not_there_is_an_error():
    hidden, head = randn(4, D), Head(weight=randn(V, D, seed=1))
    labels = torch.tensor([3, -100, 5, -100])
    counted = (labels >= 0).float()
    term = Term(loss=against_labels(labels), weight=counted)
    expected = F.cross_entropy(head.logits(hidden), labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(fused_loss(hidden, head, [term]).total, expected)
    with pytest.raises((RuntimeError, IndexError)):
        fused_loss(hidden, head, [Term(loss=against_labels(labels), weight=torch.ones(4))])


def test_4_a_position_counts_the_same_however_the_step_is_cut():
    hidden, weight = randn(P, D), randn(V, D, seed=1).requires_grad_()
    teacher = randn(P, V, seed=2)
    counted = (torch.arange(P) % 3 != 0) & (torch.arange(P) < 30)  # the cut's parts are unlike

    def gradient(parts):
        total = torch.zeros_like(weight)
        for rows in parts:
            term = Term(
                loss=against_logits(forward_kl, teacher[rows]),
                weight=counted[rows] / counted.sum(),
            )
            loss = fused_loss(hidden[rows], Head(weight=weight), [term]).total
            total += torch.autograd.grad(loss, weight)[0]
        return total

    values = forward_kl(hidden @ weight.T, teacher)[counted]
    (expected,) = torch.autograd.grad(values.mean(), weight)
    for parts in ([slice(0, P)], [slice(0, 7), slice(7, 29), slice(29, P)]):
        torch.testing.assert_close(gradient(parts), expected)


def test_5_no_path_multiplies_by_temperature_squared():
    hidden, head = randn(P, D), Head(weight=randn(V, D, seed=1))
    student, teacher = head.logits(hidden), randn(P, V, seed=2, scale=3)
    ids, probs = torch.arange(V).expand(P, V), (teacher / 4).softmax(-1)
    expected = F.kl_div(
        (student / 4).log_softmax(-1), (teacher / 4).log_softmax(-1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    for found in (
        forward_kl(student, teacher, temperature=4.0),
        sparse_divergence(forward_kl, student, ids, probs, torch.zeros(P), temperature=4.0),
        fused_values(hidden, head, against_logits(forward_kl, teacher, temperature=4.0)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_6_jsd_mixes_probabilities_and_is_at_most_ln_2():
    student, teacher = torch.tensor([1e4, 0.0, -1e4]), torch.tensor([-1e4, 0.0, 1e4])
    assert jsd(student, teacher).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_7_and_29_logits_are_never_rounded_to_bf16(autocast):
    hidden, weight = randn(P, D, scale=2), randn(V, D, seed=1)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    leaf = hidden.double().requires_grad_()
    # close to its teacher, the loss is a small difference of large numbers
    teacher = (leaf @ weight.double().T).detach() + randn(P, V, seed=2, scale=0.1).double()
    forward_kl(leaf @ weight.double().T, teacher).sum().backward()

    def error(logits_of):
        x = hidden.clone().requires_grad_()
        logits_of(x).sum().backward()
        return ((x.grad.double() - leaf.grad).norm() / leaf.grad.norm()).item()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = against_logits(forward_kl, teacher)
        ones = torch.ones(P)
        ours = error(
            lambda x: fused_loss(x, Head(weight=weight), [Term(loss=loss, weight=ones)]).total
        )
        rounded = error(lambda x: forward_kl((x @ weight.T).double(), teacher))
    assert ours < 5e-3  # the gradient itself is bf16
    assert rounded > 5 * ours


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, jsd, skew_kl, tvd])
def test_29_a_softmax_stays_in_fp32_under_autocast(function):
    student, teacher = randn(P, V, scale=3).bfloat16(), randn(P, V, seed=1, scale=3).bfloat16()
    expected = function(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_8_logit_scale_and_softcap_are_applied():
    hidden, weight = randn(P, D), randn(V, D, seed=1)
    head = Head(weight=weight, logit_scale=0.3, softcap=2.0)
    expected = 2 * torch.tanh(F.linear(hidden, weight) * 0.3 / 2)
    torch.testing.assert_close(head.logits(hidden), expected)
    labels = torch.arange(P)
    torch.testing.assert_close(
        fused_values(hidden, head, against_labels(labels)),
        F.cross_entropy(expected, labels, reduction="none"),
    )


def test_9_a_position_without_a_teacher_is_left_out_and_does_not_spread():
    hidden, head = randn(P, D).requires_grad_(), Head(weight=randn(V, D, seed=1).requires_grad_())
    teacher = randn(P, V, seed=2)
    teacher[0] = -torch.inf
    there = torch.ones(P).index_fill(0, torch.tensor([0]), 0)
    found = fused_loss(hidden, head, [Term(loss=against_logits(forward_kl, teacher), weight=there)])
    expected = forward_kl(head.logits(hidden), teacher)[1:].sum()
    torch.testing.assert_close(found.total, expected)
    found.total.backward()
    assert (hidden.grad[0] == 0).all()
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("num", [P - 1, P + 1, P + 7])
def test_10_a_teacher_of_another_number_of_tokens_is_refused(num):
    hidden, head = randn(P, D), Head(weight=randn(V, D, seed=1))
    teacher, ids = randn(num, V), torch.arange(3).expand(num, 3)
    probs = torch.full((num, 3), 0.2)
    with pytest.raises(ValueError, match="must match"):
        forward_kl(head.logits(hidden), teacher)
    for loss in (
        against_logits(forward_kl, teacher),
        against_head(forward_kl, randn(num, D), head),
        against_sparse(forward_kl, ids, probs, torch.full((num,), 0.4)),
        against_sample(ids, probs),
        against_labels(torch.zeros(num, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=f"the teacher has {num} positions, hidden {P}"):
            fused_values(hidden, head, loss)


def test_11_a_vocabulary_is_never_padded_with_zero_logits():
    student, teacher = randn(3, V), randn(3, V + 2, seed=1)
    with pytest.raises(ValueError, match="never pad a vocabulary with zeros"):
        forward_kl(student, teacher)
    padded = torch.cat([student, torch.full((3, 2), -torch.inf)], -1)
    torch.testing.assert_close(uld(student, teacher), uld(padded, teacher))
    assert uld(student, padded).max() < 1e-6
    assert forward_kl(padded, padded).abs().max() < 1e-6


def test_12_mass_that_the_student_puts_outside_the_best_k_costs():
    ids, probs, tail = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]), torch.zeros(1)
    within = torch.tensor([[0.6, 0.4, 1e-9]]).log()
    outside = torch.tensor([[0.3, 0.2, 0.5]]).log()  # the same ratio within
    assert sparse_divergence(forward_kl, within, ids, probs, tail).item() < 1e-6
    found = sparse_divergence(forward_kl, outside, ids, probs, tail).item()
    assert found == pytest.approx(math.log(2), abs=1e-6)


def test_13_a_sample_has_the_dense_gradient_as_its_mean_and_a_renormalised_top_k_has_not():
    logits, teacher = randn(V, seed=1), randn(V, seed=2)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    dense = q - p

    def gradient(ids, weights):
        leaf = logits.expand(len(ids), V).clone().requires_grad_()
        return torch.autograd.grad(sampled_cross_entropy(leaf, ids, weights).sum(), leaf)[0]

    # one id drawn from a flatter proposal, its weight p / proposal: the mean over all draws
    proposal = (teacher / 2).softmax(-1)
    draws = gradient(torch.arange(V)[:, None], (p / proposal)[:, None])
    torch.testing.assert_close((proposal[:, None] * draws).sum(0), dense, atol=1e-6, rtol=1e-5)
    best = p.topk(10)
    renormalised = gradient(best.indices[None], (best.values / best.values.sum())[None])[0]
    assert (renormalised - dense).norm() > 0.2 * dense.norm()


def test_14_kl_reaches_0_is_not_divided_by_the_vocabulary_and_cross_entropy_is_called_so():
    logits = randn(P, V, scale=3)
    assert forward_kl(logits, logits).abs().max() < 1e-6
    few = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    many = [torch.cat([x, torch.full((1, 998), -torch.inf)], -1) for x in few]
    torch.testing.assert_close(forward_kl(*many), forward_kl(*few))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    ids = torch.arange(V).expand(P, V)
    found = sampled_cross_entropy(logits, ids, logits.softmax(-1))
    torch.testing.assert_close(found, entropy)  # that of equals is the entropy: not 0, not "KL"


def test_15_weights_are_used_as_given():
    hidden, head = randn(P, D), Head(weight=randn(V, D, seed=1))
    term = Term(loss=against_labels(torch.arange(P)), weight=torch.full((P,), 3.0))
    expected = 3 * F.cross_entropy(head.logits(hidden), torch.arange(P), reduction="sum")
    torch.testing.assert_close(fused_loss(hidden, head, [term]).total, expected)


def test_22_every_setting_of_a_term_is_read():
    hidden, head = randn(P, D), Head(weight=randn(V, D, seed=1))
    teacher = randn(P, V, seed=2)
    probs, ids = teacher.softmax(-1).topk(4)
    tail = 1 - probs.sum(-1)
    for make in (
        lambda t: against_logits(forward_kl, teacher, temperature=t),
        lambda t: against_head(forward_kl, hidden, Head(weight=randn(V, D)), temperature=t),
        lambda t: against_sparse(forward_kl, ids, probs, tail, temperature=t),
        lambda t: against_sample(ids, probs, temperature=t),
    ):
        one, four = (fused_values(hidden, head, make(t)) for t in (1.0, 4.0))
        assert (one - four).abs().max() > 1e-3


def test_31_the_classes_are_the_last_axis():
    student, teacher = randn(2, 5, V), randn(2, 5, V, seed=1)
    found = forward_kl(student, teacher)
    assert found.shape == (2, 5)
    torch.testing.assert_close(
        found.flatten(), forward_kl(student.view(-1, V), teacher.view(-1, V))
    )
