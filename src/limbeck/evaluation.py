"""What was made is measured: the exported files, the baselines, and a student against its teacher.

Stages of the pipeline like those in `stages`; imported only when one really runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from limbeck import measure, runtime
from limbeck._startup import prepare_torch
from limbeck.findings import artifact_path
from limbeck.judging import Asked
from limbeck.linear import linear_predictions
from limbeck.measure_language import document_bytes
from limbeck.models import load_tokenizer, num_parameters
from limbeck.partings import partings
from limbeck.progress import Progress
from limbeck.recipe import Recipe
from limbeck.run import write_json
from limbeck.tasks.estimators import is_estimator
from limbeck.tasks.task import Rows, Task, open_task
from limbeck.tasks.text_classification import TextClassification

_PARITY_ROWS = 256
_SUMS = ("documents", "nll")  # of a language model's answers
_Said = tuple[Path, str, Path]  # a file, its format, where its answers lie

prepare_torch()


def measure_artifacts(
    folder: Path, recipe: Recipe, hf: Path, files: Path, data: Path, name: str,
    progress: Progress, *, primary: str, formats: Sequence[str],
) -> None:  # fmt: skip
    """Quality, parity, latency, memory of every exported file; answers of the primary one."""
    task = open_task(recipe, data)
    test = task.rows("test")
    few = test.sample(recipe.measure.secondary_rows, seed=recipe.seed)
    compared = few.sample(_PARITY_ROWS, seed=recipe.seed)
    known = not is_estimator(hf)
    config = task.read_config(hf, where=str(hf)) if known else None
    origin: Asked | None = None  # the model that was exported
    found = []
    wall_ms = {}
    # the model's own folder first: the other files are held against it
    for format in sorted(formats, key=lambda format: format != "hf"):
        path = artifact_path(hf, files, format)
        asked = _ask(task, path, format, test if format == primary else few, progress,
                     f"{name} {format}")  # fmt: skip
        if format == primary:
            for what, array in asked.said.items():
                np.save(folder / f"{what}.npy", array)
        timing = runtime.time_file(recipe, task, config, hf, files, format)
        entry: dict[str, Any] = {
            "format": format,
            "size_bytes": size_bytes(path),
            "quality": task.judge.quality(asked),
            "latency_ms": {
                "median": timing.latency_ms,
                "p95": timing.latency_p95_ms,
                "n": timing.runs,
            },
            "throughput_per_s": timing.throughput_per_s,
            "tokens_per_s": timing.tokens_per_s,
            "peak_memory_bytes": timing.peak_memory_bytes,
            "device": timing.device,
            "threads": timing.threads,
            "runtime": timing.runtime,
        }
        wall_ms[format] = timing.latency_wall_ms
        if origin is None:
            origin = asked
        else:
            entry["parity"] = task.judge.parity(origin, asked, compared)
        found.append(entry)
    params = num_parameters(task.load(hf, where=str(hf))) if known else None
    summary = {"params": params, "artifacts": found, "wall_ms": wall_ms}
    write_json(folder / "measurement.json", summary)


def quality_of(
    folder: Path, recipe: Recipe, path: Path, data: Path, teacher: _Said, name: str,
    progress: Progress,
) -> None:  # fmt: skip
    """A baseline's quality, of the primary format on all test rows, as for the student itself; and
    how far from the teacher it is."""
    task = open_task(recipe, data)
    rows = task.rows("test")
    asked = _ask(task, path, recipe.export.primary, rows, progress, name)
    held = task.judge.compare(_answered(teacher, rows), asked, lambda _: None)
    quality = {**task.judge.quality(asked), "mean_kl": held["fidelity"]["mean_kl"]}
    write_json(folder / "quality.json", quality)


def linear(folder: Path, recipe: Recipe, data: Path, progress: Progress) -> None:
    """A linear model on TF-IDF of the same tokens."""
    task = open_task(recipe, data)
    assert isinstance(task, TextClassification)
    rows = {split: task.rows(split) for split in ("train", "validation", "test")}
    scores, choice = linear_predictions(
        (rows["train"].texts, rows["train"].labels),
        (rows["validation"].texts, rows["validation"].labels),
        rows["test"].texts,
        len(task.labels),
        progress,
    )
    found = measure.accuracy(scores, rows["test"].labels, seed=0)
    quality = {"metric": "accuracy", **asdict(found)}
    write_json(folder / "quality.json", quality | {"choice": choice})


def compare(
    folder: Path, recipe: Recipe, student: _Said, teacher: _Said, data: Path, progress: Progress
) -> None:
    """Retention, fidelity and capabilities of a student's primary file against the teacher's."""
    task = open_task(recipe, data)
    rows = task.rows("test")
    mine, theirs = _answered(student, rows), _answered(teacher, rows)
    with progress.bar("compare", len(rows), "examples") as bar:
        found = task.judge.compare(theirs, mine, bar.advance)
    if task.labels:
        found["partings"] = partings(task, rows, theirs.said["logits"], mine.said["logits"])
    write_json(folder / "comparison.json", found)


def _answered(said: _Said, rows: Rows) -> Asked:
    """What a file said when it was measured."""
    path, format, at = said
    arrays = {f.stem: np.load(f, allow_pickle=False) for f in sorted(at.glob("*.npy"))}
    return Asked(path=path, format=format, rows=rows, said=arrays)


def compare_texts(
    folder: Path, recipe: Recipe, student: _Said, teacher: _Said, data: Path, progress: Progress,
    *, teachers: Path,
) -> None:  # fmt: skip
    """Of two language models with different tokenizers: bits for each byte of the test texts that
    both read to their end. Shares of right tokens do not compare.

    `data` are in the student's tokens, `teachers` in the teacher's.
    """
    sides = []
    for (path, format, at), rows_at in ((student, data), (teacher, teachers)):
        hf = path if format == "hf" else path.parent.parent / "hf"
        rows: Any = open_task(recipe, rows_at).rows("test")
        num_bytes = document_bytes(rows, load_tokenizer(hf, where=str(hf)))
        documents, nll = (np.load(at / f"{n}.npy", allow_pickle=False) for n in _SUMS)
        sides.append((num_bytes, dict(zip(documents.tolist(), nll.tolist(), strict=True))))
    (mine, _), (theirs, _) = sides
    both = [d for d, (whole, _) in mine.items() if whole and theirs.get(d, (0, 0))[0] == whole]
    bits = [
        sum(nll[d] for d in both) / max(1, sum(num_bytes[d][1] for d in both)) / math.log(2)
        for num_bytes, nll in sides
    ]
    progress.say(f"{len(both)} texts in two tokenizers: {bits[0]:.3f} bits a byte, "
                 f"the teacher {bits[1]:.3f}")  # fmt: skip
    found = {"student": bits[0], "teacher": bits[1], "n": len(both)}
    nothing: dict[str, Any] = {"retention": None, "fidelity": None, "capabilities": {}}
    write_json(folder / "comparison.json", nothing | {"bits_per_byte": found})


def _ask(
    task: Task, path: Path, format: str, rows: Rows, progress: Progress, title: str
) -> Asked:
    with progress.bar(title, len(rows), "examples") as bar:
        return task.judge.ask(path, format, rows, bar.advance)


def size_bytes(path: Path) -> int:
    """Of a file, or of the model files in a folder (not the training log)."""
    if path.is_file():
        return path.stat().st_size
    skip = {"training.jsonl", "stage.json", "begun.json"}
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name not in skip)
