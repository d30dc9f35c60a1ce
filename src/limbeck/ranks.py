"""Processes that work on one thing together, as torchrun starts them; alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.device import compute_device


@dataclass(frozen=True, slots=True)
class Ranks:
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def share(self, num_items: int) -> range:
        """This rank's contiguous part of so many items; the parts differ by one at most."""
        return range(num_items * self.rank // self.world, num_items * (self.rank + 1) // self.world)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its sum over the ranks, in place."""
        if self.world == 1 or not tensors:
            return
        # one message for each type: a message a tensor costs a round trip each
        on_gpus = torch.distributed.get_backend() == "nccl"
        where = compute_device() if on_gpus else torch.device("cpu")
        for dtype in {t.dtype: 0 for t in tensors}:
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten().to(where) for t in same])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


def ranks() -> Ranks:
    """Of the process group that is open."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """A process group as torchrun's variables say, unless one is open already."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks().world > 1:
        yield ranks()
        return
    device = compute_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    one_each = torch.cuda.device_count() >= here  # two on one GPU cannot speak by NCCL
    torch.distributed.init_process_group("nccl" if one_each else "gloo")
    try:
        yield ranks()
    finally:
        torch.distributed.destroy_process_group()
