"""The k largest logits, and how much mass the rest has at each temperature it was captured for.

Probabilities are those of the *whole* softmax; what is left over is stated, never spread over
the k or dropped in silence (PITFALLS 13). As targets they are still biased: see `sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from limbeck.signals.bits import bits_for, pack, packed_width, unpack
from limbeck.signals.blocks import in_blocks, in_chunks, largest
from limbeck.signals.targets import SparseTargets, check_served, check_setting

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.uint8}
_STEPS = 254  # of int8; the code 255 is -inf


@dataclass(frozen=True, slots=True)
class TopK:
    """Serves the temperatures it lists, each exactly up to the rounding of the k logits.

    Stored: ids, logits less the largest one, and per temperature log(tail / kept) in float32,
    from which tail = sigmoid(it) and probs = (1 - tail) softmax(logits / temperature). So the
    tail is exact to float32 and all of it sums to 1. Another temperature would need the shape of
    the tail (its mass at T only bounds that at T' to within a factor of V - k): it is refused.

    Error of a probability's logarithm, with d the logit's distance from the largest one and m the
    mean of d over the kept: (d + m) / T * 2^-11 (fp16) or 2^-8 (bf16); for int8, r / (254 T) with
    r the range of the kept, of which 30 T_max at most is told apart.
    """

    name: ClassVar = "topk"

    k: int = 32
    values: Literal["fp16", "bf16", "int8"] = "fp16"
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        check_setting("topk", "k", self.k, "at least 1", holds=self.k >= 1)
        holds = self.values in _DTYPES
        check_setting("topk", "values", self.values, "fp16, bf16 or int8", holds=holds)
        several = {*self.temperatures}
        holds = len(several) == len(self.temperatures) > 0 and min(several) > 0
        allowed = "one or more different numbers above 0"
        check_setting("topk", "temperatures", self.temperatures, allowed, holds=holds)

    def fields(self, vocab_size: int) -> dict[str, tuple[torch.dtype, int]]:
        k = min(self.k, vocab_size)
        return {
            "ids": (torch.uint8, packed_width(k, bits_for(vocab_size))),
            "logits": (_DTYPES[self.values], k),
            **({"range": (torch.float32, 1)} if self.values == "int8" else {}),
            "tails": (torch.float32, len(self.temperatures)),
        }

    def encode(self, logits: Tensor, keys: Tensor, seed: int = 0) -> dict[str, Tensor]:  # noqa: ARG002
        """(P, V), (P, 2) -> fields on the logits' device. Raises DataError for NaN or +inf."""
        return in_chunks(self._encode, logits, keys)

    def _encode(self, logits: Tensor, keys: Tensor) -> dict[str, Tensor]:
        vocab_size = logits.shape[1]
        blocks, maxima = in_blocks(logits, keys)
        ids, kept = largest(blocks, maxima, min(self.k, vocab_size))  # (P, k)
        blocks.flatten(1).scatter_(1, ids, -torch.inf)
        tails = []
        for temperature in self.temperatures:
            if temperature == self.temperatures[-1]:
                masses = blocks.div_(temperature).exp_()  # nobody needs the logits any more
            else:
                masses = (blocks / temperature).exp_()
            tail = masses.sum(-1).sum(-1, dtype=torch.float64)
            tails.append(tail.log() - (kept.double() / temperature).logsumexp(-1))
        return {
            "ids": pack(ids, bits_for(vocab_size)),
            **self._stored(kept),
            "tails": torch.stack(tails, -1).float(),
        }

    def _stored(self, kept: Tensor) -> dict[str, Tensor]:
        """(P, k) logits, the largest 0."""
        if self.values != "int8":
            return {"logits": kept.to(_DTYPES[self.values])}
        # what is below exp(-30) at every temperature may as well be exp(-30)
        finite = kept.masked_fill(kept.isinf(), 0).clamp_min(-30 * max(self.temperatures))
        span = -finite.amin(-1, keepdim=True)  # (P, 1)
        codes = (finite * (-_STEPS / span.clamp_min(1e-30))).round_()
        return {"logits": codes.masked_fill(kept.isinf(), 255).to(torch.uint8), "range": span}

    def decode(
        self, fields: Mapping[str, Tensor], vocab_size: int, temperature: float = 1.0
    ) -> SparseTargets:
        """Raises DataError for a temperature that was not captured."""
        check_served("topk", temperature, self.temperatures)
        odds = fields["tails"][:, self.temperatures.index(temperature)]  # (P,) log(tail / kept)
        logits = fields["logits"].float()
        if self.values == "int8":
            masked = logits == 255
            logits = (logits * fields["range"] / -_STEPS).masked_fill(masked, -torch.inf)
        return SparseTargets(
            kind="kept",
            ids=unpack(fields["ids"], bits_for(vocab_size), logits.shape[1]),
            # 1 - tail would lose the digits of what is kept of a flat distribution
            probs=(-odds).sigmoid().unsqueeze(-1) * (logits / temperature).softmax(-1),
            tail=odds.sigmoid(),
            temperature=temperature,
        )
