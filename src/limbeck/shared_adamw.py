"""AdamW that costs what the active sizes are large, not what the shared weights are.

Only regions that have a gradient are worked on: what no active size reads keeps its value and its
moments. Of a vocabulary's table only the rows that the step's examples use are; the others go on
with their momentum as in dense AdamW, but some steps at a time. (That they would rest instead cost
students 6 to 10 points: docs/log.md.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from limbeck.cores import evenly, on_each
from limbeck.family import Family, Place, Region, Size

_BETAS = (0.9, 0.98)
_EPS = 1e-8
_SMALL = 1 << 20  # weights, of which a core is sooner done than another has heard of it
_PERIOD = 16  # steps after which idle rows are brought up to date


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
        for (name, _), gradient in zip(size.trainable, gradients, strict=False):
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
        self, weights: Mapping[str, Tensor], peaks: Mapping[str, float], weight_decay: float,
        tables: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """`peaks` are the highest learning rates; what has one dimension does not decay.

        `tables` are weights whose gradient comes by rows.
        """
        self.weights, self.peaks, self.weight_decay = weights, peaks, weight_decay
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.tables = {name: Table(len(weights[name]), weights[name].device) for name in tables}

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece], *, number: int, factor: float) -> None:
        """`number` counts from 1; the learning rate is `factor` times its peak."""
        tick = (number - 1) % _PERIOD
        for name, table in self.tables.items():
            table.note(tick, number, factor * self.peaks[name], self.weight_decay)
        whole: dict[tuple[float, float, torch.device], list[tuple[list[Tensor], Tensor]]] = {}
        for piece in pieces:
            state = self._state(piece.name)
            rate = factor * self.peaks[piece.name]
            decay = self.weight_decay if state[0].dim() > 1 else 0.0
            views = [kind[piece.region] for kind in state]
            if piece.rows is not None:
                table = self.tables[piece.name]
                rows = table.current(state, piece.rows, tick)
                values = piece.values.new_zeros(rows[0].shape)
                values[:, : piece.values.shape[1]] = piece.values
                _update(rows, values, number, rate, decay)
                table.put(state, piece.rows, rows, tick + 1)
                continue
            if piece.name in self.tables:  # a dense gradient after all
                self.tables[piece.name].touch_all(state, tick)
            if views[0].shape == state[0].shape and state[0].is_contiguous():
                alike = whole.setdefault((rate, decay, state[0].device), [])
                alike.append((state, piece.values))
            else:
                _update(views, piece.values, number, rate, decay)
        for (rate, decay, _), alike in whole.items():
            _update_whole(alike, number, rate, decay)
        if tick == _PERIOD - 1:
            self.settle(number)

    @torch.no_grad()
    def settle(self, number: int) -> None:
        """Brings idle rows up to date, behind that step."""
        done = (number - 1) % _PERIOD + 1
        for name, table in self.tables.items():
            rows = table.live.nonzero()[:, 0]
            state = self._state(name)
            table.put(state, rows, table.current(state, rows, done), done % _PERIOD)
            table.since.fill_(done % _PERIOD)

    def _state(self, name: str) -> list[Tensor]:
        return [kind[name] for kind in (self.weights, self.first, self.second)]


class Table:
    """Which rows of a table were used, and what the idle ones missed in this period."""

    def __init__(self, num_rows: int, device: torch.device | None = None) -> None:
        self.live = torch.zeros(num_rows, dtype=torch.bool, device=device)  # used at least once
        self.since = torch.zeros(num_rows, dtype=torch.int64, device=device)  # first tick missed
        self.missed = torch.zeros(2, _PERIOD, dtype=torch.float64)  # step size and decay by tick

    def note(self, tick: int, number: int, rate: float, decay: float) -> None:
        root = math.sqrt(1 - _BETAS[1] ** number)
        self.missed[0, tick] = rate * root / (1 - _BETAS[0] ** number)
        self.missed[1, tick] = rate * decay

    def current(self, state: Sequence[Tensor], rows: Tensor, tick: int) -> list[Tensor]:
        """Copies of these rows of weights and moments, as dense AdamW would have them by now.

        Without a gradient the moments shrink by their betas, so that the steps of a row are a
        geometric series times its first; eps is left out of account there.
        """
        b1, b2 = _BETAS
        sums, kept = [0.0], [1.0]  # by the first tick missed, from the last to the first
        for size, decay in self.missed[:, :tick].T.flip(0).tolist():
            sums.append(b1 / math.sqrt(b2) * (size + sums[-1]))
            kept.append(kept[-1] * (1 - decay))
        idle = tick - self.since[rows]
        w, first, second = (kind[rows] for kind in state)
        w *= w.new_tensor(kept)[idle, None]
        w -= w.new_tensor(sums)[idle, None] * first / second.sqrt().add_(_EPS)
        first *= w.new_tensor([b1**k for k in range(tick + 1)])[idle, None]
        second *= w.new_tensor([b2**k for k in range(tick + 1)])[idle, None]
        return [w, first, second]

    def put(self, state: Sequence[Tensor], rows: Tensor, new: Sequence[Tensor], since: int) -> None:
        for kind, values in zip(state, new, strict=True):
            kind.index_copy_(0, rows, values)
        self.live[rows] = True
        self.since[rows] = since

    def touch_all(self, state: Sequence[Tensor], tick: int) -> None:
        rows = torch.arange(len(self.live), device=self.live.device)
        self.since[~self.live] = tick
        self.put(state, rows, self.current(state, rows, tick), tick + 1)


def clip(pieces: Sequence[Piece], max_norm: float) -> Tensor:
    """Scales the whole gradient to at most this norm, in place; its norm before. ()"""
    values = [piece.values for piece in pieces]
    norms: dict[int, Tensor] = {}

    def measure(part: Sequence[int]) -> None:
        norms.update(zip(part, torch._foreach_norm([values[at] for at in part]), strict=True))

    _on_cores(measure, values)
    found = torch.linalg.vector_norm(torch.stack([norms[at] for at in range(len(values))]))
    scale = torch.clamp(max_norm / (found + 1e-6), max=1.0)
    if scale.device.type != "cpu" or scale < 1:  # to ask a GPU is to wait for it
        _on_cores(lambda part: torch._foreach_mul_([values[at] for at in part], scale), values)
    return found


def _on_cores(function: Callable[[Sequence[int]], None], values: Sequence[Tensor]) -> None:
    """`function` of the positions of some of the values, on each core; on a GPU of all at once."""
    sizes = [value.numel() for value in values]
    if sum(sizes) < _SMALL or values[0].device.type != "cpu":
        function(range(len(values)))
        return
    for _ in on_each(function, [part for part in evenly(sizes) if part]):
        pass


def _update(state: list[Tensor], g: Tensor, number: int, rate: float, decay: float) -> None:
    """`state`: the weights and their two moments. In place."""
    w, first, second = state
    (b1, b2), root = _BETAS, math.sqrt(1 - _BETAS[1] ** number)
    if decay:
        w.mul_(1 - rate * decay)
    first.lerp_(g, 1 - b1)
    second.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.addcdiv_(first, second.sqrt().div_(root).add_(_EPS), value=-rate / (1 - b1**number))


def _update_whole(
    alike: Sequence[tuple[list[Tensor], Tensor]], number: int, rate: float, decay: float
) -> None:
    """The same in one pass over memory, of tensors that are contiguous: some on each core; many at
    a time, as a GPU is quicker with a tensor than Python with a call."""

    @torch.no_grad()
    def update(part: Sequence[int]) -> None:
        states, gradients = zip(*(alike[at] for at in part), strict=True)
        w, first, second = (list(kind) for kind in zip(*states, strict=True))
        numbers = torch.full((len(w),), float(number - 1), device=w[0].device)
        adamw(
            w, [g.contiguous() for g in gradients], first, second, [], [*numbers.unbind()],
            fused=True, amsgrad=False, beta1=_BETAS[0], beta2=_BETAS[1], lr=rate,
            weight_decay=decay, eps=_EPS, maximize=False,
        )  # fmt: skip

    _on_cores(update, [gradient for _, gradient in alike])
