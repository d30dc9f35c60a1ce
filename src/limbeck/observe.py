"""What a model says about a batch: logits, hidden states, an embedding. Student and teacher alike.

Several threads may ask one model at the same time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.heads import Tap
from limbeck.types import Batch, Need, Signal

_PLACES = 2  # rows and columns of an image: a small convolutional net's last map has no more


class Observer:
    """Hidden states are called 0 (what the first layer gets) to L, or by the path of any module,
    `encoder.layer.3.attention.self.value` say; the embedding is the mean of the last over an
    example's tokens. An image's states are those of its places (`by_place`)."""

    def __init__(
        self, model: nn.Module, layers: Sequence[str] = (), *, precision: str = "fp32"
    ) -> None:
        """`layers` are those that are wanted; none: all numbers. With `precision` bf16 the forward
        runs under autocast. Raises AttributeError for a path that the model does not have."""
        self.model, self.layers, self.precision = model, tuple(layers), precision
        self.tap: Tap | None = None  # with it: the head and its input, in place of logits
        self._here = threading.local()
        self._hooks = [
            model.get_submodule(path).register_forward_hook(self._keep(path))
            for path in self.layers
            if not path.isdigit()
        ]

    def close(self) -> None:
        """The model is as it was."""
        if self.tap is not None:
            self.tap.remove()
        for hook in self._hooks:
            hook.remove()

    def __call__(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        device = batch.mask.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            if self.tap is None:
                signal = self._signal(batch, needs)
            else:
                with self.tap.open() as found:
                    signal = self._signal(batch, needs)
                ((hidden, head),) = found
                signal = replace(signal, logits=None, head=head, head_input=hidden)
        return signal

    def _signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        if not needs & {Need.HIDDEN, Need.EMBEDDING}:
            return Signal(logits=self.model(**batch.inputs).logits)
        self._here.kept = {}
        try:
            said: Any = self.model(**batch.inputs, output_hidden_states=True)
        finally:
            kept = self._here.__dict__.pop("kept")
        numbered = {str(i): states for i, states in enumerate(said.hidden_states)}
        hidden = numbered | kept
        if self.layers:
            hidden = {name: hidden[name] for name in self.layers if name in hidden}
        last = said.hidden_states[-1]
        if "pixel_values" in batch.inputs:
            hidden, last = {name: by_place(s) for name, s in hidden.items()}, by_place(last)
        return Signal(
            logits=said.logits,
            hidden=hidden if Need.HIDDEN in needs else {},
            embedding=_mean(last, batch) if Need.EMBEDDING in needs else None,
        )

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept = self._here.__dict__.get("kept")
            if kept is not None:
                kept[path] = output if isinstance(output, Tensor) else output[0]

        return hook


def tokens(batch: Batch) -> Tensor:
    """(B, T) bool: the positions that hold a token; of packed rows, which have no mask of theirs,
    those that count; of images all places."""
    if "pixel_values" in batch.inputs:
        return batch.mask.unsqueeze(1).expand(-1, _PLACES**2)
    held = batch.inputs.get("attention_mask")
    return batch.mask if held is None else held.bool()


def by_place(states: Tensor) -> Tensor:
    """States at each of a few places of an image, whatever the resolution: the mean of what lies
    there, so that those of any two architectures are as many. (B, D, H, W), or a transformer's
    patches behind tokens of other kinds (B, T, D), or (B, D) -> (B, places, D).
    """
    if states.dim() == 2:
        return states.unsqueeze(1).expand(-1, _PLACES**2, -1)
    if states.dim() == 3:
        side = math.isqrt(states.shape[1])
        patches = states[:, states.shape[1] - side**2 :]  # (B, side^2, D)
        states = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
    return nn.functional.adaptive_avg_pool2d(states, _PLACES).flatten(2).transpose(1, 2)


def _mean(states: Tensor, batch: Batch) -> Tensor:
    """(B, T, D) -> (B, D)."""
    mask = tokens(batch).unsqueeze(-1)
    total = states.masked_fill(~mask, 0).sum(1)
    return total / mask.sum(1).clamp_min(1).to(torch.promote_types(states.dtype, torch.float32))
