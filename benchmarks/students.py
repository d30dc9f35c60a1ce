"""For benchmarks that hold students of a finished run against the same without a teacher."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import teaching
from limbeck.device import compute_device
from limbeck.progress import Silent
from limbeck.recipe import Recipe
from limbeck.stages import places_of, read_plan
from limbeck.step import Training
from limbeck.tasks.task import open_task
from limbeck.train import train

T_OF = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 95 %, by number of seeds


@dataclass
class Kept:
    """Accuracies by name of the training, one JSON line each: what is there is not made again."""

    path: Path | None

    def __post_init__(self) -> None:
        self.found: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self.found |= json.loads(line)

    def add(self, name: str, accuracy: float) -> None:
        self.found[name] = accuracy
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: accuracy}) + "\n")


def accuracy_on_test(run: Path, recipe: Recipe, model: nn.Module) -> float:
    """Of the fp32 model, on all test rows; a fraction."""
    rows = open_task(recipe, run / "data").rows("test")
    _, right = teaching.loss_and_accuracy(rows, model.eval().to(compute_device()))
    return right


def trained(
    run: Path, recipe: Recipe, name: str, seed: int, *, hard: bool, start: teaching.Start,
    features: Path | None = None,
) -> tuple[float, float]:  # fmt: skip
    """A student of the run trained once more by this recipe: its accuracy, and CPU seconds.

    `seed` draws the order of the rows, and random weights; views stay those that were stored.
    """
    shape, places = read_plan(run / "students" / name / "plan").shape, places_of(run)
    student, task = recipe.student(name), open_task(recipe, run / "data")
    model = teaching._student(
        recipe.model_copy(update={"seed": seed}), shape, places, task, start
    )  # fmt: skip
    by = teaching.hard_labels(recipe) if hard else teaching.lesson(
        recipe, student, places, None, features
    )  # fmt: skip
    training = Training(
        rows=task.rows("train"), spec=recipe.training_of(student), seed=seed, title=name, **by
    )
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="limbeck-") as at:
        train(model, training, Path(at), Silent())
    seconds = time.process_time() - began
    return accuracy_on_test(run, recipe, model), seconds


def over(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean difference in points of runs with the same seeds, and half of its 95 % interval."""
    points = [100 * (a - b) for a, b in zip(ours, base, strict=True)]
    if len(points) < 2:
        return points[0], math.nan
    wide = T_OF[len(points)] * statistics.stdev(points) / math.sqrt(len(points))
    return statistics.mean(points), wide


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Prints accuracies by setting and variant, the first variant being the base of the others."""
    out = []
    print(f"\n{'':24} {'variant':20} {'accuracy':>9} {'over hard labels':>24}")
    for setting, variants in found.items():
        base = next(iter(variants.values()))
        for variant, values in variants.items():
            mean, (gain, wide) = 100 * statistics.mean(values), over(values, base)
            said = f"{gain:+.2f} ({gain - wide:+.2f} to {gain + wide:+.2f})"
            print(f"{setting:24} {variant:20} {mean:8.2f} % {said:>24}")
            out.append({
                "measure": "accuracy", "setting": f"{setting}, {variant}", "ours": mean,
                "other": 100 * statistics.mean(base), "other_name": "hard labels",
                "ratio": mean / 100 / statistics.mean(base), "unit": "%", "n": len(values),
            })  # fmt: skip
    return out
