"""What each stage of the pipeline does in its folder. Imported only when a stage really runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from limbeck import precision
from limbeck._startup import prepare_torch
from limbeck.architecture.axes import Axis, axes_to_json, find_axis
from limbeck.architecture.cut import (
    all_layers,
    any_layers,
    keep_layers,
    shape_parameters,
    student_config,
)
from limbeck.architecture.importance import described, importance, load_importance
from limbeck.architecture.inputs import example_inputs, shortened
from limbeck.architecture.plan import CostModel, Sample, plan_student, within_budget
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.architecture.space import Candidate, candidates, shape_of
from limbeck.device import products_in
from limbeck.errors import RecipeError
from limbeck.export.files import write_files
from limbeck.models import make_config, num_parameters
from limbeck.objective import Objective
from limbeck.progress import Progress
from limbeck.recipe import Recipe, StudentSpec
from limbeck.recipe_file import load_recipe
from limbeck.run import read_json, write_json, write_text
from limbeck.runtime import time_file
from limbeck.runtime_worker import random_inputs
from limbeck.signals import capture as signal_capture
from limbeck.signals.choose import reason, sizes_of
from limbeck.signals.codecs import logit_codec
from limbeck.signals.store import open_store
from limbeck.signals.verify import Verification, verify
from limbeck.step import Training
from limbeck.tasks import task as tasks
from limbeck.tasks.arrays import ArrayClassification
from limbeck.tasks.estimators import make_estimator
from limbeck.tasks.task import AllViews, Task, open_task, some
from limbeck.teachers.stored import NoTeacher
from limbeck.teaching import live_teacher, read_axes, signal_origins, validator
from limbeck.train import train
from limbeck.types import Cost, Places, Shape, StudentPlan

_CALIBRATION_ROWS = 512  # training rows that an int8 file's ranges are fixed on
_IMPORTANCE_ROWS = 192  # training rows that units and layers are scored on

prepare_torch()


def make_model(folder: Path, recipe: Recipe, model: Path, train: Path) -> None:
    """The teacher as all that follows takes it."""
    tasks.make_model(recipe, model, train, folder)


def prepare_own(
    folder: Path, recipe: Recipe, train: Path, test: Path | None, base: Path, teachers: Path
) -> None:
    """The data in the tokens of what students are cut from; what is to be told of the teacher's
    stands with it."""
    tasks.prepare(recipe, train, test, base, folder)
    about = read_json(folder / "data.json")
    told = [*read_json(teachers / "data.json")["warnings"], *about["warnings"]]
    write_json(folder / "data.json", about | {"warnings": [*dict.fromkeys(told)]})


def tune(folder: Path, recipe: Recipe, model: Path, data: Path, progress: Progress) -> None:
    """The teacher, taught the task if the recipe says so, as a plain Hugging Face folder."""
    task = open_task(recipe, data)
    if (estimator := recipe.teacher.estimator) is not None:
        assert isinstance(task, ArrayClassification)
        make_estimator(folder, estimator, model, task, recipe.seed, progress)
        return
    torch.manual_seed(recipe.seed)  # the new head
    if recipe.teacher.tune is None:
        _require_head(model, task)
    if recipe.teacher.config is None:
        classifier = task.load(model, where="recipe.teacher.model")
    else:
        config = task.read_config(model, where="recipe.teacher.config")
        classifier = cast(PreTrainedModel, task.build(config))
    if recipe.teacher.tune is not None:
        training = Training(
            rows=task.rows("train"),
            teacher=NoTeacher(),
            objective=Objective(smoothing=recipe.teacher.tune.label_smoothing),
            spec=recipe.teacher.tune,
            seed=recipe.seed,
            title="teacher",
            validate=validator(task, recipe.seed),
        )
        progress.say(f"the first training example, {task.example()}")
        train(classifier, training, folder, progress)
    task.save(classifier, model, folder)


def measure_precisions(folder: Path) -> None:
    found = precision.milliseconds()
    write_json(
        folder / "precision.json", {"milliseconds": found, "faster": precision.faster(found)}
    )


def _require_head(model: Path, task: Task) -> None:
    labels = task.labels
    if not labels:
        return  # what is predicted are tokens
    found = task.own_labels(model, where="recipe.teacher.model")
    if found is None or list(found) != list(labels):
        has = f"labels {', '.join(found[:8])}" if found else "no classification head"
        raise RecipeError(
            "recipe.teacher.model", f"has {has}, the data has {', '.join(labels[:8])}",
            allowed="a teacher with exactly the data's labels, or one that is tuned first",
            fix="add teacher.tune",
        )  # fmt: skip


def capture(
    folder: Path, recipe: Recipe, teacher: Path, data: Path, settings: Mapping[str, Any],
    licences: Mapping[str, str | None], progress: Progress,
) -> None:  # fmt: skip
    """What the teacher says about every training row, by the codec of these settings."""
    task = open_task(recipe, data)
    rows = AllViews(task.rows("train"))
    sizes = sizes_of(read_json(data / "data.json"))
    progress.say(f"signals: {reason(recipe.signals, settings, **sizes)}")
    precision = recipe.distill.training.precision
    with products_in(precision):
        signal_capture.capture(
            live_teacher(teacher, task, precision), rows, {folder: logit_codec(settings)},
            made_from=signal_origins(task, teacher, data), seed=recipe.seed, progress=progress,
            provenance={"licences": dict(licences), "limbeck": metadata.version("limbeck")},
            batch_size=rows.rows.num_together,
        )  # fmt: skip


def settled_recipe(run: Path) -> Recipe:
    """That of a run, in the precision that its machine was found to be fast in."""
    recipe, _ = load_recipe(run)
    if "auto" not in recipe.precisions:
        return recipe
    kept = run / "precision/precision.json"  # none where bf16 was out of the question
    return recipe.in_precision(read_json(kept)["faster"] if kept.exists() else "fp32")


def verify_signals(run: Path, num_rows: int) -> Verification:
    """A run's signals against its own teacher and rows. Raises DataError where they are others."""
    recipe = settled_recipe(run)
    teacher, data = run / "teacher/hf", run / "data"
    task = open_task(recipe, data)
    open_store(run / "signals", made_from=signal_origins(task, teacher, data))
    return verify(
        run / "signals", live_teacher(teacher, task, recipe.distill.training.precision),
        AllViews(task.rows("train")),
        num_rows=num_rows,
    )


