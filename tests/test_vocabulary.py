"""A padded vocabulary is the same vocabulary; another tokenizer is another."""

import pytest
import torch
from torch.nn import functional as F

from limbeck.errors import DataError
from limbeck.losses.divergence import forward_kl
from limbeck.losses.sparse import sparse_divergence
from limbeck.objective import Objective
from limbeck.signals.codecs import Sampled, TopK
from limbeck.temperature import Fixed
from limbeck.types import Batch, DenseTargets, Signal, SparseTargets
from limbeck.vocabulary import fitted, shared_ids

TOKENS = {f"t{i}": i for i in range(20)}


def logits(*shape, seed):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sizes_say_nothing_and_tokens_everything():
    sizes = {"student_size": 24, "teacher_size": 32}
    assert shared_ids(TOKENS, dict(reversed(TOKENS.items())), **sizes) == 24
    swapped = TOKENS | {"t3": 4, "t4": 3}
    with pytest.raises(DataError, match="id 3 is 't3' to its tokenizer, 't4'"):
        shared_ids(TOKENS, swapped, **sizes)
    with pytest.raises(DataError, match="id 20 is None to its tokenizer, 'new'"):
        shared_ids(TOKENS, TOKENS | {"new": 20}, **sizes)
    with pytest.raises(DataError, match="1 of its tokens, 'new' first"):
        shared_ids(TOKENS, TOKENS | {"new": 28}, **sizes)


@pytest.mark.parametrize("sizes", [(24, 32), (32, 24)])
def test_padding_is_dropped_on_the_teachers_side_and_pushed_down_on_the_students(sizes):
    student_size, teacher_size = sizes
    student = logits(7, student_size, seed=0).requires_grad_()
    teacher = logits(7, teacher_size, seed=1)
    batch = Batch(inputs={}, labels=torch.zeros(7, dtype=torch.long),
                  mask=torch.ones(7, dtype=torch.bool), example_ids=torch.arange(7))  # fmt: skip
    objective = Objective(soft_weight=1.0, hard_weight=0.0, temperature=Fixed(2.0), shared_ids=24)
    term = objective.terms(Signal(logits=student), Signal(logits=teacher), batch)["soft"]
    p = (teacher[:, :24] / 2).softmax(-1)
    p = F.pad(p, (0, student_size - 24))
    reference = F.kl_div((student / 2).log_softmax(-1), p, reduction="sum") * 4
    torch.testing.assert_close(term.total, reference)
    term.total.backward()
    assert student.grad.isfinite().all()
    if student_size > 24:
        assert (student.grad[:, 24:] > 0).all(), "a step lowers them"


@pytest.mark.parametrize("k", [4, 12, 20])
def test_kept_targets_lose_what_the_student_cannot_say(k):
    teacher = logits(50, 32, seed=2)
    codec = TopK(k=k, values="fp16", temperatures=(2.0,))
    keys = torch.stack([torch.arange(50)] * 2, 1)
    stored = codec.decode(codec.encode(teacher, keys), 32, 2.0)
    found = fitted(stored, 24, 24)
    assert isinstance(found, SparseTargets)
    assert (found.ids < 24).all()
    assert all(len({*row}) == k for row in found.ids.tolist()), "no id stands twice"
    torch.testing.assert_close(found.probs.sum(-1) + found.tail, torch.ones(50))
    for row in range(50):
        was = dict(zip(stored.ids[row].tolist(), stored.probs[row].tolist(), strict=True))
        gone = sum(p for i, p in was.items() if i >= 24)
        for i, p in zip(found.ids[row].tolist(), found.probs[row].tolist(), strict=True):
            assert p == pytest.approx(was.get(i, 0.0) / (1 - gone), abs=1e-6)
    student = logits(50, 24, seed=3)
    value = sparse_divergence(
        forward_kl, student, found.ids, found.probs, found.tail, temperature=2.0
    )
    assert value.isfinite().all() and (value >= -1e-6).all()


def test_samples_lose_them_too_and_stay_unbiased_for_the_rest():
    teacher = logits(1, 32, seed=4).expand(4000, 32)
    codec = Sampled(n=6, temperature=2.0)
    keys = torch.stack([torch.arange(4000)] * 2, 1)
    found = fitted(codec.decode(codec.encode(teacher, keys), 32, 2.0), 24, 24)
    assert isinstance(found, SparseTargets)
    laid = torch.zeros(4000, 24).scatter_add_(1, found.ids, found.probs)
    p = (teacher[0] / 2).softmax(-1)[:24]
    error = laid.mean(0) - p
    assert (error.abs() < 5 * laid.std(0) / 4000**0.5 + 1e-4).all()


def test_one_vocabulary_is_left_as_it_is():
    targets = DenseTargets(logits=logits(3, 24, seed=5))
    assert torch.equal(fitted(targets, 24, 24).logits, targets.logits)
