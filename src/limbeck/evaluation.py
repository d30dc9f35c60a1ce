"""What was made is measured: the exported files, the baselines, and a student against its teacher.

Stages of the pipeline like those in `stages`; imported only when one really runs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from limbeck import measure, runtime
from limbeck._startup import prepare_torch
from limbeck.linear import linear_predictions
from limbeck.models import num_parameters
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe
from limbeck.run import write_json
from limbeck.tasks.task import Rows, open_task
from limbeck.tasks.text_classification import TextClassification

_PARITY_ROWS = 256

prepare_torch()


def artifact_path(hf: Path, onnx: Path, format: str) -> Path:
    return hf if format == "hf" else onnx / f"model-{format.removeprefix('onnx-')}.onnx"


def measure_artifacts(
    folder: Path, recipe: Recipe, hf: Path, onnx: Path, data: Path, name: str,
    progress: Progress, *, primary: str,
) -> None:  # fmt: skip
    """Quality, parity, latency, memory of every exported file; predictions of the primary one."""
    task = open_task(recipe, data)
    test = task.rows("test")
    few = test.sample(recipe.measure.secondary_rows, seed=recipe.seed)
    compared = few.sample(_PARITY_ROWS, seed=recipe.seed)
    config = AutoConfig.from_pretrained(hf)
    origin = None  # what the model that was exported says about `compared`
    found = []
    wall_ms = {}
    # the model's own folder first: the other files are held against it
    for format in sorted(recipe.export.formats, key=lambda format: format != "hf"):
        path = artifact_path(hf, onnx, format)
        rows = test if format == primary else few
        logits = _predict(path, format, rows, progress, f"{name} {format}")
        of_compared = logits[np.isin(rows.ids, compared.ids)]
        if format == primary:
            np.save(folder / "logits.npy", logits)
        timing = runtime.time_artifact(
            path, format, inputs=task.inputs(config),
            threads=recipe.measure.threads, runs=recipe.measure.latency_runs,
        )  # fmt: skip
        entry: dict[str, Any] = {
            "format": format,
            "size_bytes": size_bytes(path),
            "quality": _quality(logits, rows.labels),
            "latency_ms": {
                "median": timing.latency_ms,
                "p95": timing.latency_p95_ms,
                "n": timing.runs,
            },
            "throughput_per_s": timing.throughput_per_s,
            "peak_memory_bytes": timing.peak_memory_bytes,
            "device": timing.device,
            "threads": timing.threads,
        }
        wall_ms[format] = timing.latency_wall_ms
        if format == "hf":
            origin = of_compared
        else:
            if origin is None:
                origin = _predict(hf, "hf", compared, Silent(), "parity")
            entry["parity"] = asdict(measure.parity(origin, of_compared))
        found.append(entry)
    model = task.load(hf, where=str(hf))
    summary = {"params": num_parameters(model), "artifacts": found, "wall_ms": wall_ms}
    write_json(folder / "measurement.json", summary)


def quality_of(
    folder: Path, recipe: Recipe, path: Path, data: Path, name: str, progress: Progress
) -> None:
    """A baseline's quality, of the primary format on all test rows, as for the student itself."""
    test = open_task(recipe, data).rows("test")
    logits = _predict(path, recipe.export.primary, test, progress, name)
    write_json(folder / "quality.json", _quality(logits, test.labels))


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
    write_json(folder / "quality.json", _quality(scores, rows["test"].labels) | {"choice": choice})


def compare(folder: Path, recipe: Recipe, student: Path, teacher: Path, data: Path) -> None:
    """Retention, fidelity and capabilities of a student's primary file against the teacher's."""
    task = open_task(recipe, data)
    labels = task.rows("test").labels
    mine, theirs = (np.load(path / "logits.npy", allow_pickle=False) for path in (student, teacher))
    write_json(folder / "comparison.json", measure.compare(theirs, mine, labels, task.labels))


def _predict(path: Path, format: Any, rows: Rows, progress: Progress, title: str) -> np.ndarray:
    with progress.bar(title, len(rows), "examples") as bar:
        return runtime.predict(path, format, rows, progress=bar.advance)


def _quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return {"metric": "accuracy", **asdict(measure.accuracy(logits, labels, seed=0))}


def size_bytes(path: Path) -> int:
    """Of a file, or of the model files in a folder (not the training log)."""
    if path.is_file():
        return path.stat().st_size
    skip = {"training.jsonl", "stage.json", "begun.json"}
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name not in skip)