def survey(folder: Path, recipe: Recipe, base: Path, data: Path, progress: Progress) -> None:
    """The base's axes, proved; and how much each unit and layer matters."""
    task, seed = open_task(recipe, data), recipe.seed
    model = task.load(base, where="base")
    axes = find_axes(model.config, task.build)
    rows = some(task.rows("train"), _IMPORTANCE_ROWS, seed=seed)
    few = shortened(rows.batch(range(min(4, len(rows)))).inputs)
    with progress.bar("axes", len(axes), "axes") as bar:
        axes = prove_axes(
            model, model.config, task.build, axes, few, seed=seed, told=bar.advance
        )
    batches = list(rows.batches(rows.num_together))
    proved = [a for a in axes if a.proved]
    scores = importance(
        model, proved, batches, progress, recipe.importance,
        precision=recipe.distill.training.precision,
    )  # fmt: skip
    write_text(folder / "axes.json", axes_to_json(axes))
    scores.save(folder / "importance.safetensors")
    rises = [round(v, 6) for v in scores.layers.tolist()]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    summary = {
        "layer_importance": rises,
        "unit_importance": described(axes, scores),
        "base_params": num_parameters(model),
        "shapes": shapes,
        "axes": [
            {"name": a.name, "size": a.size, "proved": a.proved, "reason": a.reason} for a in axes
        ],
    }
    write_json(folder / "summary.json", summary)


