"""How much each unit and layer matters to the task, on examples of what must be kept.

Units: first-order Taylor, (sum of weight x gradient over the unit's weights)^2, averaged over
batches (Molchanov et al. 2019, arXiv:1906.10771, eq. 8); activation, see `activity`; or magnitude,
the sum of squares of the unit's weights (Han et al. 2015, arXiv:1506.02626). Layers: how much the
loss rises when the layer is skipped; or block influence, see `activity`. Only training rows are
ever used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.architecture.activity import influence, mean_inputs, readers_of
from limbeck.architecture.axes import Axis, Group, Member, find_axis
from limbeck.architecture.resuming import Layers
from limbeck.device import compute_device, on_device
from limbeck.errors import RecipeError
from limbeck.losses.divergence import cross_entropy
from limbeck.progress import Bar, Progress
from limbeck.recipe import ImportanceSpec
from limbeck.run import replaced
from limbeck.types import Batch

_DEFAULT = ImportanceSpec()
_LAYER = "layers"
_STEPS = 20  # of the curves in the report
_FEW = 64  # units that are shown one by one


@dataclass(frozen=True, slots=True)
class Importance:
    units: Mapping[str, Tensor]  # group name -> (units,), more is more important
    layers: Tensor  # (L,) rise of the loss in nats when the layer is skipped, or its influence;
    # empty without layers

    def save(self, path: Path) -> None:
        with replaced(path) as aside:
            save_file(
                {f"units.{k}": v for k, v in self.units.items()} | {_LAYER: self.layers}, aside
            )


def load_importance(path: Path) -> Importance:
    tensors = load_file(path)
    units = {k.removeprefix("units."): v for k, v in tensors.items() if k != _LAYER}
    return Importance(units, tensors[_LAYER])


def described(axes: Sequence[Axis], found: Importance) -> list[dict[str, Any]]:
    """For the report, of each group: `cumulative`, the share of its importance that its best units
    carry together, at every twentieth of the units; `by_unit` each one's share, of few units."""
    rows = []
    for axis in axes:
        for group in axis.groups:
            if group.name not in found.units:
                continue
            scores = found.units[group.name].double()
            shares = scores / scores.sum().clamp_min(1e-300)
            best = shares.sort(descending=True).values.cumsum(0)
            ends = [round(k * len(best) / _STEPS) for k in range(1, _STEPS + 1)]
            cumulative = [0.0, *(round(float(best[end - 1]), 5) if end else 0.0 for end in ends)]
            few = len(shares) <= _FEW
            rows.append(
                {
                    "axis": axis.name, "group": group.name, "units": group.units,
                    "cumulative": cumulative,
                    "by_unit": [round(v, 5) for v in shares.tolist()] if few else None,
                    "total": float(scores.sum()),
                }
            )  # fmt: skip
    return rows


def importance(
    model: nn.Module, axes: Sequence[Axis], batches: Sequence[Batch], progress: Progress,
    spec: ImportanceSpec = _DEFAULT, *, precision: str = "fp32",
) -> Importance:  # fmt: skip
    """Scores on these batches. Neither the model's weights nor their gradients are touched.

    With `precision` bf16 forwards run under autocast.

    Raises RecipeError for axes that the asked measure says nothing about.
    """
    model.eval()
    axes = [axis for axis in axes if not axis.labels]  # nothing reorders what inputs name
    layers = find_axis(axes, "layers")
    of_units = {"taylor": 3, "activation": 1, "magnitude": 0}[spec.units]
    of_layers = 1 + layers.size if layers and spec.layers == "leave-one-out" else bool(layers)
    bar_of = progress.bar("importance", len(batches) * (of_units + of_layers), "passes")
    device = compute_device()
    model.to(device)
    batches = [batch.to(device) for batch in batches]
    with bar_of as bar, _computing_in(precision, model):
        units = _SCORES[spec.units](model, axes, batches, bar)
        if layers is None:
            scores = torch.zeros(0)
        elif spec.layers == "block-influence":
            scores = influence(model, layers.pattern, layers.size, batches, bar)
        else:
            scores = _rises(model, layers, batches, bar)
    model.to("cpu")
    return Importance({name: score.cpu() for name, score in units.items()}, scores.cpu())


