"""AdamW that costs what the active sizes are large, not what the shared weights are.

Only regions and rows that have a gradient are worked on. What no active size reads keeps its value
and its moments; so do the rows of a vocabulary that the step's examples do not use ("lazy").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.family import Family, Place, Region, Size

_BETAS = (0.9, 0.98)
_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Piece:
    """The gradient of a region of one shared tensor, or of some rows of it."""

    name: str
    region: Region
    values: Tensor
    rows: Tensor | None = None  # (N,) ascending, each once; then `values` is (N, D)


def gather(
    family: Family, found: Sequence[tuple[Size, Sequence[Tensor | None]]]
) -> list[Piece]:
    """Sums of the sizes' gradients, in their order. `found` has a gradient for each parameter."""
    by_tensor: dict[str, list[tuple[Place, Tensor]]] = {}
    for size, gradients in found:
        for (name, _), gradient in zip(size.model.named_parameters(), gradients, strict=True):
            if gradient is not None:
                place = size.places[name]
                by_tensor.setdefault(place.shared, []).append((place, gradient))
    return [_piece(name, family.weights[name], parts) for name, parts in by_tensor.items()]


def _piece(name: str, weight: Tensor, parts: Sequence[tuple[Place, Tensor]]) -> Piece:
    if all(gradient.is_sparse for _, gradient in parts):
        return _rows(name, parts)
    if len(parts) == 1 and parts[0][0].is_view:
        place, gradient = parts[0]
        return Piece(name, place.regions[0][0], gradient)
    ends = [max(big[d].stop for place, _ in parts for big, _ in place.regions)
            for d in range(weight.dim())]  # fmt: skip
    total = weight.new_zeros(ends)
    for place, gradient in parts:
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        for big, own in place.regions:
            total[big] += dense[own]
    return Piece(name, tuple(slice(0, end) for end in ends), total)


def _rows(name: str, parts: Sequence[tuple[Place, Tensor]]) -> Piece:
    ids = [gradient._indices()[0] for _, gradient in parts]
    rows, at = torch.unique(torch.cat(ids), return_inverse=True)
    width = max(gradient.shape[1] for _, gradient in parts)
    values = parts[0][1]._values().new_zeros(len(rows), width)
    for (_, gradient), where in zip(parts, at.split([len(i) for i in ids]), strict=True):
        values[:, : gradient.shape[1]].index_add_(0, where, gradient._values())
    return Piece(name, (slice(None), slice(0, width)), values, rows)


def norm(pieces: Sequence[Piece]) -> Tensor:
    """Of the whole gradient. ()"""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.values for p in pieces])))


class SharedAdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) on regions and rows of shared weights."""

    def __init__(
        self, weights: Mapping[str, Tensor], peak: Callable[[str], float], weight_decay: float
    ) -> None:
        self.weights, self.peak, self.weight_decay = weights, peak, weight_decay
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece], *, number: int, factor: float, scale: Tensor) -> None:
        """`number` counts from 1; the rate is `factor` times the peak; gradients times `scale`."""
        if not pieces:
            return
        torch._foreach_mul_([piece.values for piece in pieces], scale)
        (b1, b2), correction = _BETAS, 1 - _BETAS[0] ** number
        root = math.sqrt(1 - b2**number)
        for piece in pieces:
            w, m, v = (
                kind[piece.name][piece.region] for kind in (self.weights, self.first, self.second)
            )
            places = (w, m, v)
            if piece.rows is not None:
                w, m, v = (kind[piece.rows] for kind in places)
            g, rate = piece.values, factor * self.peak(piece.name)
            if w.dim() > 1:
                w.mul_(1 - rate * self.weight_decay)
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            w.addcdiv_(m, v.sqrt().div_(root).add_(_EPS), value=-rate / correction)
            if piece.rows is not None:
                for kind, new in zip(places, (w, m, v), strict=True):
                    kind.index_copy_(0, piece.rows, new)
