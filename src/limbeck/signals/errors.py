"""How far decoded targets are from the distribution they stand for, and their gradient from its.

    p (P, V) the teacher's, s (P, V) the student's probabilities, float64, at one temperature
    w (P, V) weights that a loss takes for p

The dense gradient towards the student's logits is s - p; that of an estimate, s * sum(w) - w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.types import SparseTargets


class Gradients:
    """Errors of estimated gradients s * sum(w) - w against the dense s - p, in float64."""

    def __init__(self, p: Tensor, s: Tensor) -> None:
        self.p, self.s = p, s  # (P, V)
        self.pp, self.sp, self.ss = (p * p).sum(-1), (s * p).sum(-1), (s * s).sum(-1)
        self.dense = float((self.ss - 2 * self.sp + self.pp).mean())  # squared length

    def share(self, w: Tensor) -> float:
        """Weights of every id (P, V) -> length of the error as a share of the gradient's."""
        error = self.s * (w.sum(-1, keepdim=True) - 1) - (w - self.p)
        return math.sqrt(float(error.square().sum(-1).mean()) / self.dense)

    def products(self, row: int, ids: Tensor, w: Tensor) -> Tensor:
        """Errors of D draws for one position, each with each: (D, K), (D, K) -> (D, D).

        Multiplied out, so that only the ids that were drawn are ever laid side by side.
        """
        several, column = ids.unique(return_inverse=True)
        compact = torch.zeros(len(ids), len(several), dtype=w.dtype).scatter_add_(1, column, w)
        off = w.sum(-1) - 1  # (D,)
        ws = compact @ self.s[row, several] - self.sp[row]
        wp = compact @ self.p[row, several]
        cross = off.outer(ws) + wp
        return compact @ compact.T + off.outer(off) * self.ss[row] - cross - cross.T + self.pp[row]


def bias_of(targets: Sequence[SparseTargets], gradients: Gradients) -> tuple[float, float, float]:
    """Rms error of a draw, bias (both as shares of the dense gradient), and the bias' score.

    With e the error of a draw, the mean of e . e' over pairs of different draws has the squared
    bias as its expectation, and without bias the variance 2 tr(Cov(e)^2) / (D (D - 1)), where the
    trace is the mean of (e . e')^2. Both are summed over positions: all coordinates at once.
    """
    ids = torch.stack([t.ids for t in targets], 1)  # (P, D, K)
    weights = torch.stack([t.probs for t in targets], 1).double()
    num_pairs = len(targets) * (len(targets) - 1)
    squared_error = squared_bias = variance = 0.0
    for row in range(len(ids)):
        products = gradients.products(row, ids[row], weights[row])
        squared_error += float(products.diagonal().mean())
        products.fill_diagonal_(0)
        squared_bias += float(products.sum()) / num_pairs
        variance += 2 * float(products.square().sum()) / num_pairs**2
    scale = len(ids) * gradients.dense
    rms, bias = math.sqrt(squared_error / scale), math.sqrt(max(squared_bias, 0) / scale)
    return rms, bias, squared_bias / math.sqrt(variance)


def topk_weights(targets: SparseTargets, p: Tensor, s: Tensor) -> dict[str, Tensor]:
    """What three losses take as the target: (P, V) each."""
    kept = torch.zeros_like(p).scatter_(1, targets.ids, targets.probs.double())
    outside = s.scatter(1, targets.ids, 0)
    outside *= (targets.tail.double() / outside.sum(-1)).unsqueeze(-1)
    return {
        "tail dropped": kept,
        "renormalised": kept / kept.sum(-1, keepdim=True),
        "tail as a class": kept + outside,
    }


def distances(p: Tensor, decoded: Tensor) -> dict[str, float]:
    """Means over positions of total variation and KL(teacher || decoded)."""
    kl = torch.where(p > 0, p * (p / decoded.clamp_min(1e-300)).log(), 0).sum(-1)
    variation = (p - decoded).abs().sum(-1) / 2
    return {"total_variation": float(variation.mean()), "kl": float(kl.mean())}
