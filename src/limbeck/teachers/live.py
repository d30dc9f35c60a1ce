"""A teacher that is a model in memory: frozen, in eval mode, never trained by accident."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from limbeck.types import Batch, Need, Signal


@dataclass(frozen=True)
class LiveTeacher:
    model: nn.Module
    fingerprint: str
    provides: frozenset[Need] = frozenset({Need.LOGITS})

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 logits only
        return Signal(logits=self.model(**batch.inputs).logits)
