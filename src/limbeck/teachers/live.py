"""A teacher that is a model in memory: frozen, in eval mode, never trained by accident."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from limbeck.observe import Observer
from limbeck.types import Batch, Need, Signal


class LiveTeacher:
    """As `Observer` answers."""

    provides = frozenset({Need.LOGITS, Need.HIDDEN, Need.EMBEDDING})

    def __init__(
        self, model: nn.Module, fingerprint: str, layers: Sequence[str] = (), *,
        precision: str = "fp32",
    ) -> None:  # fmt: skip
        """`layers`: the hidden states that will be asked for, by number or path; none: all."""
        self.model, self.fingerprint = model.eval().requires_grad_(False), fingerprint
        self._observe = Observer(model, layers, precision=precision)

    @torch.inference_mode()
    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        return self._observe(batch, needs)
