"""The loaded model as a bench: run it under other weights, or a student of it, and compare."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group, permuted
from limbeck.architecture.cut import build_student, full_shape
from limbeck.architecture.fields import Build
from limbeck.architecture.twins import Doubles, doubled, logits_of
from limbeck.errors import AxisError
from limbeck.types import Shape

TOLERANCE = 1e-4  # relative to the largest logit, fp32; rounding is near 1e-6
_SEEN = 1e-9  # the same in fp64, for effects that fp32 would hide in its rounding


class Refused(Exception):
    """The sentence that says why."""


class Loaded:
    """The loaded model, run under other weights without being touched."""

    limit = TOLERANCE  # differences below it are rounding

    def __init__(
        self, model: nn.Module, config: PretrainedConfig, build: Build, axes: Sequence[Axis],
        inputs: Mapping[str, Tensor], seed: int,
    ) -> None:  # fmt: skip
        self.model, self.config, self.build, self.axes = model, config, build, axes
        self.inputs = dict(inputs)
        self.random = torch.Generator().manual_seed(seed)
        self.state = {k: v.detach() for k, v in model.named_parameters()}  # tied ones once
        self.state |= dict(model.named_buffers())
        self.held = model.state_dict().keys()
        left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()  # computed anew on load
        self.saved = {
            name for name in model.state_dict()
            if not any(re.search(pattern, name) for pattern in left_out)
        }  # fmt: skip
        self.reference = self.run(model)

    @cached_property
    def wide(self) -> Loaded:
        """The same in double precision, for effects that single precision hides in its rounding."""
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in self.inputs.items()}
        model = doubled(copy.deepcopy(self.model))
        return _Wide(model, self.config, self.build, self.axes, inputs, self.random.initial_seed())

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        return logits_of(model(**(inputs or self.inputs)))

    def under(
        self, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits under other weights; entries not given stay the model's own."""
        return logits_of(functional_call(self.model, dict(state), (), dict(inputs or self.inputs)))

    def moved(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        orders = {group.name: self.order(group.units) for group in groups}
        return permuted(self.state, groups, orders)

    def order(self, units: int) -> Tensor:
        """At random, but never the order they have."""
        order = torch.randperm(units, generator=self.random)
        return order.roll(1) if torch.equal(order, torch.arange(units)) else order

    def change(self, group: Group, order: Tensor) -> float:
        """How much this permutation changes the outputs; 0 if not beyond rounding."""
        change = difference(
            self.under(permuted(self.state, [group], {group.name: order})), self.reference
        )
        return change if change > self.limit else 0.0

    def student(self, shape: Shape, state: Mapping[str, Tensor]) -> nn.Module:
        saved = {name: tensor for name, tensor in state.items() if name in self.held}
        try:
            return build_student(self.config, self.build, self.axes, shape, saved)
        except AxisError as error:
            raise Refused(f"the smaller model does not take its cut weights: {error}") from error
        except Exception as error:  # a config may refuse a value in any way it likes
            raise Refused(f"no smaller model can be built: {error}") from error

    def shape(self, sizes: Mapping[str, int]) -> Shape:
        """All layers, and these sizes."""
        return Shape(sizes, full_shape(self.axes).layers)


class _Wide(Loaded):
    limit = _SEEN

    @property
    def wide(self) -> Loaded:
        return self

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        with Doubles():
            return super().run(model, inputs)

    def under(
        self, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        with Doubles():
            return super().under(state, inputs)

    def student(self, shape: Shape, state: Mapping[str, Tensor]) -> nn.Module:
        return doubled(super().student(shape, state))  # its weights are single ones: none is lost


def difference(logits: Tensor, reference: Tensor) -> float:
    """Largest, relative to the largest logit; infinite where a value is not finite."""
    if logits.shape != reference.shape or not logits.isfinite().all():
        return float("inf")
    scale = reference.abs().max().clamp_min(1e-6)
    return ((logits - reference).abs().max() / scale).item()
