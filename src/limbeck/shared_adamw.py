"""AdamW that costs what the active sizes are large, not what the shared weights are.

Only regions and rows that have a gradient are worked on. What no active size reads keeps its value
and its moments; so do the rows of a vocabulary that the step's examples do not use ("lazy").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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


def gather(family: Family, found: Sequence[tuple[Size, Sequence[Tensor | None]]]) -> list[Piece]:
    """Sums of the sizes' gradients, in their order.

    `found` has a gradient for each of a size's trainable parameters; what follows is not read.
    """
    by_tensor: dict[str, list[tuple[Place, Tensor]]] = {}
    for size, gradients in found:
        for (name, _), gradient in zip(size.trainable(), gradients, strict=False):
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


class SharedAdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) on regions and rows of shared weights."""

    def __init__(
        self, weights: Mapping[str, Tensor], peaks: Mapping[str, float], weight_decay: float
    ) -> None:
        """`peaks` are the highest learning rates; what has one dimension does not decay."""
        self.weights, self.peaks, self.weight_decay = weights, peaks, weight_decay
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece], *, number: int, factor: float) -> None:
        """`number` counts from 1; the learning rate is `factor` times its peak."""
        for piece in pieces:
            state = [kind[piece.name] for kind in (self.weights, self.first, self.second)]
            rate = factor * self.peaks[piece.name]
            decay = self.weight_decay if state[0].dim() > 1 else 0.0
            views = [kind[piece.region] for kind in state]
            if piece.rows is not None:
                rows = [kind[piece.rows] for kind in views]
                _update(rows, piece.values, number, rate, decay)
                for kind, new in zip(views, rows, strict=True):
                    kind.index_copy_(0, piece.rows, new)
            elif views[0].shape == state[0].shape and state[0].is_contiguous():
                _update_whole(state, piece.values, number, rate, decay)
            else:
                _update(views, piece.values, number, rate, decay)


def clip(pieces: Sequence[Piece], max_norm: float) -> Tensor:
    """Scales the whole gradient to at most this norm, in place; its norm before. ()"""
    values = [piece.values for piece in pieces]
    found = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
    torch._foreach_mul_(values, torch.clamp(max_norm / (found + 1e-6), max=1.0))
    return found


def _update(state: list[Tensor], g: Tensor, number: int, rate: float, decay: float) -> None:
    """`state`: the weights and their two moments. In place."""
    w, first, second = state
    (b1, b2), root = _BETAS, math.sqrt(1 - _BETAS[1] ** number)
    if decay:
        w.mul_(1 - rate * decay)
    first.lerp_(g, 1 - b1)
    second.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.addcdiv_(first, second.sqrt().div_(root).add_(_EPS), value=-rate / (1 - b1**number))


def _update_whole(state: list[Tensor], g: Tensor, number: int, rate: float, decay: float) -> None:
    """The same in one pass over memory, where the tensors are contiguous."""
    w, first, second = state
    adamw(
        [w], [g.contiguous()], [first], [second], [], [torch.tensor(float(number - 1))],
        fused=True, amsgrad=False, beta1=_BETAS[0], beta2=_BETAS[1], lr=rate, weight_decay=decay,
        eps=_EPS, maximize=False,
    )  # fmt: skip
