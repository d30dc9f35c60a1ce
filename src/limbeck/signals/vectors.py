"""Signals that are no distributions: hidden states, embeddings, text. One interface with `codecs`.

P positions      D width of a vector
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.observe import tokens
from limbeck.signals.draws import uniforms
from limbeck.signals.targets import FLOATS, check_setting
from limbeck.types import Batch, Need, Signal


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states of named layers: of each token, or their mean over an example's tokens.

    `project` brings a width D to fewer numbers by a matrix of random signs / sqrt(project), the
    same for all examples: distances and angles between states stay as they are up to about
    1 / sqrt(project) (Achlioptas 2003, "Database-friendly random projections"). A student's own
    projector learns the rest.
    """

    name: ClassVar = "hidden"
    need: ClassVar = Need.HIDDEN

    layers: tuple[str, ...] = ()
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    pool: Literal["none", "mean"] = "none"
    project: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        several = len({*self.layers}) == len(self.layers) > 0
        check_setting("hidden", "layers", self.layers, "one or more different", holds=several)
        _check_dtype("hidden", self.dtype)
        pools = ("none", "mean")
        check_setting("hidden", "pool", self.pool, "none or mean", holds=self.pool in pools)
        positive = self.project is None or self.project >= 1
        check_setting("hidden", "project", self.project, "at least 1", holds=positive)

    def encode_signal(self, signal: Signal, batch: Batch, seed: int) -> tuple[dict, Tensor]:
        """Fields `layer.NAME` (P, D) and each example's positions (B,).

        Raises DataError for a layer that the teacher did not give.
        """
        mask = tokens(batch)  # (B, T)
        fields = {}
        for number, layer in enumerate(self.layers):
            if layer not in signal.hidden:
                raise DataError(
                    "signals.hidden.layers", f"{layer!r}",
                    allowed=", ".join(signal.hidden) or "none: this teacher gives no hidden states",
                    fix="name layers that the teacher gives",
                )  # fmt: skip
            states = signal.hidden[layer].float()  # (B, T, D)
            if self.pool == "mean":
                weights = mask.unsqueeze(-1).float()
                found = (states.masked_fill(~mask.unsqueeze(-1), 0)).sum(1)
                found = found / weights.sum(1).clamp_min(1)
            else:
                found = states[mask]
            if self.project is not None:
                matrix = signs(found.shape[1], self.project, seed=seed, number=number)
                found = found @ matrix.to(found.device)
            fields[f"layer.{layer}"] = _stored(found, self.dtype, "hidden")
        counts = torch.ones(len(mask), dtype=torch.int64) if self.pool == "mean" else mask.sum(1)
        return fields, counts

    def vectors(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> (P, D) float32."""
        return {layer: fields[f"layer.{layer}"].float() for layer in self.layers}


@dataclass(frozen=True, slots=True)
class Embedding:
    """One vector an example, as the teacher gives it."""

    name: ClassVar = "embedding"
    need: ClassVar = Need.EMBEDDING

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        _check_dtype("embedding", self.dtype)

    def encode_signal(self, signal: Signal, batch: Batch, seed: int) -> tuple[dict, Tensor]:  # noqa: ARG002
        assert signal.embedding is not None
        fields = {"embedding": _stored(signal.embedding, self.dtype, "embedding")}
        return fields, torch.ones(len(signal.embedding), dtype=torch.int64)

    def vectors(self, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`embedding` -> (P, D) float32."""
        return {"embedding": fields["embedding"].float()}


@dataclass(frozen=True, slots=True)
class Text:
    """What the teacher wrote, in UTF-8: a position is a byte."""

    name: ClassVar = "text"
    need: ClassVar = Need.TEXT

    def encode_signal(self, signal: Signal, batch: Batch, seed: int) -> tuple[dict, Tensor]:  # noqa: ARG002
        encoded = [text.encode("utf-8") for text in signal.texts]
        flat = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        counts = torch.tensor([len(text) for text in encoded], dtype=torch.int64)
        return {"bytes": flat[: int(counts.sum())].unsqueeze(1)}, counts

    def texts(self, fields: Mapping[str, Tensor], counts: Tensor) -> list[str]:
        whole = fields["bytes"].squeeze(1).numpy().tobytes()
        found, at = [], 0
        for count in counts.tolist():
            found.append(whole[at : at + count].decode("utf-8"))
            at += count
        return found


def signs(width: int, project: int, *, seed: int, number: int) -> Tensor:
    """(width, project) of +-1 / sqrt(project); follows from seed, layer number and place alone."""
    keys = torch.stack([torch.arange(width), torch.full((width,), number)], 1)
    drawn = uniforms(keys, seed, range(project))  # (width, project)
    return torch.where(drawn < 0.5, -1.0, 1.0) / project**0.5


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """(P, D) of the positions of `mask` (B, T) -> (B, T, D), 0 elsewhere."""
    out = values.new_zeros(*mask.shape, values.shape[1])
    out[mask] = values
    return out


def _stored(values: Tensor, dtype: str, what: str) -> Tensor:
    stored = values.to(FLOATS[dtype])
    if not stored.isfinite().all():
        raise DataError(
            "teacher", f"its {what} signals hold {values.abs().max():g} or NaN",
            allowed=f"finite numbers that {dtype} holds",
            fix=f"set distill.{what}.dtype to bf16 or fp32, or compute the teacher in fp32",
        )  # fmt: skip
    return stored


def _check_dtype(codec: str, dtype: str) -> None:
    check_setting(codec, "dtype", dtype, "fp16, bf16 or fp32", holds=dtype in FLOATS)
