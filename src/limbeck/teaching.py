"""Students are taught, and what they are held against: stages of the pipeline like `stages`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck._startup import prepare_torch
from limbeck.architecture.axes import axes_from_json
from limbeck.architecture.cut import build_student, sort_units, student_config
from limbeck.architecture.importance import load_importance
from limbeck.cores import on_each
from limbeck.export.folder import save_folder
from limbeck.models import build_classifier, load_classifier
from limbeck.objective import Objective
from limbeck.progress import Progress
from limbeck.recipe import Recipe, StudentSpec
from limbeck.run import file_sha256, write_json
from limbeck.signals.origins import origins
from limbeck.signals.store import MANIFEST, open_store
from limbeck.step import Training
from limbeck.tasks.text_classification import TextClassification
from limbeck.teachers.stored import NoTeacher, StoredTeacher
from limbeck.temperature import temperature_of
from limbeck.train import train
from limbeck.types import Batch, Shape

Start = Literal["prefix", "random"]
_TEMPERATURE_SHARE = 10  # of the training, for each temperature that is tried
_VALIDATION_ROWS = 256  # for the curves; drawn at random, the same for all

prepare_torch()


def distil(
    folder: Path, recipe: Recipe, student: StudentSpec, shape: Shape, teacher: Path, survey: Path,
    signals: Path | None, data: Path, progress: Progress, *, start: Start = "prefix",
    temperature: float | None = None,
) -> None:  # fmt: skip
    """Train one student from the teacher's signals, or without them from hard labels only.

    `temperature` is what `choose_temperature` found, where the recipe leaves it to be found.
    """
    task = TextClassification(data)
    model = _student(recipe, shape, teacher, survey, task, start)
    what = "" if signals else f", hard labels, {start} start"
    training = Training(
        rows=task.rows("train"),
        spec=recipe.training_of(student),
        seed=recipe.seed,
        title=f"{student.name}{what}",
        validate=validator(task, recipe.seed),
        **_lesson(recipe, teacher, signals, data, temperature),
    )
    train(model, training, folder, progress)
    _save(model, recipe, teacher, folder, task)


def _lesson(
    recipe: Recipe, teacher: Path, signals: Path | None, data: Path, temperature: float | None
) -> dict[str, Any]:
    """Who teaches, by which objective."""
    if signals is None:
        return {"teacher": NoTeacher(), "objective": Objective(hard_weight=1.0)}
    spec = recipe.distill
    objective = Objective(
        temperature=temperature_of(spec.temperature, temperature),
        soft_weight=spec.soft_weight,
        hard_weight=spec.hard_weight,
        divergence=spec.divergence.kind,
        settings=spec.divergence.settings(),
        standardized=spec.standardize,
    )
    store = open_store(signals, made_from=signal_origins(recipe, teacher, data))
    # where the temperature changes signals are dense, and those are the same for any
    fixed = objective.temperature.fixed or 1.0
    source = StoredTeacher(store, file_sha256(signals / MANIFEST), fixed)
    return {"teacher": source, "objective": objective, "balance": spec.balance}


def choose_temperature(
    folder: Path, recipe: Recipe, student: StudentSpec, shape: Shape, teacher: Path, survey: Path,
    signals: Path, data: Path, progress: Progress,
) -> None:  # fmt: skip
    """A tenth of the student's training with each candidate, all from the same start and rows.

    The learning rate's whole course is run in each. Chosen is the one with the least cross-entropy
    on the validation rows' labels; the curve stays in `temperature.json`.
    """
    task = TextClassification(data)
    spec = recipe.training_of(student)
    short = spec.model_copy(update={"epochs": spec.epochs / _TEMPERATURE_SHARE})
    curve = []
    for candidate in recipe.distill.temperature.candidates or ():
        training = Training(
            rows=task.rows("train"),
            spec=short,
            seed=recipe.seed,
            title=f"{student.name}, temperature {candidate:g}",
            **_lesson(recipe, teacher, signals, data, candidate),
        )
        model = _student(recipe, shape, teacher, survey, task, "prefix")
        trial = folder / f"trial-{candidate:g}"
        trial.mkdir(exist_ok=True)
        train(model, training, trial, progress)
        curve.append({"temperature": candidate, "loss": _validation_loss(task, model)})
        shutil.rmtree(trial)
    chosen = min(curve, key=lambda point: point["loss"])["temperature"]
    found = {"chosen": chosen, "curve": curve, "steps": training.steps}
    write_json(folder / "temperature.json", found)


def _validation_loss(task: TextClassification, model: nn.Module) -> float:
    """Mean cross-entropy of all validation rows, nats."""
    rows = task.rows("validation")

    @torch.inference_mode()
    def loss(batch: Batch) -> float:
        logits = model(**batch.inputs).logits
        return float(nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))

    return sum(on_each(loss, rows.batches(32))) / len(rows)


def untaught(
    folder: Path, recipe: Recipe, shape: Shape, teacher: Path, survey: Path, data: Path
) -> None:
    """The sorted prefix as it is cut."""
    task = TextClassification(data)
    _save(_student(recipe, shape, teacher, survey, task, "prefix"), recipe, teacher, folder, task)


def _save(
    model: nn.Module, recipe: Recipe, teacher: Path, folder: Path, task: TextClassification
) -> None:
    save_folder(
        cast(PreTrainedModel, model), teacher, folder, labels=task.labels,
        max_tokens=recipe.task.max_tokens,
    )  # fmt: skip


def _student(
    recipe: Recipe, shape: Shape, teacher: Path, survey: Path, task: TextClassification,
    start: Start,
) -> nn.Module:  # fmt: skip
    model = load_classifier(teacher, task.labels, where="teacher")
    axes = axes_from_json((survey / "axes.json").read_text(encoding="utf-8"))
    torch.manual_seed(recipe.seed)
    if start == "random":
        return build_classifier(student_config(model.config, axes, shape))
    scores = load_importance(survey / "importance.safetensors")
    state = sort_units(model.state_dict(), axes, scores.units)
    return build_student(model.config, build_classifier, axes, shape, state)


def validator(task: TextClassification, seed: int) -> Callable[[nn.Module], float]:
    """Share of right answers on some validation rows."""
    rows = task.rows("validation").sample(_VALIDATION_ROWS, seed=seed)

    def validate(model: nn.Module) -> float:
        @torch.inference_mode()
        def right(batch: Batch) -> int:
            return int((model(**batch.inputs).logits.argmax(-1) == batch.labels).sum())

        return sum(on_each(right, rows.batches(32))) / len(rows)

    return validate


def signal_origins(recipe: Recipe, teacher: Path, data: Path) -> dict[str, Any]:
    return origins(teacher, data / "train.parquet", max_tokens=recipe.task.max_tokens)
