"""A teacher that spoke once: its signals come from a store, by example id."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.signals.codecs import LogitCodec
from limbeck.signals.store import Store
from limbeck.signals.targets import check_served
from limbeck.types import Batch, Need, Signal


@dataclass(frozen=True)
class StoredTeacher:
    """Targets at one temperature. Raises DataError for one that the signals cannot serve."""

    store: Store
    fingerprint: str
    temperature: float
    provides: frozenset[Need] = frozenset({Need.LOGITS})

    def __post_init__(self) -> None:
        codec = self.store.codec
        assert isinstance(codec, LogitCodec), f"{codec.name} are no distributions"
        served = codec.temperatures
        if served is not None:
            check_served(codec.name, self.temperature, served)

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 logits only
        return Signal(targets=self.store.targets(batch.example_ids, self.temperature))


@dataclass(frozen=True)
class NoTeacher:
    """For learning from hard labels alone: the same loop, and nothing to ask."""

    fingerprint: str = "none"
    provides: frozenset[Need] = frozenset()

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 nothing
        return Signal()
