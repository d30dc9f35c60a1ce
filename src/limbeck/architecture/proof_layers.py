"""Proof of layers: a model with some of them dropped equals the model with the same ones skipped.

Some cannot go: the first may own a stride or lack a norm, and windows that shift in every second
layer let only the last ones go. Those are pinned, as few as will do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.architecture.axes import Axis
from limbeck.architecture.loaded import TOLERANCE, Loaded, Refused, difference
from limbeck.types import Shape


def skipping(axis: Axis, bench: Loaded) -> tuple[tuple[int, ...], str]:
    """(layers that have to stay, what was shown). Raises Refused where all have to."""
    if axis.size < 2:
        raise Refused("one layer only: nothing to drop")
    every = range(axis.size)
    errors = {i: _error(axis, bench, {i}) for i in every}
    free = [i for i in every if not isinstance(errors[i], str)]
    chosen: list[set[int]] = []
    pinned = tuple(i for i in every if i not in free)
    most = free if pinned else free[1:]  # one has to stay
    some = torch.randperm(len(free), generator=bench.random)[: len(free) // 2].tolist()
    chosen = [set(most), {free[i] for i in some}]
    several = {frozenset(drop): _error(axis, bench, drop) for drop in chosen if len(drop) > 1}
    together = not any(isinstance(error, str) for error in several.values())
    tail = 0 if together else _tail(axis, bench)
    if not together:  # each one alone, but not any together: from the end, then
        pinned = tuple(every)[: axis.size - tail]
    if len(pinned) == axis.size:
        reasons = [e for e in (*errors.values(), *several.values()) if isinstance(e, str)]
        raise Refused(reasons[0])
    seen = [e for e in (*errors.values(), *several.values()) if not isinstance(e, str)]
    said = f"dropped equals skipped to {max(seen):.0e}"
    if tail:
        return pinned, f"{said}, from the end only, {tail} of {axis.size}"
    if pinned:
        why = next(e for e in errors.values() if isinstance(e, str))
        return pinned, f"{said}, but for {', '.join(map(str, pinned))}: {why}"
    return (), said


def _tail(axis: Axis, bench: Loaded) -> int:
    """How many layers can go from the end."""
    dropped: set[int] = set()
    for last in reversed(range(1, axis.size)):
        if isinstance(_error(axis, bench, {*dropped, last}), str):
            break
        dropped.add(last)
    return len(dropped)


def _error(axis: Axis, bench: Loaded, dropped: Collection[int]) -> float | str:
    """The difference, or the sentence that says why these cannot go."""
    kept = tuple(i for i in range(axis.size) if i not in dropped)
    which = ", ".join(map(str, sorted(dropped)))
    full = bench.shape({})
    shape = Shape({}, kept) if axis.name == "layers" else Shape({}, full.layers, {axis.name: kept})
    try:
        logits = bench.run(bench.student(shape, bench.state))
        with skipped(bench.model, *(axis.pattern.format(i) for i in dropped)):
            error = difference(logits, bench.run(bench.model))
    except Refused as refusal:
        return str(refusal)
    except (RuntimeError, ValueError, IndexError) as problem:  # sizes that no longer fit
        return f"without layer {which} the model does not run: {str(problem).splitlines()[0]}"
    if not error < TOLERANCE:
        return f"dropping layer {which} differs from skipping it by {error:.1e}"
    return error


@contextmanager
def skipped(model: nn.Module, *layers: str) -> Iterator[None]:
    """Let these layers (module names) hand their input through."""

    def through(_module: nn.Module, args: Any, kwargs: Any, output: object) -> object:
        return handed_through(args, kwargs, output)

    handles = [
        model.get_submodule(name).register_forward_hook(through, with_kwargs=True)
        for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def handed_through(args: Any, kwargs: Any, output: object) -> object:
    """What a layer gives that does nothing: its input, and all else that it gave."""
    given = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    hidden = next(value for value in given if isinstance(value, Tensor))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
