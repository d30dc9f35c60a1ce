"""A model built without drawing its weights at random: they are about to be overwritten.

Of SmolLM2's 126 million that takes longer than a forward, and proofs build dozens of students.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWN = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_,
          nn.init.trunc_normal_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_)  # fmt: skip


class NothingDrawn(TorchFunctionMode):
    """Inside, parameters keep whatever their memory held; buffers are made as ever."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWN:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)
