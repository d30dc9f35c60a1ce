"""Relations between the positions of a sequence: what attends to what, and with which values.

For hidden states position by position see `embedding.mse` and `embedding.cosine`; for relations
between examples, `relational`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.numerics import NEVER, at_least_fp32, finite_log_softmax, without_autocast


def relation_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    mask: Tensor,
    relation_heads: int,
    causal: bool = False,
) -> Tensor:
    """KL(teacher || student) of softmax(a b^T / sqrt(d)) per position, mean over relation heads.

    `(a, b)` are (queries, keys) for MiniLM's attention transfer, (values, values) for its value
    relation (Wang et al. 2020, 2002.10957), and (q, q), (k, k), (v, v) for MiniLMv2 (2012.15828),
    which splits teacher and student anew into the same number of relation heads, so widths and
    numbers of attention heads are free. Student (B, T, D_student), teacher (B, T, D_teacher), mask
    (B, T) bool -> (B, T) in nats, 0 and with exactly zero gradient at padding. `causal` for
    decoders. Raises ValueError where a width is no multiple of `relation_heads`.
    """
    length = mask.shape[-1]
    # a padded position is never a key; its own row is cleared at the end
    allowed = mask[:, None, None, :].expand(-1, 1, length, -1)  # (B, 1, T, T)
    if causal:
        allowed = allowed & allowed.new_ones(length, length).tril()
    with without_autocast(mask):
        log_q = _log_relation(*student, mask, allowed, relation_heads)  # (B, R, T, T)
        a, b = teacher
        log_p = _log_relation(a.detach(), b.detach(), mask, allowed, relation_heads)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)  # (B, T)
    return kl.masked_fill(~mask, 0)


def _log_relation(a: Tensor, b: Tensor, mask: Tensor, allowed: Tensor, heads: int) -> Tensor:
    width = a.shape[-1]
    if width % heads:
        raise ValueError(f"width {width} must be a multiple of relation_heads, which is {heads}")
    a, b = _split(a, mask, heads), _split(b, mask, heads)
    scores = a @ b.transpose(-1, -2) / (width // heads) ** 0.5
    return finite_log_softmax(scores.masked_fill(~allowed, NEVER))


def _split(x: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, R, T, D / R), padding set to 0: it may hold NaN, and 0 * NaN is NaN."""
    x = at_least_fp32(x).masked_fill(~mask.unsqueeze(-1), 0)
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)
