"""What a store gives back: the teacher's targets for one temperature, dense or sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from limbeck.errors import DataError, RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTargets:
    """Every logit; whoever computes the loss divides by its temperature."""

    logits: Tensor  # (P, V) float32


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


Targets = DenseTargets | SparseTargets


def check_served(codec: str, temperature: float, served: Sequence[float]) -> None:
    """Raises DataError where signals captured at `served` cannot give `temperature`."""
    if temperature not in served:
        raise DataError(
            "distill.temperature", f"{temperature:g} cannot be served from '{codec}' signals",
            allowed=f"captured for {', '.join(f'{t:g}' for t in served)}",
            fix="capture again with this temperature, or as 'dense'",
        )  # fmt: skip


def check_setting(codec: str, name: str, value: object, allowed: str, *, holds: bool) -> None:
    """Raises RecipeError for a codec's setting that cannot be."""
    if not holds:
        raise RecipeError(f"signals.{codec}.{name}", f"{value!r}", allowed=f"must be {allowed}")
