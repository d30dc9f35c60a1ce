"""Settings of a recipe that say how models are measured.

`recipe` has the rest. No import of torch.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from limbeck.recipe_data import Source
from limbeck.recipe_teaching import Spec

PROMPT_TOKENS = 32  # of plain text, where the recipe does not say


class GenerateSpec(Spec):
    """language-modeling: teacher and students write to prompts of the test rows, the likeliest
    token each time, and the texts are held against what stands there (extra 'lm')."""

    rows: int = Field(100, ge=1)
    """Test documents, drawn at random by `seed`; all where there are fewer."""
    max_new_tokens: int = Field(64, ge=1)
    """Of a text, if it does not come to its end before."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Of plain text: so many of a document's first tokens are the prompt, at most half of it, and
    the next `max_new_tokens` the reference. Default: 32. Elsewhere the prompt is what stands before
    the (last) answer."""


class BenchmarkSpec(Spec):
    """language-modeling: public benchmarks on the `hf` folders of teacher and students, by lm-eval
    (extra 'benchmark')."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Tasks, groups or tags of lm-eval, `arc_easy` say, and those in `folder`."""
    limit: int | None = Field(None, ge=1)
    """Only so many of each task's examples, the first. Default: all, as published numbers are."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question. Default: as the task says."""
    folder: Source | None = None
    """Tasks of your own: lm-eval's YAML files, beside them their data (json, csv, parquet, text).
    No Python: files with `!function` are refused."""

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len({*tasks}) < len(tasks):
            raise ValueError("a task twice: each of them once")
        return tasks


class MeasureSpec(Spec):
    threads: int = Field(1, ge=1)
    """CPU threads for latency, throughput and memory."""
    watts: float | None = Field(None, gt=0)
    """What the device draws while it runs a model, for budgets of energy."""
    latency_runs: int = Field(100, ge=10)
    """Timed batch-1 calls."""
    secondary_rows: int | None = Field(None, ge=1)
    """Measure the quality of the formats that are not primary on only this many test rows (each
    quality states its n). Default: all."""
    generate: GenerateSpec | None = None
    """Also let the primary files write, and report exact match, ROUGE-L and chrF. Default: not."""
    benchmarks: BenchmarkSpec | None = None
    """Also run public benchmarks. Default: none."""

    @property
    def of_files(self) -> dict[str, Any]:
        """What the measurements of each exported file depend on."""
        return self.model_dump(mode="json", exclude={"generate", "benchmarks"})
