"""Training on weights as a file will hold them: quantization-aware distillation.

Forward and backward see each matrix rounded as llama.cpp's Q8_0 or Q4_0 stores it; the gradient
moves the matrix itself (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). What
is learnt against the teacher's signal is then what the file says (LLM-QAT, Liu et al. 2023,
arXiv:2305.17888). The rounding is done once a step, in place: autograd never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limbeck.device import on_device
from limbeck.recipe_teaching import QuantizationAwareSpec

BLOCK = 32  # neighbours in a row that share a scale


def block_kind(shape: Sequence[int], kind: str, *, of_tokens: bool) -> str | None:
    """How a GGUF file of this kind, `q8_0` or `q4_0`, stores a weight; None where not in blocks.

    `of_tokens`: an embedding or the head. Their errors reach every logit, so they have 8 bits.
    """
    if len(shape) == 1 or shape[-1] % BLOCK:
        return None
    return "q8_0" if of_tokens else kind


@torch.no_grad()
def rounded(weight: Tensor, kind: str) -> Tensor:
    """What is read back of a stored weight: (..., C), C in blocks of 32. To the bit what `gguf`
    makes of it, which is ggml's reference."""
    blocks = weight.reshape(-1, BLOCK)
    if kind == "q8_0":
        scale = blocks.abs().amax(1, keepdim=True) / 127
        steps = blocks * _inverse(scale)
        size = steps.abs()
        whole = size.floor()
        steps = steps.sign() * (whole + (2 * (size - whole)).floor())  # a half goes away from zero
    elif kind == "q4_0":
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = largest / -8
        steps = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8
    else:
        raise ValueError(f"{kind!r}: q8_0 or q4_0")
    return (steps * scale.half().float()).view_as(weight)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


class Rounding:
    """Which of a model's weights are rounded, and from which step of the training on."""

    def __init__(self, model: nn.Module, spec: QuantizationAwareSpec | None, steps: int) -> None:
        self.first = steps if spec is None else steps - math.ceil(spec.share * steps)
        self.kinds: list[tuple[nn.Parameter, str]] = []
        if spec is None:
            return
        ends = (getattr(model, f"get_{end}_embeddings")() for end in ("input", "output"))
        tables = {id(end.weight) for end in ends if end is not None}
        for parameter in model.parameters():
            kind = block_kind(
                parameter.shape, spec.format.removeprefix("gguf-"),
                of_tokens=id(parameter) in tables,
            )  # fmt: skip
            if kind is not None:
                self.kinds.append((parameter, kind))

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Within, the weights are as the file has them, where this step is to see them so."""
        if step < self.first:
            yield
            return
        own = [parameter.detach().clone() for parameter, _ in self.kinds]
        self._put([*on_device(_of_pair, self.kinds)])
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for (parameter, _), value in zip(self.kinds, values, strict=True):
            parameter.copy_(value)


def _of_pair(pair: tuple[Tensor, str]) -> Tensor:
    return rounded(*pair)
