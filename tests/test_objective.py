"""The loss contract: values, gradients, and what must not matter."""

import pytest
import torch
from torch.nn import functional as F

from limbeck.losses.divergence import cross_entropy, forward_kl
from limbeck.objective import Objective, total
from limbeck.temperature import Fixed
from limbeck.types import Batch, Signal


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


OBJECTIVE = Objective(temperature=Fixed(2.0), soft_weight=1.0, hard_weight=0.5)


def gradient(size, mask=None):
    student = logits(8, 5, seed=3).requires_grad_()
    teacher = logits(8, 5, seed=4).requires_grad_()
    whole = batch(8, mask)
    count = OBJECTIVE.count([whole])
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
