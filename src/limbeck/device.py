"""Where models compute: on a GPU where torch finds one, else on the CPU's cores.

`CUDA_VISIBLE_DEVICES=` (empty) keeps a run on the CPU. Exported files are measured on the CPU
whatever there is: that is what they are for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from limbeck.cores import on_each

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_ON_A_GPU = 16  # times as many rows at a time as a core is given


def compute_device() -> torch.device:
    """This process's: of several GPUs the one that torchrun's `LOCAL_RANK` names."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", rank % torch.cuda.device_count())


def on_device(
    function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """`function` of every item in order: side by side on the CPU's cores; one after another on a
    GPU, which each fills, and whose memory they would all take at once."""
    if compute_device().type == "cpu":
        yield from on_each(function, items)
        return
    for item in items:
        yield function(item)


def rows_at_once(num_together: int) -> int:
    """How many rows a model is asked about at a time, where a core is given `num_together`."""
    return num_together * (1 if compute_device().type == "cpu" else _ON_A_GPU)


@contextmanager
def repeatable() -> Iterator[None]:
    """A GPU adds in the same order each time, so that a killed run ends with the bytes of one that
    was not. What has no such way (some backwards of attention) goes its own."""
    if compute_device().type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    memory.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
        memory.fill_uninitialized_memory = filled


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """With bf16, what stays fp32 (a head's product, say) may be rounded as it is multiplied: to
    TF32 on a GPU, to bf16 on a CPU with units for it. Sums and what comes out are fp32 still."""
    if precision != "bf16":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if compute_device().type == "cpu" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
