"""A model built without drawing its weights at random: they are about to be overwritten.

Of SmolLM2's 126 million that takes longer than a forward, and proofs build dozens of students.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# By name: of `nn.init.normal_` transformers puts a version of its own in place while it builds.
_DRAWN = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_"}


class NothingDrawn(TorchFunctionMode):
    """Inside, parameters keep whatever their memory held; buffers are made as ever."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in _DRAWN:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)
