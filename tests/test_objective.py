"""The loss contract: values, gradients, and what must not matter."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from limbeck.losses import divergence
from limbeck.losses.batchwise import dist
from limbeck.losses.divergence import cross_entropy, forward_kl
from limbeck.losses.ranking import ranking
from limbeck.objective import Objective, total
from limbeck.signals.codecs import Sampled, TopK
from limbeck.temperature import Fixed, PerExample, Schedule, temperature_of_entropy
from limbeck.types import Batch, Mixed, Signal


def logits(*shape, seed, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def batch(n, mask=None):
    labels = torch.arange(n) % 5
    mask = torch.ones(n, dtype=torch.bool) if mask is None else mask
    return Batch(inputs={}, labels=labels, mask=mask, example_ids=torch.arange(n))


def test_forward_kl_equals_torch_is_zero_when_equal_and_never_negative():
    p, q = logits(50, 7, seed=0), logits(50, 7, seed=1)
    reference = F.kl_div(
        (q / 3).log_softmax(-1), (p / 3).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(forward_kl(q, p, temperature=3.0), reference)
    assert forward_kl(p, p).abs().max() < 1e-6
    assert (forward_kl(q, p) > 0).all()
    with pytest.raises(ValueError, match="must match"):
        forward_kl(q, p[:, :5])


def test_forward_kl_is_the_teacher_to_student_direction():
    # p = (1/2, 1/2), q = (3/4, 1/4): KL(p||q) = ln(2/sqrt 3), KL(q||p) = ln 2 - H(q)
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.75, 0.25]]).log()
    assert forward_kl(q, p).item() == pytest.approx(0.143841, abs=1e-6)


def test_cross_entropy_equals_torch():
    q = logits(20, 5, seed=2)
    expected = F.cross_entropy(q, batch(20).labels, reduction="none")
    torch.testing.assert_close(cross_entropy(q, batch(20).labels), expected)
    expected = F.cross_entropy(q, batch(20).labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(cross_entropy(q, batch(20).labels, smoothing=0.2), expected)


def test_hard_labels_of_mixed_examples_count_by_their_shares():
    student, plain = logits(6, 5, seed=7), batch(6, torch.arange(6) != 2)
    mixed = Mixed(
        labels=torch.tensor([3, 3, 0, 1, 4, 2]),
        share=torch.tensor([0, 0.5, 0.1, 0.2, 0.5, 0.3]),
    )
    one = replace(plain, mixed=mixed)
    probs = F.one_hot(one.labels, 5) * (1 - mixed.share[:, None])
    probs = probs + F.one_hot(mixed.labels, 5) * mixed.share[:, None]
    for smoothing in (0.0, 0.1):
        objective = Objective(smoothing=smoothing)
        found = objective.terms(Signal(logits=student), Signal(), one)["hard"]
        wanted = F.cross_entropy(
            student[one.mask], probs[one.mask], reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(found.total, wanted)


OBJECTIVE = Objective(temperature=Fixed(2.0), soft_weight=1.0, hard_weight=0.5)


def gradient(size, mask=None):
    student = logits(8, 5, seed=3).requires_grad_()
    teacher = logits(8, 5, seed=4).requires_grad_()
    whole = batch(8, mask)
    count = OBJECTIVE.counts([whole])
    for start in range(0, 8, size):
        at = slice(start, start + size)
        part = Batch(inputs={}, labels=whole.labels[at], mask=whole.mask[at],
                     example_ids=whole.example_ids[at])  # fmt: skip
        terms = OBJECTIVE.terms(Signal(logits=student[at]), Signal(logits=teacher[at]), part)
        sum(total(terms, count).values()).backward()
    assert teacher.grad is None
    return student.grad


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_gradient_does_not_depend_on_the_micro_batch_even_with_a_mask(size):
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    torch.testing.assert_close(gradient(size, mask), gradient(8, mask))
    assert (gradient(size, mask)[~mask] == 0).all()


def test_weights_are_used_as_given_and_temperature_squared_is_applied():
    student, teacher = logits(4, 5, seed=5), logits(4, 5, seed=6)
    terms = OBJECTIVE.terms(Signal(logits=student), Signal(logits=teacher), batch(4))
    soft = forward_kl(student, teacher, temperature=2.0).sum() * 4
    torch.testing.assert_close(terms["soft"].total, soft)
    hard = F.cross_entropy(student, batch(4).labels, reduction="sum") * 0.5
    torch.testing.assert_close(terms["hard"].total, hard)


DIRECT = {
    "forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {}, "tvd": {}, "akl": {"head_mass": 0.4}, "ranking": {"top_k": 3},
    "dist": {"inter_weight": 2.0},
}  # fmt: skip


def soft(student, targets, **settings):
    objective = Objective(soft_weight=1.0, hard_weight=0.0, **settings)
    return objective.terms(Signal(logits=student), targets, batch(len(student)))["soft"].total


@pytest.mark.parametrize("kind", DIRECT)
def test_each_divergence_is_its_function_times_temperature_squared(kind):
    student, teacher = logits(9, 5, seed=7), logits(9, 5, seed=8)
    function = {**vars(divergence), "ranking": ranking, "dist": dist}[kind]
    expected = function(student, teacher, temperature=3.0, **DIRECT[kind]).sum() * 9
    found = soft(
        student, Signal(logits=teacher), divergence=kind, settings=DIRECT[kind],
        temperature=Fixed(3.0),
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_dkd_is_told_the_labels():
    student, teacher = logits(9, 5, seed=7), logits(9, 5, seed=8)
    expected = divergence.dkd(student, teacher, batch(9).labels, non_target_weight=2.0).sum()
    found = soft(
        student, Signal(logits=teacher), divergence="dkd", settings={"non_target_weight": 2.0}
    )
    torch.testing.assert_close(found, expected)


def test_standardized_logits_do_not_depend_on_either_sides_range():
    student, teacher = logits(9, 5, seed=7), logits(9, 5, seed=8)
    a = soft(student, Signal(logits=teacher), standardized=True)
    b = soft(3 * student + 1, Signal(logits=0.5 * teacher - 2), standardized=True)
    torch.testing.assert_close(a, b)
    assert not torch.isclose(a, soft(student, Signal(logits=teacher)))


def test_a_temperature_for_each_example_scales_each_by_its_own_square():
    student, teacher = logits(9, 5, seed=7), logits(9, 5, seed=8)
    t = temperature_of_entropy(teacher, 0.6)
    expected = sum(
        forward_kl(student[i], teacher[i], temperature=float(t[i])) * float(t[i]) ** 2
        for i in range(9)
    )
    found = soft(student, Signal(logits=teacher), temperature=PerExample(0.6))
    torch.testing.assert_close(found, expected)


def test_a_schedule_is_read_at_the_share_of_the_training_that_is_done():
    student, teacher = logits(9, 5, seed=7), logits(9, 5, seed=8)
    objective = Objective(soft_weight=1.0, hard_weight=0.0, temperature=Schedule(4.0, 1.0))
    for done, t in ((0.0, 4.0), (1.0, 1.0)):
        found = objective.terms(
            Signal(logits=student), Signal(logits=teacher), batch(9), done=done
        )["soft"].total
        torch.testing.assert_close(found, forward_kl(student, teacher, temperature=t).sum() * t**2)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_stored_top_k_of_everything_is_the_dense_loss(kind):
    student, teacher = logits(9, 5, seed=7), logits(9, 5, seed=8)
    codec = TopK(5, temperatures=(2.0,))
    keys = torch.zeros(9, 2, dtype=torch.int64)
    kept = Signal(targets=codec.decode(codec.encode(teacher, keys), 5, 2.0))
    settings = {"divergence": kind, "temperature": Fixed(2.0)}
    dense = soft(student, Signal(logits=teacher), **settings)
    torch.testing.assert_close(soft(student, kept, **settings), dense, rtol=2e-3, atol=2e-3)


def test_stored_samples_have_the_dense_gradient_in_the_mean():
    student = logits(4, 30, seed=7).requires_grad_()
    teacher = logits(4, 30, seed=8)
    codec = Sampled(6, temperature=2.0)
    at = Fixed(2.0)
    (dense,) = torch.autograd.grad(soft(student, Signal(logits=teacher), temperature=at), student)
    keys = torch.stack([torch.arange(4), torch.zeros(4).long()], 1)
    draws = []
    for seed in range(400):
        targets = codec.decode(codec.encode(teacher, keys, seed), 30, 2.0)
        loss = soft(student, Signal(targets=targets), temperature=at)
        draws.append(torch.autograd.grad(loss, student)[0])
    drawn = torch.stack(draws)
    # all coordinates at once: by itself, a class that was drawn once or never has no spread
    expected = (drawn.var(0) / len(draws)).sum().sqrt()
    assert (drawn.mean(0) - dense).norm() < 2 * expected
    assert expected < 0.1 * dense.norm(), "or a bias would be lost in the noise"
    assert drawn.std(0).max() > 0.01, "there is noise to average"


def test_positions_that_do_not_count_may_hold_anything():
    student = logits(6, 5, seed=7).requires_grad_()
    teacher = logits(6, 5, seed=8)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    spoilt, bad = student.detach().clone(), teacher.clone()
    spoilt[~mask], bad[~mask] = torch.nan, torch.inf
    spoilt.requires_grad_()
    for given, taught in ((student, teacher), (spoilt, bad)):
        terms = OBJECTIVE.terms(Signal(logits=given), Signal(logits=taught), batch(6, mask))
        sum(term.total for term in terms.values()).backward()
    torch.testing.assert_close(spoilt.grad, student.grad)
    assert (spoilt.grad[~mask] == 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("distill.divergence=klingon",), "recipe.distill.divergence"),
        (("distill.divergence={kind: jsd, alpha: 0.1}",), "no effect with jsd"),
        (("distill.divergence={kind: jsd, beta: 1}",), "beta"),
        (("distill.divergence=dkd", "signals.topk.k=2"), "dkd"),
        (("distill.divergence=tvd", "signals.sampled.n=2"), "forward_kl"),
        (("distill.standardize=true", "signals.topk.k=2"), "every logit"),
        (("distill.temperature=auto", "signals.topk.k=2"), "one number"),
        (("distill.temperature={start: 4}",), "start with end"),
        (("distill.balance=calibrated", "distill.hard_weight=0"), "one term"),
        (("distill.balance=best",), "calibrated"),
    ],
)
def test_losses_that_cannot_be_are_refused_before_any_training(distil, quick, changes, said):
    assert said in distil(*changes)
