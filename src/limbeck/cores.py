"""Work on a CPU's cores: each thread has a share of the examples and computes on one core.

Threads inside each small op wait for each other hundreds of times a step. Where they spin, a busy
neighbour makes them wait for whole time slices; where they sleep (`_startup`), an idle machine
loses time. A share for each core waits once a step: `benchmarks/startup.py` has the figures. So
torch has one thread of its own (`_startup.prepare_torch`). Results do not depend on how many shares
are worked on at a time, only on the cutting.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_LEAST = 8  # examples in a share: with fewer the matrices are too narrow to be multiplied fast,
# unless an example is a row of tokens that are all to be predicted


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def shares(
    num_examples: int, most: int | None = None, *, on_cores: bool = True, least: int = _LEAST
) -> list[range]:
    """The examples of a batch in contiguous shares of like size: one for each core, as long as
    they have `least` examples or 8, and none more than `most`."""
    count = max(1, min(cores(), num_examples // min(least, _LEAST))) if on_cores else 1
    if most is not None:
        count = max(count, -(-num_examples // most))
    ends = [num_examples * i // count for i in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def evenly(sizes: Sequence[int]) -> list[list[int]]:
    """Positions of the sizes in a group for each core, whose sums are alike; some may be empty."""
    groups: list[list[int]] = [[] for _ in range(cores())]
    sums = [0] * len(groups)
    for at in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = sums.index(min(sums))
        groups[least].append(at)
        sums[least] += sizes[at]
    return groups


def on_each(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`function` of every item, as many at a time as there are cores; results in order.

    Items are taken from their iterator a little ahead of the results. An exception is raised here
    and ends the rest.
    """
    waiting: list = []
    pool = _pool()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > cores():
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        for future in waiting:
            future.cancel()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="core", initializer=_compute_alone)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has the pool, not its threads


def _compute_alone() -> None:
    """torch keeps a number of threads for each thread; one that began earlier keeps its own."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
