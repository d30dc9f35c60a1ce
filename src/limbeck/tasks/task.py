"""What the pipeline asks of a task, and where each kind of task lives.

A kind is a module with three functions of these names: `prepare` reads, checks and splits the data
into a folder; `open_task` serves such a folder; `outline` says what `plan` needs before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from limbeck.recipe import Recipe
from limbeck.types import Batch, Input

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

SPLITS = ("train", "validation", "test")
_KINDS = {"text-classification": "limbeck.tasks.text_classification"}


class Rows(Protocol):
    """One split, or some rows of it."""

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64, stable across epochs and runs: the key into a signal store."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64: rows of like length are batched together where order is free."""
        ...

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> Batch: ...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, in order."""
        ...

    def sample(self, n: int | None, *, seed: int) -> Self:
        """n rows drawn at random, in file order; all of them where n is None or too large."""
        ...


class Task(Protocol):
    """A kind of task with one run's labels and, once they are prepared, its rows."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    def rows(self, split: str) -> Rows: ...

    def read_config(self, folder: Path, *, where: str) -> PretrainedConfig:
        """The model's config with this task's labels. Raises SourceError, RecipeError for a model
        that does not serve the task."""
        ...

    def own_labels(self, folder: Path, *, where: str) -> tuple[str, ...] | None:
        """Those of the folder's own head, or None if it has none."""
        ...

    def build(self, config: PretrainedConfig) -> nn.Module:
        """The architecture with fresh weights."""
        ...

    def load(self, folder: Path, *, where: str) -> PreTrainedModel:
        """The folder's model with a head for the labels; a head that it lacks starts random."""
        ...

    def save(self, model: PreTrainedModel, origin: Path, folder: Path) -> None:
        """A plain Hugging Face folder, with the tokenizer or the like of the folder `origin`."""
        ...

    @property
    def input_fields(self) -> tuple[str, ...]:
        """Fields of a config that the data decide: another model of the task has the same."""
        ...

    def inputs(self, config: PretrainedConfig) -> tuple[Input, ...]:
        """What the exported file takes."""
        ...

    def preprocessing(self, model: Path) -> Mapping[str, Any]:
        """Fingerprints of all that lies between a row and the model's inputs."""
        ...

    def example(self) -> str:
        """The first training row in words, for the log."""
        ...


def open_task(recipe: Recipe, folder: Path) -> Task:
    """The task that `prepare` filled the folder for."""
    task: Task = _kind(recipe).open_task(recipe, folder)
    return task


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:
    """Read, check and split the data; write `folder` for `open_task`, with a `data.json`.

    Raises DataError, SourceError.
    """
    _kind(recipe).prepare(recipe, train, test, model, folder)


def outline(recipe: Recipe, train: Path) -> tuple[Task, int]:
    """A task without rows yet, and how many rows the file has."""
    found: tuple[Task, int] = _kind(recipe).outline(recipe, train)
    return found


def _kind(recipe: Recipe) -> Any:
    return importlib.import_module(_KINDS[recipe.task.kind])


def order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation that depends on seed and epoch alone: a resume needs no state."""
    return np.random.default_rng((seed, epoch)).permutation(n)
