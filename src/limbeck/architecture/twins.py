"""Which dimensions belong together: make two units twins, break one dimension, see who notices.

Swapping two identical units changes nothing, so if the units are interchangeable the gradients of
the twins are equal too, and a dimension whose gradients differ is not free in this layout. Then
break the twins in one dimension only: exactly the dimensions of its group see their gradients
part. About one backward per group; exact up to rounding, hence float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from limbeck.architecture.axes import Member

Dim = tuple[str, int]  # (parameter or buffer, dimension)
Layout = Mapping[Dim, Member]  # how the units lie along each dimension

_DIFFERENT = 1e-7  # relative; rounding of a float64 backward is near 1e-14
_SILENT = 1e-9  # of the model's typical gradient: a key bias under softmax has only rounding
_ATTEMPTS = 3  # other twins, where a unit was dead (ReLU)


def logits_of(output: object) -> Tensor:
    """The logits of a transformers output, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None:
        found = output[0]  # type: ignore[index]  # ModelOutput and tuples alike
    if not isinstance(found, Tensor):
        raise TypeError(f"no logits in {type(output).__name__}")
    return found


class Doubles(TorchFunctionMode):
    """Keeps in float64 what a model casts to float32 (an RMS norm): its rounding would show."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **named)


def doubled(model: nn.Module) -> nn.Module:
    """In double precision, which the fused kernels of experts do not take."""
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model.double()


class Bench:
    """A small model in float64 with random weights, norms and biases, and one fixed loss."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.model = doubled(model).eval()
        self.inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        self.parameters = dict(model.named_parameters())  # tied ones once
        buffers = {k: v for k, v in model.named_buffers() if v.is_floating_point()}
        self.tensors: dict[str, Tensor] = {**self.parameters, **buffers}
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.requires_grad:  # a frozen table is computed, not free
                    self._randomise(parameter)
            self.reference = self.logits()
        self.direction = self.noise(self.reference.shape)
        self.known: dict[tuple[object, ...], Found] = {}  # hypotheses ask for the same layouts

    def noise(self, shape: Iterable[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.random, dtype=torch.float64)

    def _randomise(self, parameter: Tensor) -> None:
        if parameter.dim() < 2:  # norms stay near what they were, biases leave zero
            parameter += 0.3 * self.noise(parameter.shape)
        else:
            fan_in = max(1, parameter.numel() // parameter.shape[0])
            parameter.copy_(self.noise(parameter.shape) / fan_in**0.5)

    def logits(self) -> Tensor:
        with Doubles():
            return logits_of(self.model(**self.inputs))

    def gradients(self) -> dict[str, Tensor]:
        loss = (self.logits() * self.direction).sum()
        wanted = {k: p for k, p in self.parameters.items() if p.requires_grad}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {k: g for k, g in zip(wanted, found, strict=True) if g is not None}

    def survives(self, layout: Layout, units: int) -> bool:
        """Whether the logits stay when these dimensions' units are permuted at random."""
        order = torch.randperm(units, generator=self.random)
        saved = {name: self.tensors[name].detach().clone() for name, _ in layout}
        with torch.no_grad():
            try:
                for (name, dim), member in layout.items():
                    channels = member.channels(order)
                    self.tensors[name].copy_(self.tensors[name].index_select(dim, channels))
                after = self.logits()
            finally:
                for name, value in saved.items():
                    self.tensors[name].copy_(value)
        error, scale = (after - self.reference).abs().max(), self.reference.abs().max()
        return error.item() < _DIFFERENT * scale.item()


@dataclass
class Found:
    groups: list[frozenset[Dim]]  # free in this layout, and who moves with whom
    bound: set[Dim]  # their units are not interchangeable in this layout
    silent: set[Dim]  # no gradient, and breaking them disturbs nothing


def find_groups(bench: Bench, layout: Layout, units: int) -> Found:
    """Groups among the dimensions of `layout`, each read as its member says; needs two units.

    The model's weights are as before on return.
    """
    key = (units, frozenset(layout.items()))
    if key not in bench.known:
        bench.known[key] = _groups(bench, layout, units)
    return bench.known[key]


def _groups(bench: Bench, layout: Layout, units: int) -> Found:
    best: Found | None = None
    for first in range(min(_ATTEMPTS, units // 2)):
        found = _restored(bench, layout, units, first)
        if best is None or len(found.silent) < len(best.silent):
            best = found
        if not any(bench.tensors[name].dim() > 1 for name, _ in best.silent):
            break
    assert best is not None, "a group needs two units"
    # Equal gradients can also be borrowed: a value's bias reads its twin from the next weight's
    # columns. Only a permutation of all units tells.
    kept, failed = _surviving(bench, best.groups, layout, units)
    if len(failed) > 1:  # parts of one group: who notices whom is not mutual, so ask all of them
        dims = [dim for dim in layout if any(dim in group for group in failed)]
        joined = _restored(bench, {d: layout[d] for d in dims}, units, 0, every=True).groups
        whole, failed = _surviving(bench, joined, layout, units)
        kept += whole
    return Found(kept, best.bound.union(*failed), best.silent)


def _surviving(
    bench: Bench, groups: Iterable[frozenset[Dim]], layout: Layout, units: int
) -> tuple[list[frozenset[Dim]], list[frozenset[Dim]]]:
    """Those that survive a permutation, and the others."""
    kept: list[frozenset[Dim]] = []
    failed: list[frozenset[Dim]] = []
    for group in groups:
        survives = bench.survives({d: layout[d] for d in group}, units)
        (kept if survives else failed).append(group)
    return kept, failed


def _restored(
    bench: Bench, layout: Layout, units: int, first: int, *, every: bool = False
) -> Found:
    """`_with_twins`, and the weights as they were."""
    saved = {name: bench.tensors[name].detach().clone() for name, _ in layout}
    try:
        return _with_twins(bench, layout, units, first, every)
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                bench.tensors[name].copy_(value)


def _with_twins(bench: Bench, layout: Layout, units: int, first: int, every: bool) -> Found:
    """`every`: break every dimension, not one for each group."""
    # Twins far apart: neighbours may sit in one head, whose channels are interchangeable.
    pair = (first, units - 1 - first)
    twins, dims = _Twins(bench, layout, units, pair), list(layout)
    with torch.no_grad():
        for dim in dims:
            twins.equalise(bench.tensors[dim[0]], dim)
    before = bench.gradients()
    sizes = {dim: twins.size(before, dim) for dim in dims}
    typical = sorted(gradient.abs().max().item() for gradient in before.values())
    floor = _SILENT * typical[len(typical) // 2]
    loud = [dim for dim in dims if sizes[dim] > floor]
    bound = {dim for dim in loud if twins.differ(before, dim)}
    free = [dim for dim in loud if dim not in bound]

    groups: list[set[Dim]] = []
    for dim in free:
        if every or not any(dim in group for group in groups):
            _join(groups, {dim, *twins.disturbed_by(dim, free)})
    silent = set()
    for dim in dims:
        if sizes[dim] <= floor:
            # A statistic of a batch norm goes with its weight: no backward for each of them.
            weight = (dim[0].rpartition(".")[0] + ".weight", dim[1])
            with_weight = weight in free and dim[0] not in bench.parameters
            disturbed = [weight] if with_weight else twins.disturbed_by(dim, free)
            if disturbed:
                _join(groups, {dim, *disturbed})
            else:
                silent.add(dim)
    return Found([frozenset(group) for group in groups], bound, silent)


def _join(groups: list[set[Dim]], new: set[Dim]) -> None:
    for group in [g for g in groups if g & new]:
        groups.remove(group)
        new |= group
    groups.append(new)


class _Twins:
    """Two units, wherever they lie along each dimension of a layout."""

    def __init__(self, bench: Bench, layout: Layout, units: int, pair: tuple[int, int]) -> None:
        self.bench = bench
        self.own: dict[Dim, tuple[Tensor, Tensor]] = {}  # each twin's channels, in one order
        for dim, member in layout.items():
            first, second = (torch.tensor(_channels(member, units, unit)) for unit in pair)
            self.own[dim] = first, second
        self.siblings: dict[Dim, list[Dim]] = {
            d: [e for e in layout if e[0] == d[0] and e != d] for d in layout
        }

    def equalise(self, tensor: Tensor, dim: Dim) -> None:
        first, second = self.own[dim]
        tensor.index_copy_(dim[1], second, tensor.index_select(dim[1], first))

    def _apart(self, gradient: Tensor, dim: Dim) -> tuple[Tensor, Tensor]:
        """The twins' gradients, without the entries that are twins along another dimension too:
        a symmetry that moves both dimensions says nothing about those entries one by one."""
        for other in self.siblings[dim]:
            keep = torch.ones(gradient.shape[other[1]], dtype=torch.bool)
            for channels in self.own[other]:
                keep[channels] = False
            if keep.any():
                gradient = gradient.index_select(other[1], keep.nonzero().flatten())
        first, second = self.own[dim]
        return gradient.index_select(dim[1], first), gradient.index_select(dim[1], second)

    def size(self, gradients: Mapping[str, Tensor], dim: Dim) -> float:
        if dim[0] not in gradients:
            return 0.0
        left, right = self._apart(gradients[dim[0]], dim)
        return max(left.abs().max().item(), right.abs().max().item())

    def differ(self, gradients: Mapping[str, Tensor], dim: Dim) -> bool:
        left, right = self._apart(gradients[dim[0]], dim)
        return (left - right).abs().max().item() > _DIFFERENT * self.size(gradients, dim)

    def disturbed_by(self, dim: Dim, watched: Iterable[Dim]) -> list[Dim]:
        """Those of `watched` whose twins part when the twin along `dim` alone is broken."""
        tensor = self.bench.tensors[dim[0]]
        _, second = self.own[dim]
        with torch.no_grad():
            saved = tensor.index_select(dim[1], second)
            # By a factor and a summand: zeros must move, and a variance must stay positive.
            scale = 1 + 0.5 * torch.tanh(self.bench.noise(saved.shape))
            step = 0.1 * tensor.square().mean().sqrt().clamp_min(1e-3)
            twin = saved * scale + step * self.bench.noise(saved.shape).abs()
            for other in self.siblings[dim]:
                self.equalise(twin, other)
            tensor.index_copy_(dim[1], second, twin)
        try:
            after = self.bench.gradients()
        finally:
            with torch.no_grad():
                tensor.index_copy_(dim[1], second, saved)
        return [other for other in watched if self.differ(after, other)]


def _channels(member: Member, units: int, unit: int) -> list[int]:
    """The channels of one unit."""
    found: list[int] = []
    start = 0
    for times in member.segments:
        width = member.block * times
        found += range(start + unit * width, start + (unit + 1) * width)
        start += units * width
    return found
