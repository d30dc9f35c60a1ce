"""A teacher that is a model in memory: frozen, in eval mode, never trained by accident."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from limbeck.device import compute_device
from limbeck.heads import tap_head
from limbeck.matrices import matrices_of, round_for_good
from limbeck.observe import Observer
from limbeck.types import Batch, Need, Signal


class LiveTeacher:
    """As `Observer` answers."""

    provides = frozenset({Need.LOGITS, Need.HIDDEN, Need.EMBEDDING})

    def __init__(
        self, model: nn.Module, fingerprint: str, layers: Sequence[str] = (), *,
        precision: str = "fp32",
    ) -> None:  # fmt: skip
        """`layers`: the hidden states that will be asked for, by number or path; none: all. With
        bf16 the model's matrices are rounded for good at the first question."""
        self.device = compute_device()
        model.to(self.device)
        self.model, self.fingerprint = model.eval().requires_grad_(False), fingerprint
        self._observe = Observer(model, layers, precision=precision)
        self._bf16, self._rounded, self._lock = precision == "bf16", False, threading.Lock()

    def leave_head(self, batch: Batch) -> None:
        """From now on logits are left to whoever wants them: a signal has the head and what it
        multiplies, where the model is found to have one on this batch."""
        if self._observe.tap is None:
            batch = batch.to(self.device)
            self._round(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._rounded):
                found = tap_head(self.model, batch)
            self._observe.tap = None if isinstance(found, str) else found

    @torch.inference_mode()
    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        batch = batch.to(self.device)
        self._round(batch)
        return self._observe(batch, needs)

    def _round(self, batch: Batch) -> None:
        """Once, by what the model does with this batch. Several threads may come first."""
        with self._lock:
            if self._bf16 and not self._rounded:
                ask = partial(self._observe, batch, frozenset({Need.LOGITS}))
                round_for_good(matrices_of(self.model, ask))
                self._rounded = True
