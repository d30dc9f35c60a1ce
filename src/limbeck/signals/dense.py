"""Every logit as it is: for classes, or small vocabularies, or to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.signals.blocks import check_rows, in_chunks
from limbeck.signals.targets import FLOATS, DenseTargets, check_setting


@dataclass(frozen=True, slots=True)
class Dense:
    """Serves any temperature. Relative error of a logit: 2^-11 (fp16), 2^-8 (bf16), 2^-24."""

    name: ClassVar = "dense"

    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        holds = self.dtype in FLOATS
        check_setting("dense", "dtype", self.dtype, "fp16, bf16 or fp32", holds=holds)

    @property
    def temperatures(self) -> None:
        """Any."""
        return

    def fields(self, vocab_size: int) -> dict[str, tuple[torch.dtype, int]]:
        return {"logits": (FLOATS[self.dtype], vocab_size)}

    def encode(self, logits: Tensor, keys: Tensor, seed: int = 0) -> dict[str, Tensor]:  # noqa: ARG002
        """(P, V), (P, 2). Raises DataError for NaN, +inf, or what fp16 cannot hold."""
        return in_chunks(self._encode, logits, keys)

    def _encode(self, logits: Tensor, keys: Tensor) -> dict[str, Tensor]:
        stored = logits.to(FLOATS[self.dtype])
        # a finite logit below fp16's range becomes -inf, the same probability: 0
        if not stored.amax(-1).isfinite().all():
            check_rows(logits.amax(-1), keys)
            raise DataError(
                "teacher", f"a logit of {logits.max():g}",
                allowed="up to 65504 in fp16", fix="set signals.dense.dtype to bf16 or fp32",
            )  # fmt: skip
        return {"logits": stored}

    def decode(
        self, fields: Mapping[str, Tensor], vocab_size: int, temperature: float = 1.0
    ) -> DenseTargets:
        assert fields["logits"].shape[1] == vocab_size
        del temperature  # the loss divides
        return DenseTargets(logits=fields["logits"].float())
