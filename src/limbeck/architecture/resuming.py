"""What each layer's absence costs, without computing anew what comes before it.

The layers in front of a skipped one do what they did when none was: their outputs are kept, and
handed out again. That halves the work. Where something else than its output reaches beyond a layer
(keys that later layers share), or it is called twice, every pass is a whole one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.architecture.proof_layers import handed_through
from limbeck.types import Batch

_SAME = 1e-5  # of the loss: what a resumed pass may differ by from a whole one


class Layers:
    """Inside `open` the model's layers can be skipped, and those before a skipped one replayed;
    each thread by itself."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._layers = [model.get_submodule(name) for name in names]
        self._here = threading.local()

    @contextmanager
    def open(self) -> Iterator[None]:
        before = [layer.forward for layer in self._layers]
        own = ["forward" in vars(layer) for layer in self._layers]
        for at, layer in enumerate(self._layers):
            layer.forward = self._wrapped(at, before[at])
        try:
            yield
        finally:
            for layer, forward, kept in zip(self._layers, before, own, strict=True):
                if kept:
                    layer.forward = forward
                else:
                    del layer.forward

    @torch.inference_mode()
    def rises(self, loss: Callable[[Batch], Tensor], batch: Batch) -> list[float]:
        """By how much the loss rises without each layer."""
        count, here = len(self._layers), self._here
        here.kept, here.first, here.skipped = [], 0, None
        try:
            plain = loss(batch).item()
            calls, here.kept = here.kept, None
            outputs = dict(calls)
            resumes = [at for at, _ in calls] == [*range(count)]
            if resumes:
                here.outputs, here.first = outputs, count // 2
                resumes = abs(loss(batch).item() - plain) <= _SAME * abs(plain)
            found = []
            for at in range(count):
                here.first, here.skipped = at if resumes else 0, at
                found.append(loss(batch).item() - plain)
            return found
        finally:
            here.__dict__.clear()

    def _wrapped(self, at: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        here = self._here

        def called(*args: Any, **kwargs: Any) -> Any:
            if at < here.first:
                return here.outputs[at]
            output = forward(*args, **kwargs)
            if at == here.skipped:
                return handed_through(args, kwargs, output)
            if here.kept is not None:
                here.kept.append((at, output))
            return output

        return called