@contextmanager
def _computing_in(precision: str, model: nn.Module) -> Iterator[None]:
    if precision == "fp32":
        yield
        return
    device = next(model.parameters()).device.type
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    try:
        yield
    finally:
        del model.forward


def _rises(model: nn.Module, layers: Axis, batches: Sequence[Batch], bar: Bar) -> Tensor:
    opened = Layers(model, [layers.pattern.format(i) for i in range(layers.size)])
    rises = []
    with opened.open():
        for found in on_device(partial(opened.rises, partial(_loss, model)), batches):
            rises.append(found)
            bar.advance(1 + layers.size)
    return torch.tensor(rises, dtype=torch.float64).mean(0).float()


def _taylor(
    model: nn.Module, axes: Sequence[Axis], batches: Sequence[Batch], bar: Bar
) -> dict[str, Tensor]:
    device = compute_device()
    units = {g.name: torch.zeros(g.units, device=device) for a in axes for g in a.groups}
    parameters = dict(model.named_parameters())  # tied ones once, so each weight counts once
    for gradients in on_device(partial(_gradients, model, parameters), batches):
        _add_taylor(units, parameters, gradients, axes)  # per batch: sums are not scores
        bar.advance(3)
    return {name: score / len(batches) for name, score in units.items()}


def _magnitude(
    model: nn.Module, axes: Sequence[Axis], _batches: Sequence[Batch], _bar: Bar
) -> dict[str, Tensor]:
    squares = {name: p.detach().float().square() for name, p in model.named_parameters()}
    return {
        group.name: _of_members(group, squares, group.members)
        for axis in axes for group in axis.groups
    }  # fmt: skip


def _activation(
    model: nn.Module, axes: Sequence[Axis], batches: Sequence[Batch], bar: Bar
) -> dict[str, Tensor]:
    means = mean_inputs(model, axes, batches, bar)
    units = {}
    for axis in axes:
        for group in axis.groups:
            readers = readers_of(model, group)
            if not readers:
                raise RecipeError(
                    "recipe.importance.units", f"no matrix reads the units of axis {axis.name}",
                    allowed="taylor, magnitude", fix="choose one of these",
                )  # fmt: skip
            units[group.name] = _of_members(group, means, readers)
    return units


_SCORES = {"taylor": _taylor, "activation": _activation, "magnitude": _magnitude}


def _of_members(
    group: Group, values: Mapping[str, Tensor], members: Sequence[Member]
) -> Tensor:
    """Sums over each unit's channels: (units,). What is tied counts once."""
    total = torch.zeros(group.units, device=compute_device())
    for member in members:
        if member.parameter in values:
            value = values[member.parameter]
            lines = value.movedim(member.dim, 0).flatten(1).sum(1) if value.dim() > 1 else value
            total += _per_unit(lines, member, group.units)
    return total


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over what counts."""
    logits = model(**batch.inputs).logits[batch.mask]  # (P, V)
    return cross_entropy(logits, batch.labels[batch.mask]).mean()


def _gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch
) -> dict[str, Tensor | None]:
    loss = _loss(model, batch)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _add_taylor(
    units: dict[str, Tensor], parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None], axes: Sequence[Axis],
) -> None:  # fmt: skip
    for axis in axes:
        for group in axis.groups:
            total = torch.zeros(group.units, device=compute_device())
            for member in group.members:
                gradient = gradients.get(member.parameter)
                if gradient is None:
                    continue
                product = parameters[member.parameter].detach() * gradient
                total += _of_members(group, {member.parameter: product}, [member])
            units[group.name] += total.square()


def _per_unit(channels: Tensor, member: Member, units: int) -> Tensor:
    """Sum of each unit's channels. (width,) -> (units,)."""
    total, start = channels.new_zeros(units), 0
    for times in member.segments:
        width = units * member.block * times
        total += channels[start : start + width].view(units, -1).sum(1)
        start += width
    return total
