"""What runs through a model: the size of what each unit gives, and how far each layer moves it.

Activation: the mean of |x| over what a unit hands to the matrices that read it (Minitron,
Muralidharan et al. 2024, arXiv:2407.14679, sec. 2.2). Block influence: 1 - cos(input, output) of a
layer, mean over positions (ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1). Both need forward
passes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from limbeck.architecture.axes import Axis, Group, Member
from limbeck.progress import Bar
from limbeck.types import Batch

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def mean_inputs(
    model: nn.Module, axes: Sequence[Axis], batches: Sequence[Batch], bar: Bar
) -> Mapping[str, Tensor]:
    """Parameter name -> mean |input| of each channel (C,), of the matrices that read a unit."""
    owners = _matrices(model)
    read = {
        member.parameter
        for axis in axes for group in axis.groups for member in readers_of(model, group)
    }  # fmt: skip

    def noted(sums: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].detach().float().abs()
        channel = 1 if isinstance(module, _CONVOLUTIONS) else x.dim() - 1
        places = [d for d in range(x.dim()) if d != channel]
        sums[name] = sums.get(name, 0) + x.mean(places)

    def hook(sums: dict[str, Tensor], name: str) -> RemovableHandle:
        return owners[name].register_forward_pre_hook(partial(noted, sums, name))

    return _means(model, batches, bar, [partial(hook, name=name) for name in sorted(read)])


def readers_of(model: nn.Module, group: Group) -> list[Member]:
    """The sides of matrices that are multiplied with what the group's units give."""
    owners = _matrices(model)
    sides = {
        name: 0 if isinstance(module, Conv1D) else 1
        for name, module in owners.items() if getattr(module, "groups", 1) == 1
    }  # fmt: skip
    return [m for m in group.members if sides.get(m.parameter) == m.dim]


def _matrices(model: nn.Module) -> dict[str, nn.Module]:
    """By the name of the weight."""
    kinds = (nn.Linear, Conv1D, *_CONVOLUTIONS)
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, kinds)}


def influence(
    model: nn.Module, pattern: str, layers: int, batches: Sequence[Batch], bar: Bar
) -> Tensor:
    """Of each layer, (L,); 1 of one that gives another size than it takes."""

    def noted(
        sums: dict[str, Tensor], name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        given = next(v for v in [*args, kwargs.get("hidden_states")] if isinstance(v, Tensor))
        made = output[0] if isinstance(output, tuple) else output
        moved = made.new_ones((), dtype=torch.float32)
        if given.shape == made.shape:
            dim = 1 if given.dim() == 4 else -1  # (B, C, H, W) or (B, T, D)
            cosine = nn.functional.cosine_similarity(given.float(), made.float(), dim=dim)
            moved = 1 - cosine.mean()
        sums[name] = sums.get(name, 0) + moved

    def hook(sums: dict[str, Tensor], name: str) -> RemovableHandle:
        layer = model.get_submodule(name)
        return layer.register_forward_hook(partial(noted, sums, name), with_kwargs=True)

    names = [pattern.format(i) for i in range(layers)]
    found = _means(model, batches, bar, [partial(hook, name=name) for name in names])
    return torch.stack([found[name] for name in names])


def _means(
    model: nn.Module, batches: Sequence[Batch], bar: Bar,
    hooks: Sequence[Callable[[dict[str, Tensor]], RemovableHandle]],
) -> dict[str, Tensor]:  # fmt: skip
    """Means over the batches of what the hooks add up; one batch at a time, since hooks are the
    model's."""
    sums: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.inference_mode():
        for hook in hooks:
            stack.callback(hook(sums).remove)
        for batch in batches:
            model(**batch.inputs)
            bar.advance(1)
    return {name: total / len(batches) for name, total in sums.items()}
