"""BatchNorm's running statistics: not gathered while a model learns, but measured afterwards.

While it learns each share of a step is normalised by its own mean and variance (ghost batches,
Hoffer et al. 2017, arXiv:1705.08741), and nothing is remembered: shares that run side by side would
write over each other. When the model is to be used, the statistics are measured on training rows
with the weights as they are then ("PreciseBN", Wu & Johnson 2021, arXiv:2105.07576, sec. 3). So
they follow from weights, rows and seed alone: a checkpoint needs no statistics, and a size that was
never trained gets its own in the same way (Yu & Huang 2019, arXiv:1903.05134, sec. 3.3).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.tasks.task import Rows

GHOST = 32  # examples that are normalised together while a model learns
_BATCH = 64
_ROWS = 1024  # training rows that statistics are measured on


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep statistics."""
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [norm for norm in found if norm.running_mean is not None]


def forget(model: nn.Module) -> None:
    """From now on, in train mode, each forward is normalised by its own examples, and the running
    statistics stay as they are. In eval mode nothing changes."""
    for norm in norms_of(model):
        norm.track_running_stats = False


@torch.no_grad()
def measure_statistics(model: nn.Module, rows: Rows, *, seed: int) -> None:
    """Sets the running statistics to the mean over batches of training rows; in eval mode after.

    Every view of the rows counts, as it does in training. Does nothing for other models.
    """
    norms = norms_of(model)
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.track_running_stats = True  # without it, torch's reset does nothing
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    device = next(model.parameters()).device
    total = len(rows) * rows.num_views
    at = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:_ROWS].tolist()
    for start in range(0, len(at), _BATCH):
        if start and len(at) - start < _BATCH:  # a remnant would count as much as the others
            break
        model(**rows.batch(at[start : start + _BATCH]).to(device).inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
