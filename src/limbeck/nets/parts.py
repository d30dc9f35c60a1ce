"""What our own networks have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Scaled(nn.Module):
    """(x - mean) / scale, by what training rows are like: an exported file takes raw numbers."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, *, dims: int = 1) -> None:
        """`size` columns or channels of an input with so many dimensions behind the batch."""
        super().__init__()
        self._behind = (1,) * (dims - 1)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, size, ...) of the same shape."""
        mean, scale = (v.view(-1, *self._behind) for v in (self.mean, self.scale))
        return (x - mean) / scale

    @torch.no_grad()
    def fit(self, mean: Sequence[float], scale: Sequence[float]) -> None:
        if len(mean) == len(self.mean):  # a probe of the config changes how many there are
            self.mean.copy_(torch.as_tensor(mean))
            self.scale.copy_(torch.as_tensor(scale))


def start_weights(module: nn.Module) -> None:
    """As wide as the input (He et al. 2015); an unknown category says nothing."""
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
        with torch.no_grad():
            module.weight[0].zero_()
