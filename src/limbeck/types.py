"""The nouns that the rooms of the house pass to each other. Frozen; no logic beyond their shape.

Letters: B examples, T positions, P counted positions of a batch, C classes, V vocabulary, D width,
L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from limbeck.losses.fused import Head


class Need(StrEnum):
    """What an objective asks of a teacher, and what a teacher says it provides."""

    LOGITS = "logits"
    HIDDEN = "hidden"
    EMBEDDING = "embedding"
    TEXT = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixed:
    """What a second example adds to each of a batch (mixup)."""

    labels: Tensor  # (B,) int64, its hard labels
    share: Tensor  # (B,) float32, how much of it: 0 to 0.5

    def to(self, device: torch.device) -> Mixed:
        return Mixed(labels=self.labels.to(device), share=self.share.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    inputs: Mapping[str, Tensor]  # what the model's forward takes
    labels: Tensor  # (B,) or (B, T) int64 hard labels, aligned with the logits
    mask: Tensor  # (B,) or (B, T) bool: True where the position counts; P of them
    example_ids: Tensor  # (B,) int64, stable across epochs: the key into a signal store
    views: Tensor | None = None  # (B, K) float64: what a random augmentation drew, to be replayed
    mixed: Mixed | None = None  # with what else; of labels (B,)

    def to(self, device: torch.device) -> Batch:
        """What a model computes with; ids and views are looked up on the CPU."""
        return Batch(
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            labels=self.labels.to(device), mask=self.mask.to(device),
            example_ids=self.example_ids, views=self.views,
            mixed=self.mixed and self.mixed.to(device),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One array that an exported model takes, (B, *dims)."""

    name: str
    dims: tuple[int, ...]  # the largest of each
    free: tuple[str | None, ...]  # names of those that may be smaller; inputs share them by name
    dtype: Literal["int64", "float32"] = "float32"
    below: int | tuple[int, ...] | None = None
    """Of integers: how many there are, of each column where they are several; None: all are 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTargets:
    """Every logit; whoever computes the loss divides by its temperature."""

    logits: Tensor  # (P, V) float32

    def at(self, rows: slice | Tensor) -> DenseTargets:
        return DenseTargets(logits=self.logits[rows])

    def to(self, device: torch.device) -> DenseTargets:
        return DenseTargets(logits=self.logits.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """A few of the teacher's probabilities, already at `temperature`.

    kept: the largest probabilities as they are, and the rest of the mass as `tail`; probs and
    tail sum to 1. Nothing is known of how the tail is spread: a loss that ignores it is biased.

    sampled: weights whose expectation is the whole distribution, so a loss that is linear in the
    teacher's probabilities (cross-entropy to it, forward KL up to a constant) has the dense
    gradient in expectation: s * sum(w) - w for the student's probabilities s. Their sum is 1 only
    in expectation, and a nonlinear use (entropy, reverse KL, top-1) is biased. `tail` is 0.

    Empty slots have probability 0 and any id; other ids differ, except that rounding may once in
    some 10^7 positions draw an id twice: add up, never overwrite.
    """

    kind: Literal["kept", "sampled"]
    ids: Tensor  # (P, K) int64
    probs: Tensor  # (P, K) float32
    tail: Tensor  # (P,) float32, the mass of all other ids together
    temperature: float

    def at(self, rows: slice | Tensor) -> SparseTargets:
        return SparseTargets(
            kind=self.kind, ids=self.ids[rows], probs=self.probs[rows], tail=self.tail[rows],
            temperature=self.temperature,
        )  # fmt: skip

    def to(self, device: torch.device) -> SparseTargets:
        return SparseTargets(
            kind=self.kind, ids=self.ids.to(device), probs=self.probs.to(device),
            tail=self.tail.to(device), temperature=self.temperature,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """What one model says about one batch. Teacher and student speak the same type."""

    logits: Tensor | None = None  # (B, C) or (B, T, V)
    targets: DenseTargets | SparseTargets | None = None  # of the batch's P counted positions
    head: Head | None = None  # with `head_input` in place of logits, which are never made
    head_input: Tensor | None = None  # (B, D) or (B, T, D), what the head multiplies
    hidden: Mapping[str, Tensor] = field(default_factory=dict)  # number or path -> (B, T, D)
    embedding: Tensor | None = None  # (B, D)
    texts: tuple[str, ...] = ()  # B completions

    def logits_at(self, mask: Tensor) -> Tensor:
        """Those of the counted positions, (P, V), made now where they were left to the head."""
        if self.head is None:
            assert self.logits is not None, "logits were asked for and none are there"
            return self.logits[mask]
        assert self.head_input is not None
        return self.head.logits(self.head_input[mask])


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Folders that a run's students are made from."""

    data: Path  # the task's rows, in the students' tokens
    teacher: Path  # a Hugging Face folder
    signals: Path | None  # what the teacher said; None: it is asked as it goes
    base: Path  # what students are cut from, a Hugging Face folder: the teacher's or another's
    space: Path  # the base's axes and what of it matters


@dataclass(frozen=True, slots=True)
class Shape:
    """One student's size along each axis, and which of the teacher's layers it keeps."""

    sizes: Mapping[str, int]  # axis name -> size, e.g. {"hidden": 160, "ffn": 640, "heads": 5}
    layers: tuple[int, ...]  # indices of the teacher's layers, ascending
    stacks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The same for models of several stacks, by axis name; a stack not named keeps all."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Shape:
        """The inverse of `asdict`, by way of JSON."""
        stacks = {name: tuple(kept) for name, kept in stored["stacks"].items()}
        return cls(dict(stored["sizes"]), tuple(stored["layers"]), stacks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Predicted before training. Never mixed with a `Measurement`."""

    params: int
    size_bytes: int  # of the primary export
    latency_ms: float | None  # None: nobody asked, so nobody measured
    memory_mb: float | None = None


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalsCost:
    """What a codec would take for all of the training rows. Predicted before the capture."""

    name: str
    chosen: bool
    bytes_per_position: int
    size_bytes: int
    seconds: float | None
    """Of the teacher's pass with encoding, on this machine; None: of an estimator, which may not be
    there yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that is known before any training."""

    students: tuple[StudentPlan, ...]
    signals: tuple[SignalsCost, ...]  # the chosen codec and others to compare with
    signals_reason: str  # one sentence
