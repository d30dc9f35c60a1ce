"""A model's matrices in bf16, rounded once instead of by autocast in every thread.

Under autocast each thread's forward makes a bf16 copy of every linear layer's weight, and its
backward an fp32 copy of every gradient: on a CPU a large part of a step's time and, as each thread
has its own, of its memory. Numbers are autocast's own, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from limbeck.device import on_device


@torch.no_grad()
def matrices_of(model: nn.Module, forward: Callable[[], object]) -> list[nn.Linear]:
    """The linear layers whose products autocast takes in bf16, found by running the model once,
    and whose weight nobody else uses; without the head, which losses and files take as it is."""
    seen: dict[int, nn.Linear] = {}

    def look(layer: nn.Module, _inputs: object) -> None:
        assert isinstance(layer, nn.Linear)
        if torch.is_autocast_enabled(layer.weight.device.type):
            seen[id(layer)] = layer

    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in linear]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        layer for layer in seen.values()
        if layer is not head and "forward" not in vars(layer)  # nor one that a loss has tapped
        and type(layer).forward is nn.Linear.forward
        and layer.weight.dtype == torch.float32 and uses[id(layer.weight)] == 1
    ]  # fmt: skip


@torch.inference_mode(False)
def round_for_good(layers: Sequence[nn.Linear]) -> None:
    """Of a model that never learns: fp32 is forgotten."""
    for layer in layers:
        layer.weight.data = layer.weight.data.to(torch.bfloat16)


class Matrices:
    """Copies in bf16 that stand in the place of what learns for as long as a step's gradient is
    taken."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = [layer for layer in layers if layer.weight.requires_grad]
        self.copies = [
            nn.Parameter(torch.empty_like(layer.weight, dtype=torch.bfloat16))
            for layer in self.layers
        ]

    @contextmanager
    def in_place(self) -> Iterator[dict[int, Tensor]]:
        """Within, the layers have the copies; by the `id` of the weight that each stands for."""
        own = [cast(nn.Parameter, layer.weight) for layer in self.layers]
        for _ in on_device(_renew, zip(self.copies, own, strict=True)):
            pass
        self._put(self.copies)
        try:
            yield {id(weight): copy for weight, copy in zip(own, self.copies, strict=True)}
        finally:
            self._put(own)

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer._parameters["weight"] = weight


@torch.no_grad()
def _renew(pair: tuple[Tensor, Tensor]) -> None:
    copy, weight = pair
    copy.copy_(weight)
