"""Which number format a machine multiplies fast, found by trying both.

A CPU without bf16 units emulates bf16, five times slower than fp32 and more; one with them, or a
GPU, is faster with it. No list of CPU flags is right everywhere, and a measurement is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from limbeck._startup import prepare_torch

_SIZES = {"cpu": (512, 1024), "cuda": (8192, 4096)}  # rows, width: work that fills it
_RUNS = 5
_WORTH = 1.2  # times as fast: less is not worth the rounding

prepare_torch()


def milliseconds() -> dict[str, float]:
    """Of one linear layer's forward and backward in `fp32` and `bf16`, the fastest of
    five each, on the device that training takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_rows, width = _SIZES[device]
    layer = nn.Linear(width, width).to(device)
    rows = torch.randn(num_rows, width, device=device)
    tried = {"fp32": False, "bf16": True}
    seconds: dict[str, list[float]] = {name: [] for name in tried}
    for _ in range(_RUNS + 1):
        for name, lower in tried.items():
            with torch.autocast(device, torch.bfloat16, enabled=lower):
                seconds[name].append(_seconds(lambda: layer(rows)))
    return {name: 1000 * min(found[1:]) for name, found in seconds.items()}


def faster(found: Mapping[str, float]) -> str:
    """`bf16` where it is worth its rounding, else `fp32`."""
    return "bf16" if found["bf16"] * _WORTH <= found["fp32"] else "fp32"


def _seconds(forward: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    forward().float().sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
