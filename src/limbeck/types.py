"""The nouns that the rooms of the house pass to each other. Frozen; no logic beyond their shape.

Letters: B examples, T positions, C classes, V vocabulary, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Need(StrEnum):
    """What an objective asks of a teacher, and what a teacher says it provides."""

    LOGITS = "logits"
    HIDDEN = "hidden"
    EMBEDDING = "embedding"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    inputs: Mapping[str, Tensor]  # what the model's forward takes
    labels: Tensor  # (B,) int64 hard labels, aligned with the logits
    mask: Tensor  # (B,) bool: True where the position counts
    example_ids: Tensor  # (B,) int64, stable across epochs: the key into a signal store


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """What one model says about one batch. Teacher and student speak the same type."""

    logits: Tensor | None = None  # (B, C)
    hidden: Mapping[str, Tensor] = field(default_factory=dict)  # module name -> (B, T, D)
    embedding: Tensor | None = None  # (B, D)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """A sum over one batch and its count; whoever sees the whole step divides."""

    total: Tensor  # ()
    count: Tensor  # ()


class Teacher(Protocol):
    """Anything that can say what it knows: a live model, a store, an ensemble, an endpoint."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the signal could."""
        ...

    @property
    def provides(self) -> frozenset[Need]: ...

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """One student's size along each axis, and which of the teacher's layers it keeps."""

    sizes: Mapping[str, int]  # axis name -> size, e.g. {"hidden": 160, "ffn": 640, "heads": 5}
    layers: tuple[int, ...]  # indices of the teacher's layers, ascending


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Predicted before training. Never mixed with a `Measurement`."""

    params: int
    size_bytes: int  # of the primary export
    latency_ms: float | None  # None: nobody asked, so nobody measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with its 95 % bootstrap interval over n examples."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentPlan:
    """A student before it has weights: printable, storable."""

    name: str
    shape: Shape
    cost: Cost
    reason: str  # one sentence for the report: which rule chose this shape
