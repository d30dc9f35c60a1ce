"""What a classifier's answers are worth: the `Judge` of tasks with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck import measure, runtime

if TYPE_CHECKING:
    from limbeck.tasks.task import Rows

Said = Mapping[str, np.ndarray]
Told = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An exported file, and what it said about some rows."""

    path: Path
    format: str
    rows: Rows
    said: Said


@dataclass(frozen=True)
class OfClassifier:
    labels: tuple[str, ...]

    def ask(self, path: Path, format: Any, rows: Rows, told: Told) -> Asked:
        logits = runtime.predict(path, format, rows, progress=told)
        return Asked(path=path, format=format, rows=rows, said={"logits": logits})

    def quality(self, asked: Asked) -> dict[str, Any]:
        found = measure.accuracy(asked.said["logits"], asked.rows.labels, seed=0)
        return {"metric": "accuracy", **asdict(found)}

    def parity(self, origin: Asked, asked: Asked, rows: Rows) -> dict[str, Any]:
        """On these rows, which both were asked about."""
        one, other = (a.said["logits"][np.isin(a.rows.ids, rows.ids)] for a in (origin, asked))
        return asdict(measure.parity(one, other))

    def compare(self, teacher: Asked, student: Asked, told: Told) -> dict[str, Any]:  # noqa: ARG002
        return measure.compare(
            teacher.said["logits"], student.said["logits"], teacher.rows.labels, self.labels
        )
