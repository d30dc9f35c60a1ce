"""What a store gives back, and what codecs say about settings that they cannot serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from limbeck.errors import DataError, RecipeError
from limbeck.types import DenseTargets, SparseTargets

Targets = DenseTargets | SparseTargets
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


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