def make_base(
    folder: Path, recipe: Recipe, teacher: Path, model: Path | None, data: Path
) -> None:
    """What students are cut from where it is not the teacher.

    Raises RecipeError for one whose inputs are not the teacher's.
    """
    task = open_task(recipe, data)
    torch.manual_seed(recipe.seed)  # the head, or all of it
    if model is not None:
        made = task.load(model, where="recipe.base.model")
    else:
        made = cast(PreTrainedModel, task.build(base_config(recipe, task, teacher, None)))
    task.save(made, model or teacher, folder)
    if recipe.of_another_tokenizer:
        return
    if task.preprocessing(folder) != task.preprocessing(teacher):
        raise RecipeError(
            "recipe.base.model", "its inputs are made in another way than the teacher's",
            allowed="a model with the teacher's own tokenizer",
            fix="choose another, or a config; of a language model any, with divergence: uld",
        )  # fmt: skip


def base_config(recipe: Recipe, task: Task, teacher: Path, model: Path | None) -> PretrainedConfig:
    """Of what students are cut from. Raises RecipeError, SourceError."""
    named = "recipe.teacher.model" if recipe.teacher.config is None else "recipe.teacher.config"
    if recipe.base is None:
        return task.read_config(teacher, where=named)
    if model is not None:
        config = task.read_config(model, where="recipe.base.model")
        task.adapt(config, where="recipe.base.model")
        return config
    assert recipe.base.config is not None
    shared = {}
    if recipe.teacher.estimator is None:
        theirs = task.read_config(teacher, where=named)
        shared = {n: getattr(theirs, n) for n in task.input_fields if hasattr(theirs, n)}
    config = make_config(shared | recipe.base.config, where="recipe.base.config")
    task.adapt(config, where="recipe.base.config")
    return config


def check_budgets(
    folder: Path, recipe: Recipe, teacher: Path, base: Path | None, data: Path
) -> None:
    """Refuse now what no shape can meet, not behind the teacher's tuning. Latencies are not timed.

    Raises RecipeError.
    """
    task = open_task(recipe, data)
    config, axes = untuned_axes(recipe, teacher, base, task)
    space = space_of(task, config, axes, recipe.export.primary)
    fits = {
        s.name: len(within_budget(f"recipe.students.{s.name}.budget", s.budget, space))
        for s in recipe.students if s.trained
    }  # fmt: skip
    write_json(folder / "shapes.json", fits)


def untuned_axes(
    recipe: Recipe, teacher: Path, base: Path | None, task: Task
) -> tuple[PretrainedConfig, Sequence[Axis]]:
    """The config of what students are cut from, and its axes, proved on random weights."""
    config = base_config(recipe, task, teacher, base)
    random = task.build(config)
    axes = prove_axes(
        random, config, task.build, find_axes(config, task.build),
        example_inputs(random, config), seed=recipe.seed,
    )  # fmt: skip
    return config, axes


def places_of(run: Path) -> Places:
    """Where a finished run has them."""
    teacher, base, signals = run / "teacher/hf", run / "base/hf", run / "signals"
    own = run / ("base/data" if load_recipe(run)[0].of_another_tokenizer else "data")
    return Places(
        data=own, teacher=teacher, space=run / "architecture",
        signals=signals if signals.is_dir() else None, base=base if base.is_dir() else teacher,
    )


