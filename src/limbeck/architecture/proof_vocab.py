"""Proof of a vocabulary: tokens under other ids give the same outputs, and the first ids alone too.

Its rows are named by the inputs, so the ids move with them; special tokens stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from limbeck.architecture.axes import Axis, permuted
from limbeck.architecture.inputs import special_ids
from limbeck.architecture.loaded import TOLERANCE, Loaded, Refused, difference


def renaming(axis: Axis, bench: Loaded) -> str:
    """What was shown. Raises Refused."""
    first = 1 + max((v for v in special_ids(bench.config) if v < axis.size), default=0)
    if axis.size - first < 4:
        raise Refused("its special tokens stand at the end, and no student can do without them")
    order = torch.arange(axis.size)
    order[first:] = first + torch.randperm(axis.size - first, generator=bench.random)
    (group,) = axis.groups
    moved = permuted(bench.state, axis.groups, {group.name: order})
    renamed = _inputs(bench.inputs, lambda ids: torch.argsort(order)[ids])
    expected = _columns(bench.reference, axis.size, order)
    error = difference(bench.under(moved, renamed), expected)
    if not error < TOLERANCE:
        raise Refused(f"tokens under other ids change the outputs by {error:.1e}")
    wrong = difference(bench.under(moved), expected)
    if not wrong > TOLERANCE:
        raise Refused("the outputs do not depend on which token it is: nothing is shown")
    kept = first + (axis.size - first) // 2
    few = _inputs(bench.inputs, lambda ids: torch.where(ids < first, ids,
                                                        first + ids % (kept - first)))  # fmt: skip
    whole = _columns(bench.run(bench.model, few), axis.size, torch.arange(kept))
    student = bench.student(bench.shape({axis.name: kept}), bench.state)
    small = difference(bench.run(student, few), whole)
    if not small < TOLERANCE:
        raise Refused(f"with {kept} tokens the outputs differ by {small:.1e}")
    return f"renamed: outputs differ by {error:.0e}, otherwise by {wrong:.0e}; cut to {small:.0e}"


def _inputs(
    inputs: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {k: change(v) if k.endswith("input_ids") else v for k, v in inputs.items()}


def _columns(logits: Tensor, size: int, which: Tensor) -> Tensor:
    """Of logits over the vocabulary these columns; other logits as they are."""
    return logits[..., which] if logits.shape[-1] == size else logits
