"""Other tokenizers: sorted probabilities, spans of bytes, and what is left when they are equal."""

import math

import pytest
import torch

from limbeck.losses.crosstokenizer import align_spans, span_kl, span_starts, uld
from limbeck.losses.divergence import forward_kl
from losses_oracle import CASES, assert_close, log_probs, ours, randn, two_sided


@pytest.mark.parametrize("case", CASES)
def test_uld_equals_loops_over_sorted_probabilities(case):
    student, teacher = two_sided(case)
    teacher = teacher[:, : max(1, teacher.shape[-1] - 2)]  # another vocabulary
    expected = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = (sorted(map(math.exp, log_probs(z, 2.0)), reverse=True) for z in (s, t))
        p += [0.0] * (len(q) - len(p))
        expected.append(math.fsum(abs(a - b) for a, b in zip(q, p, strict=True)))
    values, gradient = ours(uld, student, teacher, temperature=2.0)
    assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert values.max() <= 2
    assert gradient.isfinite().all()


def test_uld_ignores_names_of_classes_and_passes_gradcheck():
    student, teacher = randn(4, 6, dtype=torch.float64), randn(4, 9, seed=1, dtype=torch.float64)
    torch.testing.assert_close(uld(student.flip(-1), teacher), uld(student, teacher))
    assert uld(student, student.flip(-1)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda s: uld(s, teacher), (student.requires_grad_(),))


def ends(*tokens):
    return torch.tensor([len("".join(tokens[: i + 1]).encode()) for i in range(len(tokens))])


def test_spans_are_the_shortest_texts_that_both_tokenize():
    student = ("un", "believ", "able", " tra", "ü", "me")
    teacher = ("unbeliev", "able", " ", "traü", "m", "e")
    of_student, of_teacher = align_spans(ends(*student), ends(*teacher))
    assert of_student.tolist() == [0, 0, 1, 2, 2, 3]
    assert of_teacher.tolist() == [0, 1, 2, 2, 3, 3]
    assert span_starts(of_student).tolist() == [0, 2, 3, 5]
    assert span_starts(of_teacher).tolist() == [0, 1, 2, 4]
    for span in range(4):
        texts = [
            "".join(t for t, s in zip(tokens, spans.tolist(), strict=True) if s == span)
            for tokens, spans in ((student, of_student), (teacher, of_teacher))
        ]
        assert texts[0] == texts[1]


def test_another_text_is_refused_and_none_is_fine():
    with pytest.raises(ValueError, match="not the same text"):
        align_spans(ends("ab"), ends("abc"))
    nothing = torch.zeros(0, dtype=torch.int64)
    spans = align_spans(nothing, nothing)
    assert span_kl(torch.zeros(0), torch.zeros(0), *spans).shape == (0,)


def test_span_kl_equals_the_kl_of_two_outcomes():
    student, teacher = -torch.rand(5) - 0.1, -torch.rand(4, dtype=torch.float32) - 0.1
    spans = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])
    expected = []
    for span in range(3):
        q, p = (
            math.exp(math.fsum(x for x, s in zip(log, at, strict=True) if s == span))
            for log, at in (
                (student.tolist(), spans[0].tolist()), (teacher.tolist(), spans[1].tolist())
            )
        )  # fmt: skip
        expected.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    values, _ = ours(lambda s, t: span_kl(s, t, *spans), student, teacher)
    assert_close(values, torch.tensor(expected, dtype=torch.float64))
    leaf = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: span_kl(s, teacher.double(), *spans), (leaf,))


def test_with_equal_tokenizers_a_span_is_a_token_and_below_forward_kl():
    student, teacher = randn(30, 8, scale=2), randn(30, 8, seed=1, scale=2)
    text = torch.arange(30)[:, None] % 8
    log_q, log_p = (z.log_softmax(-1).gather(-1, text).squeeze(-1) for z in (student, teacher))
    spans = align_spans(torch.arange(1, 31), torch.arange(1, 31))
    values = span_kl(log_q, log_p, *spans)
    assert (values <= forward_kl(student, teacher) + 1e-6).all()
    assert values.min() > -1e-6
    assert span_kl(log_p, log_p, *spans).abs().max() < 1e-6


@pytest.mark.parametrize("log_q", [0.0, -1e-9, -50.0, -1e4, -math.inf])
@pytest.mark.parametrize("log_p", [0.0, -1e-9, -50.0, -1e4, -math.inf])
def test_certain_and_impossible_spans_stay_finite(log_q, log_p):
    spans = torch.zeros(1, dtype=torch.int64)
    values, gradient = ours(
        lambda s, t: span_kl(s, t, spans, spans), torch.tensor([log_q]), torch.tensor([log_p])
    )
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert values.min() > -1e-6
