"""Examples that a student answers otherwise than its teacher, as report.json shows them: images,
rows of a table, stretches of signals."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np

from limbeck import measure
from limbeck.tasks.arrays import ArrayClassification
from limbeck.tasks.arrays import Rows as ArrayRows
from limbeck.tasks.image_classification import Rows as ImageRows
from limbeck.tasks.images import png, reduced
from limbeck.tasks.task import Rows, Task

_PARTINGS = 8  # of each student
_ANSWERS = 3
_THUMBNAIL = 96  # pixels a side, at most
_COLUMNS = 6  # of a row, at most
_LONGEST = 40  # characters of a category
_POINTS, _CHANNELS = 96, 3  # of a series, at most


def partings(
    task: Task, rows: Rows, teacher: np.ndarray, student: np.ndarray
) -> list[dict[str, Any]]:
    """Examples whose top answers differ, those first on which the logits (N, C) are furthest apart
    (KL). None of what a report cannot show."""
    if not isinstance(rows, ImageRows | ArrayRows):
        return []
    apart = measure.kl(teacher, student)  # (N,)
    parted = np.flatnonzero(teacher.argmax(1) != student.argmax(1))
    chosen = parted[np.argsort(-apart[parted], kind="stable")][:_PARTINGS]
    found = []
    for i in chosen.tolist():
        shown = _image(rows, i) if isinstance(rows, ImageRows) else _arrays(task, rows, i)
        if not shown:
            return []
        found.append(
            {
                **shown, "label": task.labels[rows.labels[i]],
                "teacher": _top(teacher[i], task.labels), "student": _top(student[i], task.labels),
                "kl": float(apart[i]),
            }
        )  # fmt: skip
    return found


def _top(logits: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    probs = np.exp(logits.astype(np.float64) - logits.max())
    probs /= probs.sum()
    best = np.argsort(-probs, kind="stable")[:_ANSWERS].tolist()
    return [{"label": labels[i], "probability": float(probs[i])} for i in best]


def _image(rows: ImageRows, i: int) -> dict[str, Any]:
    encoded = b64encode(png(reduced(rows.pixels[i], _THUMBNAIL))).decode("ascii")
    return {"image": f"data:image/png;base64,{encoded}"}


def _arrays(task: Task, rows: ArrayRows, i: int) -> dict[str, Any]:
    assert isinstance(task, ArrayClassification)
    if "series" in rows.arrays:
        return {"series": _series(rows.arrays["series"][i])}
    if (cells := _cells(task, rows, i)) and rows.arrays.keys() <= {"numbers", "categories"}:
        return {"row": cells}
    return {}


def _series(values: np.ndarray) -> list[list[float]]:
    """(C, T) -> the first channels, of as many points as a small picture holds: means of blocks."""
    block = -(-values.shape[1] // _POINTS)
    kept = values[:_CHANNELS, : values.shape[1] // block * block].astype(np.float64)
    means = kept.reshape(len(kept), -1, block).mean(2)
    return [[float(f"{v:.5g}") for v in channel] for channel in means.tolist()]


def _cells(task: ArrayClassification, rows: ArrayRows, i: int) -> list[list[str]]:
    """Columns and what stands in them. Of many: categories, and the numbers that are furthest from
    the training rows' mean, in deviations."""
    found: list[tuple[float, int, list[str]]] = []  # how telling, place, column and value
    if "numbers" in rows.arrays:
        values = rows.arrays["numbers"][i]
        mean, std = (np.asarray(v) for v in task.scales["numbers"])
        far = np.abs(values - mean) / std
        names = _names(task, "numbers", len(values))
        found += [
            (float(far[j]), len(found) + j, [name, f"{values[j]:.4g}"])
            for j, name in enumerate(names)
        ]
    if "categories" in rows.arrays:
        known = [one.get("values", ()) for one in task.about.get("categories", ())]
        ids = rows.arrays["categories"][i].tolist()
        for j, name in enumerate(_names(task, "categories", len(ids))):
            value = _category(known[j] if j < len(known) else None, ids[j])
            found.append((np.inf, len(found), [name, value]))
    telling = sorted(found, key=lambda one: -one[0])[:_COLUMNS]
    return [cell for _, _, cell in sorted(telling, key=lambda one: one[1])]


def _names(task: ArrayClassification, array: str, count: int) -> list[str]:
    """Of an array's columns; a task of one's own names none."""
    named = [str(one["name"]) for one in task.about.get(array, ())]
    return named if len(named) == count else [f"{array}[{j}]" for j in range(count)]


def _category(values: Sequence[str] | None, index: int) -> str:
    if values is None:
        return str(index)
    if index == 0:
        return "(not known)"
    text = values[index - 1]
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
