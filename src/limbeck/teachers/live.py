"""A teacher that is a model in memory: frozen, in eval mode, never trained by accident."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.types import Batch, Need, Signal


@dataclass(frozen=True)
class LiveTeacher:
    """Hidden states are called 0 (what the first layer gets) to L; the embedding is the mean of the
    last over an example's tokens."""

    model: nn.Module
    fingerprint: str
    provides: frozenset[Need] = frozenset({Need.LOGITS, Need.HIDDEN, Need.EMBEDDING})

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        if not needs & {Need.HIDDEN, Need.EMBEDDING}:
            return Signal(logits=self.model(**batch.inputs).logits)
        said: Any = self.model(**batch.inputs, output_hidden_states=True)
        hidden = {str(i): states for i, states in enumerate(said.hidden_states)}
        return Signal(
            logits=said.logits,
            hidden=hidden if Need.HIDDEN in needs else {},
            embedding=_mean(said.hidden_states[-1], batch) if Need.EMBEDDING in needs else None,
        )


def _mean(states: Tensor, batch: Batch) -> Tensor:
    """(B, T, D) -> (B, D)."""
    mask = batch.inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp_min(1)
