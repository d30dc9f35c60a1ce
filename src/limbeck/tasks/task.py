"""What the pipeline asks of a task, and where each kind of task lives.

A kind is a module with three functions of these names: `prepare` reads, checks and splits the data
into a folder; `open_task` serves such a folder; `outline` says what `plan` needs before that. One
whose teachers have to be made ready first has `make_model` too (see `recipe_task`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np

from limbeck.recipe import Recipe
from limbeck.types import Batch, Input

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from limbeck.judging import Asked

SPLITS = ("train", "validation", "test")
_ENOUGH = 2048  # positions
_KINDS = {
    "text-classification": "limbeck.tasks.text_classification",
    "image-classification": "limbeck.tasks.image_classification",
    "language-modeling": "limbeck.tasks.language_recipe",
    "tabular": "limbeck.tasks.tabular",
    "time-series": "limbeck.tasks.time_series",
}
_OWN = "limbeck.tasks.examples"  # of kinds that others bring


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

    @property
    def num_views(self) -> int:
        """In how many ways each row is shown; 1 where it is always the same."""
        ...

    @property
    def num_positions(self) -> int:
        """That count, of all rows: labels, or tokens to be predicted."""
        ...

    @property
    def num_together(self) -> int:
        """How many rows a model is asked about at a time."""
        ...

    def __len__(self) -> int:
        """Rows, not views."""
        ...

    def batch(self, positions: Sequence[int]) -> Batch:
        """Row i as it is at i; its further views at i + N, i + 2 N, ... with ids of their own."""
        ...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, in order."""
        ...

    def sample(self, n: int | None, *, seed: int) -> Self:
        """n rows drawn at random, in file order; all of them where n is None or too large."""
        ...


class Judge(Protocol):
    """Says what exported files answer, and what that is worth."""

    def ask(self, path: Path, format: str, rows: Any, told: Callable[[int], object]) -> Asked:
        """`told` is given the number of rows done since it was last told."""
        ...

    def quality(self, asked: Asked) -> dict[str, Any]:
        """As report.json spells it."""
        ...

    def parity(self, origin: Asked, asked: Asked, rows: Any) -> dict[str, Any]:
        """How far a file is from the model that it was made of, on rows that both were asked."""
        ...

    def compare(
        self, teacher: Asked, student: Asked, told: Callable[[int], object]
    ) -> dict[str, Any]:
        """Retention, fidelity and capabilities, as report.json spells them."""
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

    def adapt(self, config: PretrainedConfig, *, where: str) -> None:
        """Set what of a new config the data decide. Raises RecipeError for one that does not take
        them."""
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
    def judge(self) -> Judge:
        """Who says what answers are worth."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether an int8 file's ranges of activations are fixed from training rows; if not, they
        are found anew at each call."""
        ...

    def overhead(self, format: str) -> tuple[int, int]:
        """Bytes of an exported file that are no weights: once, and for each layer. About."""
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


def make_model(recipe: Recipe, model: Path, train: Path, folder: Path) -> None:
    """The teacher as all that follows takes it, where the kind `remakes` it."""
    _kind(recipe).make_model(recipe, model, train, folder)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """Before any data are prepared."""

    task: Task
    """Without rows yet."""
    num_rows: int
    """In the file."""
    num_classes: int
    """What logits are over."""
    rows_each: float = 1.0
    """What becomes of a row of the file."""
    positions_each: float = 1.0


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:
    """What `plan` needs."""
    found: Outline = _kind(recipe).outline(recipe, train, model)
    return found


def _kind(recipe: Recipe) -> Any:
    return importlib.import_module(_KINDS.get(recipe.task.kind, _OWN))


@dataclass(frozen=True)
class AllViews:
    """Every view of every row as a row of its own."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows) * self.rows.num_views

    @property
    def num_positions(self) -> int:
        return self.rows.num_positions * self.rows.num_views

    def batch(self, positions: Sequence[int]) -> Batch:
        return self.rows.batch(positions)


_Rows = TypeVar("_Rows", bound=Rows)


def some(rows: _Rows, n: int, *, seed: int) -> _Rows:
    """n rows drawn at random; of rows with many positions only as many as have some thousands."""
    each = max(1.0, rows.num_positions / max(1, len(rows)))
    return rows.sample(min(n, math.ceil(_ENOUGH / each)), seed=seed)


@lru_cache(4)  # each step asks for its epoch's
def order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation that depends on seed and epoch alone: a resume needs no state. Read-only."""
    found = np.random.default_rng((seed, epoch)).permutation(n)
    found.flags.writeable = False
    return found
