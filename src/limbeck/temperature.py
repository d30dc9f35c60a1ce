"""How soft the targets are: one number, a schedule, or a temperature for each example.

`auto` is no temperature of its own: `stages.choose_temperature` tries some and takes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.errors import RecipeError
from limbeck.losses.numerics import at_least_fp32
from limbeck.recipe_teaching import TemperatureSpec


class Temperature(Protocol):
    @property
    def fixed(self) -> float | None:
        """The number, where it is one: sparse signals serve nothing else."""
        ...

    def at(self, done: float, teacher_logits: Tensor | None) -> float | Tensor:
        """At this share of the training, for these positions: a number, or (P,) float."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    value: float

    @property
    def fixed(self) -> float:
        return self.value

    def at(self, done: float, teacher_logits: Tensor | None) -> float:  # noqa: ARG002
        return self.value


@dataclass(frozen=True, slots=True)
class Schedule:
    """From `start` to `end` in equal steps over the whole training."""

    start: float
    end: float

    @property
    def fixed(self) -> None:
        return

    def at(self, done: float, teacher_logits: Tensor | None) -> float:  # noqa: ARG002
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True, slots=True)
class PerExample:
    """The temperature at which the teacher's entropy is this share of the largest possible.

    What the teacher is sure of is softened much, what it doubts little: every example has as soft
    a target as any other. (The idea of sample-wise temperature is that of Sun et al. 2024,
    2403.01427, who divide by the logits' deviation; entropy is scale-free and bounded.)
    """

    entropy: float  # of log C, in (0, 1)

    @property
    def fixed(self) -> None:
        return

    def at(self, done: float, teacher_logits: Tensor | None) -> Tensor:  # noqa: ARG002
        assert teacher_logits is not None, "sparse signals do not tell the entropy"
        return temperature_of_entropy(teacher_logits, self.entropy)


_BISECTIONS = 20  # the temperature is then right to 2^-20 of a factor of 10,000
_LOW, _HIGH = 0.01, 100.0


def temperature_of_entropy(logits: Tensor, share: float) -> Tensor:
    """T in [0.01, 100] with H(softmax(z / T)) = share * log C, by bisection of log T.

    (P, C) -> (P,). Entropy grows with T. Where none in the range reaches it (equal logits are at
    log C at any T) the nearer end is given. Classes at -inf count in C, not in the entropy.
    """
    logits = at_least_fp32(logits.detach())
    wanted = share * torch.tensor(float(logits.shape[-1])).log()
    low = torch.full(logits.shape[:-1], _LOW, device=logits.device).log()
    high = torch.full_like(low, _HIGH).log()
    shifted = logits - logits.amax(-1, keepdim=True)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        probs = (shifted / middle.exp().unsqueeze(-1)).softmax(-1)
        too_soft = torch.special.entr(probs).sum(-1) > wanted
        high = torch.where(too_soft, middle, high)
        low = torch.where(too_soft, low, middle)
    return ((low + high) / 2).exp()


def temperature_of(spec: TemperatureSpec, chosen: float | None = None) -> Temperature:
    """`chosen` is what was found for 'auto'. Raises RecipeError where it was not looked for."""
    if spec.fixed is not None:
        return Fixed(spec.fixed)
    if spec.entropy is not None:
        return PerExample(spec.entropy)
    if spec.start is not None and spec.end is not None:
        return Schedule(spec.start, spec.end)
    if chosen is None:
        raise RecipeError("recipe.distill.temperature", "'auto', and none was chosen")
    return Fixed(chosen)
