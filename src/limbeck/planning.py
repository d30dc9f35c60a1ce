"""`limbeck plan`: what every student and the stored signals will cost, before any training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck import stages
from limbeck.architecture.cut import any_layers
from limbeck.architecture.plan import CostModel, Sample, plan_student
from limbeck.architecture.space import Candidate, shape_of
from limbeck.cores import cores, on_each
from limbeck.fetching import fetch_teacher, remade
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe
from limbeck.recipe_file import rebase
from limbeck.runtime_worker import random_inputs
from limbeck.signals.choose import codec_settings, described, reason, store_bytes
from limbeck.signals.codecs import bytes_per_position, logit_codec
from limbeck.sources import fetch
from limbeck.tasks.task import Task, outline
from limbeck.types import Plan, SignalsCost

_BATCH = 32


def plan(recipe: Recipe, base: Path, progress: Progress | None) -> Plan:
    """Layers are only counted: which ones are kept is known when the teacher is tuned."""
    progress = progress or Silent()
    recipe = rebase(recipe, base)
    model_folder = fetch_teacher(recipe, partial(fetch, base=base)).path
    train = fetch(recipe.data.train, where="recipe.data.train", base=base, kind="data").path
    with tempfile.TemporaryDirectory(prefix="limbeck-") as aside:
        if remade(recipe, model_folder):
            progress.say("making the teacher ready")
            stages.make_model(Path(aside), recipe, model_folder, train)
            model_folder = Path(aside)
        return _plan(recipe, base, model_folder, train, progress)


def _plan(recipe: Recipe, base: Path, model_folder: Path, train: Path, progress: Progress) -> Plan:
    base_folder = None
    if recipe.base is not None and recipe.base.model is not None:
        where = "recipe.base.model"
        base_folder = fetch(recipe.base.model, where=where, base=base, kind="model").path
    live = recipe.of_another_tokenizer
    about = outline(recipe, train, base_folder if live and base_folder else model_folder)
    task = about.task
    config, axes = stages.untuned_axes(recipe, model_folder, base_folder, task)

    def measure(candidate: Candidate) -> Sample:
        progress.say(f"timing a shape with random weights: {dict(candidate.key)}")
        shape = shape_of(candidate, axes, spread)
        return stages.time_shape(recipe, task, config, axes, shape, base_folder or model_folder)

    def spread(count: int) -> tuple[int, ...]:
        return any_layers(axes, count)

    space = stages.space_of(task, config, axes, recipe.export.primary)
    costs = CostModel(measure)
    students = tuple(
        plan_student(
            s, f"recipe.students.{s.name}.budget", space, axes, spread, costs,
            watts=recipe.measure.watts,
        )
        for s in recipe.students if s.trained
    )
    if live:
        said = "none: the teacher reads the students' texts as it goes"
        return Plan(students=students, signals=(), signals_reason=said)
    rows = _training_rows(recipe, about.num_rows, recipe.task.num_views)
    sizes = {
        "vocab_size": about.num_classes, "rows": round(rows * about.rows_each),
        "positions": round(rows * about.positions_each),
    }  # fmt: skip
    settings = codec_settings(
        recipe.signals, temperature=recipe.distill.temperature.fixed, **sizes
    )
    if recipe.teacher.estimator is None:
        progress.say("timing the teacher")
    return Plan(
        students=students,
        signals=tuple(_signal_costs(recipe, task, config, settings, sizes)),
        signals_reason=reason(recipe.signals, settings, **sizes),
    )


def _training_rows(recipe: Recipe, num_rows: int, num_views: int) -> int:
    """What the splits will leave; groups that stay together may change it by some."""
    data = recipe.data
    left = num_rows * (1 - (data.test_fraction or 0)) * (1 - data.validation_fraction)
    rows = min(int(left), data.max_train_rows or num_rows)
    return rows * num_views


def _signal_costs(
    recipe: Recipe, task: Task, config: Any, chosen: Mapping[str, Any], sizes: Mapping[str, int]
) -> Sequence[SignalsCost]:
    """The chosen codec and the usual others; timed on random inputs."""
    asked = recipe.teacher.estimator is not None
    model = task.build(config).eval()
    size = _BATCH if task.labels else 4  # (B, T, V) logits are large
    drawn = random_inputs([asdict(one) for one in task.inputs(config)], size)
    batches = [{name: torch.from_numpy(array) for name, array in drawn.items()}] * cores()

    @torch.inference_mode()
    def forward(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(**inputs).logits
        return logits.flatten(0, -2)  # (P, V)

    list(on_each(forward, batches))  # warm
    start = time.perf_counter()
    logits = list(on_each(forward, [*batches, *batches]))
    teacher = (time.perf_counter() - start) / (len(logits) * size)  # s an example
    keys = torch.zeros(len(logits[0]), 2, dtype=torch.int64)
    others: list[dict[str, Any]] = [
        {"codec": "dense", "dtype": "fp16"}, {"codec": "topk", "k": 32},
        {"codec": "sampled", "n": 24, "temperature": recipe.distill.temperature.fixed or 1.0},
    ]  # fmt: skip
    found = []
    for settings in (chosen, *(o for o in others if described(o) != described(chosen))):
        codec = logit_codec(settings)
        start = time.perf_counter()
        codec.encode(logits[0], keys, 0)
        encode = (time.perf_counter() - start) / size / cores()
        found.append(
            SignalsCost(
                name=described(settings),
                chosen=settings is chosen,
                bytes_per_position=bytes_per_position(codec, sizes["vocab_size"]),
                size_bytes=store_bytes(settings, **sizes),
                seconds=None if asked else (teacher + encode) * sizes["rows"],
            )
        )
    return found