class Planner:
    """Plans one student after another; what was timed for one serves the next."""

    def __init__(self, recipe: Recipe, places: Places, progress: Progress) -> None:
        self.recipe, self.progress, self.base = recipe, progress, places.base
        self.task = open_task(recipe, places.data)
        self.config = self.task.read_config(places.base, where="base")
        self.axes = read_axes(places)
        self.scores = load_importance(places.space / "importance.safetensors").layers
        self.space = space_of(self.task, self.config, self.axes, recipe.export.primary)
        self.costs = CostModel(self.measured)

    def __call__(self, folder: Path, student: StudentSpec) -> None:
        plan = self.plan(student, self.space)
        exact = shape_parameters(self.config, self.task.build, self.axes, plan.shape)
        assert exact == plan.cost.params, f"{student.name}: {exact} is not {plan.cost.params}"
        write_json(folder / "plan.json", asdict(plan) | {"timed": self.timed()})

    def plan(self, student: StudentSpec, space: Sequence[Candidate]) -> StudentPlan:
        """The best shape of the space. Raises RecipeError where none keeps the budget."""
        return plan_student(
            student, f"recipe.students.{student.name}.budget", space, self.axes, self.layers_of,
            self.costs, watts=self.recipe.measure.watts,
        )  # fmt: skip

    def layers_of(self, n: int) -> tuple[int, ...]:
        """The n layers that matter most."""
        layers = find_axis(self.axes, "layers")
        if layers is None or not layers.proved:
            return all_layers(layers)
        return keep_layers(self.scores, n, layers.pinned)

    def timed(self) -> list[dict[str, Any]]:
        return [
            {"shape": dict(key), **asdict(sample)}
            for key, (_, sample) in self.costs.measured.items()
        ]

    def measured(self, candidate: Candidate) -> Sample:
        shape = shape_of(candidate, self.axes, partial(any_layers, self.axes))
        self.progress.say(f"timing a shape with random weights: {dict(candidate.key)}")
        return time_shape(
            self.recipe, self.task, self.config, self.axes, shape, self.base
        )


def space_of(task: Task, config: Any, axes: Sequence[Any], format: str) -> list[Candidate]:
    with torch.device("meta"):
        model = task.build(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return candidates(shapes, axes, format, task.overhead(format))


def time_shape(
    recipe: Recipe, task: Task, config: Any, axes: Sequence[Any], shape: Shape, origin: Path
) -> Sample:
    """Of a random-weight model of this shape, through the real export and runtime; with the
    tokenizer or the like of the folder `origin`."""
    torch.manual_seed(0)
    own = student_config(config, axes, shape)
    model = task.build(own).eval()
    inputs = task.inputs(own)
    with tempfile.TemporaryDirectory(prefix="limbeck-") as name:
        folder, format = Path(name), recipe.export.primary
        if not format.startswith("onnx"):
            task.save(cast(PreTrainedModel, model), origin, folder / "hf")
        drawn = [random_inputs([asdict(one) for one in inputs], 2)] if task.calibrated else None
        write_files(
            model, folder / "hf", folder, inputs, {format}, drawn, draft=True,
            writes=not recipe.task.has_labels,
        )  # fmt: skip
        timing = time_file(recipe, task, own, folder / "hf", folder, format)
    return Sample(timing.latency_ms, timing.peak_memory_bytes / 1e6)


def read_plan(folder: Path) -> StudentPlan:
    data = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    shape = Shape.of(data["shape"])
    return StudentPlan(
        name=data["name"], shape=shape, cost=Cost(**data["cost"]), reason=data["reason"]
    )


def export(
    folder: Path, recipe: Recipe, model: Path, data: Path, formats: Sequence[str], *,
    draft: bool = False,
) -> None:  # fmt: skip
    """The files that are shipped; as a draft those of a baseline, which is only asked questions."""
    if not formats:
        return  # a teacher that is asked as it is
    task = open_task(recipe, data)
    classifier = task.load(model, where=str(model)).eval()
    inputs = task.inputs(classifier.config)
    rows = task.rows("train").sample(_CALIBRATION_ROWS, seed=recipe.seed)
    batches = (
        {name: tensor.numpy() for name, tensor in batch.inputs.items()}
        for batch in rows.batches(32)
    )
    calibration = [*batches] if task.calibrated else None
    write_files(
        classifier, model, folder, inputs, set(formats), calibration, draft=draft,
        writes=not recipe.task.has_labels,
    )  # fmt: skip
