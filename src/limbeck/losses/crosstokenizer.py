"""Losses between models whose tokenizers differ.

Token ids and numbers of tokens mean nothing to each other here; bytes of the same text do. A span
is the text between two byte offsets at which both tokenizers end a token. Count offsets in bytes:
a tokenizer may cut inside a character. Leave out special tokens, which have no text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from limbeck.losses.numerics import NEVER, at_least_fp32, finite_log_softmax


def uld(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """Sum of |p - q| over sorted probabilities: how peaked, whatever the classes are called.

    Universal Logit Distillation (Boizard et al. 2024, 2402.12030): a Wasserstein distance with
    equal costs. (..., V_student), (..., V_teacher) -> (...), at most 2, not in nats. The smaller
    vocabulary gets further classes of *probability* 0, never of logit 0. Both positions must
    predict after the same text: take them with `span_starts`.
    """
    q = finite_log_softmax(student_logits, temperature).exp().sort(-1, descending=True).values
    p = finite_log_softmax(teacher_logits.detach(), temperature).exp()
    p = p.sort(-1, descending=True).values
    size = max(q.shape[-1], p.shape[-1])
    return (pad(p, (0, size - p.shape[-1])) - pad(q, (0, size - q.shape[-1]))).abs().sum(-1)


def align_spans(student_ends: Tensor, teacher_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Which span each token belongs to. Byte offsets of token ends (T,), (T',) -> (T,), (T',).

    All int64, ends ascending, both over the same bytes; spans count from 0 and are the shortest
    possible. Raises ValueError where the texts end at different bytes.
    """
    last = [int(ends[-1]) if len(ends) else 0 for ends in (student_ends, teacher_ends)]
    if last[0] != last[1]:
        raise ValueError(
            f"the student's tokens end at byte {last[0]}, the teacher's at {last[1]}: "
            "not the same text"
        )
    common = student_ends[torch.isin(student_ends, teacher_ends)].unique()
    return torch.searchsorted(common, student_ends), torch.searchsorted(common, teacher_ends)


def span_starts(spans: Tensor) -> Tensor:
    """The first token of each span, where both models predict after the same text. (T,) -> (S,)."""
    return (spans.diff(prepend=spans.new_full((1,), -1)) > 0).nonzero().squeeze(-1)


def span_kl(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
) -> Tensor:
    """KL of "the text goes on with this span, or otherwise", teacher || student, in nats.

    Log-probabilities of the tokens that the text has, (T,) and (T',), with their spans of
    `align_spans` -> (S,). A span's log-probability is the sum over its tokens (chain rule), as
    GOLD (Patiño et al. 2025, Hugging Face) merges them; but GOLD multiplies a whole distribution by
    the later tokens' probabilities, whose sum is no longer 1, and here two outcomes stay two. With
    equal tokenizers it is forward KL over "this token or another", so at most `forward_kl`.
    Otherwise a span counts in the one tokenization that the text has: a lower bound of the
    probability of its bytes.
    """
    count = int(teacher_spans[-1]) + 1 if len(teacher_spans) else 0
    log_q = _per_span(student_log_probs, student_spans, count)
    log_p = _per_span(teacher_log_probs.detach(), teacher_spans, count)
    log_not_q, log_not_p = _log_complement(log_q), _log_complement(log_p)
    return log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)


def _per_span(log_probs: Tensor, spans: Tensor, count: int) -> Tensor:
    log_probs = at_least_fp32(log_probs).clamp_min(NEVER)
    total = log_probs.new_zeros(count).index_add(0, spans, log_probs)
    # what fp32 cannot tell from certain has no logarithm of the rest
    return total.clamp(NEVER, -1e-7)


def _log_complement(log_prob: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the form that does not cancel (Maechler 2012, log1mexp)."""
    near_one = log_prob > -math.log(2)
    near = log_prob.masked_fill(~near_one, -math.log(2))
    far = log_prob.masked_fill(near_one, -math.log(2))
    return torch.where(near_one, (-near.expm1()).log(), (-far.exp()).log1p())
