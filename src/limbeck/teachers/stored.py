"""A teacher that spoke once: its signals come from stores, by example id."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.observe import tokens
from limbeck.signals.codecs import LogitCodec
from limbeck.signals.store import Store
from limbeck.signals.targets import check_served
from limbeck.signals.vectors import scattered
from limbeck.types import Batch, Need, Signal


@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """Targets at one temperature. Raises DataError for one that the signals cannot serve."""

    store: Store
    fingerprint: str
    temperature: float
    hidden: Store | None = None  # of each token's states
    embedding: Store | None = None

    def __post_init__(self) -> None:
        codec = self.store.codec
        assert isinstance(codec, LogitCodec), f"{codec.name} are no distributions"
        served = codec.temperatures
        if served is not None:
            check_served(codec.name, self.temperature, served)

    @property
    def provides(self) -> frozenset[Need]:
        stores = {Need.HIDDEN: self.hidden, Need.EMBEDDING: self.embedding}
        return frozenset({Need.LOGITS, *(need for need, store in stores.items() if store)})

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        targets, hidden, embedding = None, {}, None
        if Need.LOGITS in needs:
            targets = self.store.targets(batch.example_ids, self.temperature)
        if Need.HIDDEN in needs:
            assert self.hidden is not None, "no hidden states were stored"
            found, _ = self.hidden.vectors(batch.example_ids)
            mask = tokens(batch).cpu()
            hidden = {layer: scattered(states, mask) for layer, states in found.items()}
        if Need.EMBEDDING in needs:
            embedding = self._embedding(batch)
        return Signal(targets=targets, hidden=hidden, embedding=embedding)

    def _embedding(self, batch: Batch) -> Tensor:
        assert self.embedding is not None, "no embeddings were stored"
        return self.embedding.vectors(batch.example_ids)[0]["embedding"]


@dataclass(frozen=True)
class NoTeacher:
    """For learning from hard labels alone: the same loop, and nothing to ask."""

    fingerprint: str = "none"
    provides: frozenset[Need] = frozenset()

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002 nothing
        return Signal()
