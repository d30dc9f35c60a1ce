"""Of report.json: public benchmarks."""

from __future__ import annotations

from pydantic import Field

from limbeck.recipe import Spec


class BenchmarkScore(Spec):
    """Of one model, as lm-eval gives it."""

    value: float | None
    """In the metric's own unit: `acc` is a fraction, `perplexity` is not."""
    stderr: float | None = None
    """Standard error, as lm-eval estimates it."""
    n: int = Field(ge=0)
    """Examples; of a group those of all its tasks."""


class Benchmark(Spec):
    """One metric of one task or group."""

    task: str
    """Its name in lm-eval."""
    version: str
    """The task's: other versions do not compare."""
    metric: str
    """`acc`, `acc_norm`, ..."""
    filter: str | None = None
    """How the answer was found in what was written, where there is a choice."""
    num_fewshot: int | None = None
    """Solved examples before each question."""
    higher_is_better: bool | None = None
    """Null where the task does not say."""
    scores: dict[str, BenchmarkScore]
    """By the model's name; `teacher`."""


class Benchmarks(Spec):
    """Teacher and students by their `hf` folders."""

    lm_eval: str
    """Its version."""
    limit: int | None = None
    """Only so many of each task's examples, the first; null: all."""
    results: tuple[Benchmark, ...]
    """In lm-eval's order."""
