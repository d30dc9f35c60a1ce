"""What an image costs in training, by single steps, and what a whole recipe of images would take.

    python benchmarks/image_steps.py fashion [--rounds 5] [--json FILE]

Each model that the recipe trains, with random weights and pixels: forward and backward of one
micro-batch, and the teacher's forward alone, in CPU seconds of the one thread that does it (the
least of the rounds; a busy neighbour makes a step dearer by up to a half, as caches are shared).
From these the trainings and the teacher's pass over all views; not counted: reading, the optimizer,
exports and measurements, which are small beside them. Shapes are those that `limbeck plan` gives.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import stages
from limbeck._startup import prepare_torch
from limbeck.architecture.cut import student_config
from limbeck.models import num_parameters
from limbeck.pipeline import fetch_teacher
from limbeck.planning import plan
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.recipe_task import ImageTask
from limbeck.sources import fetch
from limbeck.statistics import GHOST, forget
from limbeck.tasks.image_classification import ImageClassification
from limbeck.tasks.image_files import read_images


def seconds(model: nn.Module, task: ImageClassification, batch: int, rounds: int) -> Any:
    """(forward and backward, forward) of an image, CPU seconds."""
    size, channels = task.spec.size, task.spec.num_channels
    pixels = torch.rand(batch, size, size, channels).permute(0, 3, 1, 2)  # channels last
    labels = torch.arange(batch) % len(task.labels)
    forget(model)
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds + 1):
        for learns in (True, False):
            start = time.thread_time()
            model.train(learns)
            with torch.set_grad_enabled(learns):
                logits = model(pixel_values=pixels).logits
                if learns:
                    loss = nn.functional.cross_entropy(logits, labels)
                    torch.autograd.grad(loss, [*model.parameters()])
            found[learns].append((time.thread_time() - start) / batch)
    return tuple(min(times[1:]) for times in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a built-in recipe's name, or a file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    prepare_torch()
    recipe, base = load_recipe(options.recipe)
    assert isinstance(recipe.task, ImageTask) and recipe.base is None
    folder = fetch_teacher(recipe, partial(fetch, base=base)).path
    train = fetch(recipe.data.train, where="recipe.data.train", base=base, kind="data").path
    table = read_images(train, recipe.data, part="train")
    task = ImageClassification(tuple(sorted({*table.labels})), recipe.task, recipe.seed)
    rows = len(table.labels) * (1 - recipe.data.validation_fraction)
    rows *= 1 - (recipe.data.test_fraction or 0)
    rows = min(rows, recipe.data.max_train_rows or rows)
    config, axes = stages.untuned_axes(recipe, folder, None, task)
    planned = plan(recipe, base, Silent()).students
    configs = {s.name: student_config(config, axes, s.shape) for s in planned}
    smallest = min(planned, key=lambda s: s.cost.params).name
    which = {"none": (), "smallest": (smallest,), "all": tuple(configs)}[recipe.evidence.baselines]
    rounds = 1 if options.quick else options.rounds
    out, total = [], 0.0
    print(f"{'':12} {'parameters':>10} {'ms/image':>9} {'forward':>8} {'passes':>7} {'CPU s':>7}")
    for name, one in [("teacher", config), *configs.items()]:
        spec = recipe.teacher.tune if name == "teacher" else recipe.training_of(
            recipe.student(name)
        )  # fmt: skip
        model = task.build(one)
        batch = spec.micro_batch or GHOST if spec else GHOST
        step, forward = seconds(model, task, batch, rounds)
        passes = (spec.epochs if spec else 0) * (3 if name in which else 1)
        cost = passes * step * rows
        print(f"{name:12} {num_parameters(model):10,} {1e3 * step:9.3f} {1e3 * forward:8.3f} "
              f"{passes:7.1f} {cost:7.0f}")  # fmt: skip
        total += cost
        if name == "teacher":
            pass_ = forward * rows * recipe.task.num_views
            print(f"{'its signals':12} {'':29} {recipe.task.num_views:7} {pass_:7.0f}")
            total, first = total + pass_, step
        out.append({
            "measure": "forward and backward of an image", "setting": name, "ours": 1e3 * step,
            "other": 1e3 * first, "other_name": "teacher", "ratio": step / first, "unit": "ms",
            "n": rounds,
        })  # fmt: skip
    print(f"{'sum':12} {'':37} {total:7.0f}: {total / 120:.1f} minutes of two cores; a pass is "
          f"{rows:,.0f} images; baselines of {', '.join(which) or 'none'} included")
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
