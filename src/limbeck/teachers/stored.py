"""A teacher that spoke once: its signals come from a store, by example id."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.signals.store import Store
from limbeck.types import Batch, Need, Signal


@dataclass(frozen=True)
class StoredTeacher:
    store: Store
    fingerprint: str
    provides: frozenset[Need] = frozenset({Need.LOGITS})

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 logits only
        return Signal(logits=self.store.take(batch.example_ids))


@dataclass(frozen=True)
class NoTeacher:
    """For learning from hard labels alone: the same loop, and nothing to ask."""

    fingerprint: str = "none"
    provides: frozenset[Need] = frozenset()

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 nothing
        return Signal()
