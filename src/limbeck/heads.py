"""A model's last matrix left out of its forward, so that (positions, vocabulary) is never made.

Found by running the model once, not by names: it is the layer whose product, scaled and capped as
the config says, *is* the model's logits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.losses.fused import Head
from limbeck.types import Batch

_SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative norm


class Tap:
    """Inside `open` the layer keeps its input instead of multiplying it; each thread by itself."""

    def __init__(self, layer: nn.Module, logit_scale: float, softcap: float | None) -> None:
        self.layer, self.logit_scale, self.softcap = layer, logit_scale, softcap
        self._here = threading.local()
        self._forward = layer.forward
        layer.forward = self._kept

    def remove(self) -> None:
        del self.layer.forward

    @contextmanager
    def open(self) -> Iterator[list[tuple[Tensor, Head]]]:
        """The list has one pair, the layer's input (..., D) and its head, after the forward."""
        found: list[tuple[Tensor, Head]] = []
        self._here.found = found
        try:
            yield found
        finally:
            del self._here.found

    def _kept(self, hidden: Tensor) -> Tensor:
        found = getattr(self._here, "found", None)
        if found is None:
            return self._forward(hidden)
        # its weight is looked up now: inside a functional call it is another tensor
        found.append((hidden, self.head()))
        return hidden[..., :1]  # what the model makes of it is never used

    def head(self) -> Head:
        weight: Any = self.layer.weight
        bias: Any = self.layer.bias
        return Head(weight=weight, bias=bias, logit_scale=self.logit_scale, softcap=self.softcap)


@torch.no_grad()
def tap_head(model: nn.Module, batch: Batch) -> Tap | str:
    """The model's last matrix, tapped; or a sentence that says why it cannot be left out."""
    seen: list[tuple[nn.Module, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, inputs: seen.append((m, inputs[0])))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        logits = model(**batch.inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    if not seen or seen[-1][0].out_features != logits.shape[-1]:
        return "its logits do not come from a linear layer at its end"
    layer, hidden = seen[-1]
    config = getattr(model, "config", None)
    tap = Tap(layer, _scale(config), getattr(config, "final_logit_softcapping", None))
    product = tap.head().logits(hidden)
    wanted = logits.float()
    if product.shape == wanted.shape and (
        (product - wanted).norm() <= _SAME.get(logits.dtype, 1e-4) * wanted.norm()
    ):
        return tap
    tap.remove()
    return "something stands between its last linear layer and its logits"


def _scale(config: Any) -> float:
    """Cohere's multiplies, Granite's divides."""
    if divisor := getattr(config, "logits_scaling", None):
        return 1 / float(divisor)
    return float(getattr(config, "logit_scale", None) or 1.0)
