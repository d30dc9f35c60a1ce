"""Students are taught, and what they are held against: stages of the pipeline like `stages`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from limbeck._startup import prepare_torch
from limbeck.architecture.axes import Axis, axes_from_json
from limbeck.architecture.cut import build_student, sort_units, student_config
from limbeck.architecture.importance import load_importance
from limbeck.cross_tokenizer import CrossTokenizerTeacher
from limbeck.device import on_device, rows_at_once
from limbeck.errors import RecipeError
from limbeck.features import Feature
from limbeck.layermap import layer_pairs, similarities
from limbeck.models import load_tokenizer
from limbeck.objective import Objective
from limbeck.observe import Observer, tokens
from limbeck.on_policy import on_policy
from limbeck.progress import Progress
from limbeck.recipe import Recipe, StudentSpec
from limbeck.recipe_teaching import DistillSpec, HiddenSpec
from limbeck.run import file_sha256, write_json
from limbeck.signals.capture import capture
from limbeck.signals.codecs import AnyCodec
from limbeck.signals.origins import origins
from limbeck.signals.store import MANIFEST, open_store
from limbeck.signals.vectors import Embedding, Hidden
from limbeck.step import Training
from limbeck.tasks.estimators import black_box, is_estimator
from limbeck.tasks.task import AllViews, Rows, Task, open_task, some
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.stored import NoTeacher, StoredTeacher
from limbeck.temperature import temperature_of
from limbeck.train import train
from limbeck.types import Batch, Need, Places, Shape, Teacher
from limbeck.vocabulary import shared_ids

Start = Literal["prefix", "random"]
_TEMPERATURE_SHARE = 10  # of the training, for each temperature that is tried
_MAP_ROWS = 64  # training rows that layers are compared on
MAPS = "maps.json"
_VALIDATION_ROWS = 256  # for the curves; drawn at random, the same for all

prepare_torch()


def distil(
    folder: Path, recipe: Recipe, student: StudentSpec, shape: Shape, places: Places,
    progress: Progress, *, taught: bool = True, start: Start = "prefix",
    temperature: float | None = None, features: Path | None = None,
) -> None:  # fmt: skip
    """Train one student from the teacher's signals, or (not `taught`) from hard labels only.

    `temperature` is what `choose_temperature` found, where the recipe leaves it to be found;
    `features` the folder that `store_features` filled, where it asks for any.
    """
    task = open_task(recipe, places.data)
    model = _student(recipe, shape, places, task, start)
    what = "" if taught else f", hard labels, {start} start"
    by = lesson(recipe, student, places, temperature, features) if taught else hard_labels(recipe)
    spec = recipe.training_of(student)
    if start == "random":  # adapters of random weights would be no rival
        spec = spec.model_copy(update={"lora": None})
    training = Training(
        rows=task.rows("train"),
        spec=spec,
        seed=recipe.seed,
        title=f"{student.name}{what}",
        validate=validator(task, recipe.seed),
        quantization=recipe.distill.quantization_aware,
        **by,
    )
    train(model, training, folder, progress)
    task.save(cast(PreTrainedModel, model), places.base, folder)


def hard_labels(recipe: Recipe) -> dict[str, Any]:
    """No teacher."""
    smoothing = recipe.distill.training.label_smoothing
    return {"teacher": NoTeacher(), "objective": Objective(hard_weight=1.0, smoothing=smoothing)}


def lesson(
    recipe: Recipe, student: StudentSpec | None, places: Places,
    temperature: float | None = None, features: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Who teaches, by which objective; without a student of its own for all of a family."""
    spec, task = recipe.distill, open_task(recipe, places.data)
    objective = Objective(
        temperature=temperature_of(spec.temperature, temperature),
        soft_weight=spec.soft_weight,
        hard_weight=spec.hard_weight,
        smoothing=spec.training.label_smoothing,
        divergence=spec.divergence.kind,
        settings=spec.divergence.settings(),
        standardized=spec.standardize,
        features=_features(spec, student, features) if student else (),
        shared_ids=None if recipe.of_another_tokenizer else shared_vocabulary(task, places),
    )
    if recipe.of_another_tokenizer:
        reader = other_teacher(task, places)
        objective = replace(objective, places=reader.places)
        return {"teacher": reader, "objective": objective, "balance": spec.balance}
    assert places.signals is not None
    origins = signal_origins(task, places.teacher, places.data)
    vectors = {
        need: open_store(features / need, made_from=origins)
        for need in (Need.HIDDEN, Need.EMBEDDING)
        if features is not None and need in objective.needs
    }
    source = StoredTeacher(
        store=open_store(places.signals, made_from=origins),
        fingerprint=file_sha256(places.signals / MANIFEST),
        # where the temperature changes signals are dense, and those are the same for any
        temperature=objective.temperature.fixed or 1.0,
        hidden=vectors.get(Need.HIDDEN),
        embedding=vectors.get(Need.EMBEDDING),
    )
    own = None
    if spec.on_policy is not None:
        live = live_teacher(places.teacher, task, spec.training.precision)
        own = on_policy(spec.on_policy, task, live, objective)
    return {
        "teacher": source, "objective": objective, "balance": spec.balance, "on_policy": own,
    }  # fmt: skip


def other_teacher(task: Task, places: Places) -> CrossTokenizerTeacher:
    """That reads the students' texts in tokens of its own."""
    model = task.load(places.teacher, where="teacher")
    rows: Any = task.rows("train")
    theirs, ours = (load_tokenizer(at, where=str(at)) for at in (places.teacher, places.base))
    return CrossTokenizerTeacher(
        model, file_sha256(places.teacher / "model.safetensors"), theirs, rows, ours
    )


def live_teacher(teacher: Path, task: Task, precision: str) -> Teacher:
    """In this precision its body; of a language model only what counts is multiplied by its head,
    and what comes out is fp32."""
    if is_estimator(teacher):
        return black_box(teacher)
    model = task.load(teacher, where="teacher")
    live = LiveTeacher(model, file_sha256(teacher / "model.safetensors"), precision=precision)
    if not task.labels:
        live.leave_head(task.rows("train").batch([0]))
    return live


def shared_vocabulary(task: Task, places: Places) -> int | None:
    """How many ids both models mean the same by, where their tables have not equally many rows.

    None where they have, or where what is predicted are labels. Raises DataError for two
    tokenizers.
    """
    if task.labels:
        return None
    sides = {"teacher": places.teacher, "base": places.base}
    configs = {name: task.read_config(at, where=name) for name, at in sides.items()}
    sizes = {name: int(config.vocab_size) for name, config in configs.items()}
    if sizes["teacher"] == sizes["base"]:
        return None
    theirs, ours = (load_tokenizer(at, where=name).get_vocab() for name, at in sides.items())
    return shared_ids(ours, theirs, student_size=sizes["base"], teacher_size=sizes["teacher"])


def _features(spec: DistillSpec, student: StudentSpec, folder: Path | None) -> tuple[Feature, ...]:
    found = []
    if spec.hidden is not None:
        assert folder is not None
        maps = json.loads((folder / MAPS).read_text(encoding="utf-8"))
        pairs = [(ours, theirs) for ours, theirs in maps[student.name]["pairs"]]
        found.append(
            Feature(
                loss=spec.hidden.loss, weight=spec.hidden.weight, pairs=pairs,
                settings=spec.hidden.settings(),
            )
        )  # fmt: skip
    if spec.embedding is not None:
        found.append(
            Feature(
                loss=spec.embedding.loss, weight=spec.embedding.weight,
                settings=spec.embedding.settings(),
            )
        )  # fmt: skip
    return tuple(found)


def store_features(
    folder: Path, recipe: Recipe, shapes: Mapping[str, Shape], places: Places, progress: Progress
) -> None:
    """The layers that each student learns from (`maps.json`), and what the teacher has there.

    The map is made from some training rows and the students as they are cut.
    Raises RecipeError for a layer that there is not.
    """
    task, spec = open_task(recipe, places.data), recipe.distill
    rows = task.rows("train")
    classifier = task.load(places.teacher, where="teacher")
    stores: dict[Path, AnyCodec] = {}
    layers: tuple[str, ...] = ()
    if spec.hidden is not None:
        few = some(rows, _MAP_ROWS, seed=recipe.seed)
        batch = few.batch(range(len(few)))
        maps = {
            name: layer_map(
                spec.hidden, _student(recipe, shape, places, task, "prefix"), classifier,
                batch, where=f"students.{name}",
            )
            for name, shape in shapes.items()
        }  # fmt: skip
        write_json(folder / MAPS, maps)
        theirs = {b: 0 for found in maps.values() for _, b in found["pairs"]}
        layers = tuple(sorted(theirs, key=lambda name: (not name.isdigit(), name.zfill(4))))
        stores[folder / Need.HIDDEN] = Hidden(layers=layers, dtype=spec.hidden.dtype)
    if spec.embedding is not None:
        stores[folder / Need.EMBEDDING] = Embedding(dtype=spec.embedding.dtype)
    live = LiveTeacher(classifier, file_sha256(places.teacher / "model.safetensors"), layers)
    capture(
        live, AllViews(rows), stores, made_from=signal_origins(task, places.teacher, places.data),
        seed=recipe.seed, progress=progress, batch_size=rows.num_together,
    )  # fmt: skip


@torch.no_grad()
def layer_map(
    spec: HiddenSpec, student: nn.Module, teacher: nn.Module, batch: Batch, *, where: str
) -> dict[str, Any]:
    """`pairs`, and the similarities that they were chosen by: CKA of layer 1, 2, ... of each.

    Raises RecipeError for a layer that one of them does not have.
    """
    needs, mask = frozenset({Need.HIDDEN}), tokens(batch)
    ours, theirs = (Observer(m.eval())(batch, needs).hidden for m in (student, teacher))
    mine, yours = ([h[mask] for h in [*side.values()][1:]] for side in (ours, theirs))
    alike = similarities(mine, yours)
    if isinstance(spec.layers, str):
        pairs = layer_pairs(spec.layers, mine, yours)
    else:
        pairs = [(str(a), str(b)) for a, b in spec.layers]
        sides = (("student", student, ours), ("teacher", teacher, theirs))
        for name, (side, model, numbered) in zip(zip(*pairs, strict=True), sides, strict=True):
            for layer in name:
                if layer not in numbered and layer not in dict(model.named_modules()):
                    raise RecipeError(
                        "recipe.distill.hidden.layers", f"{where}: no layer {layer} in the {side}",
                        allowed=f"0 to {len(numbered) - 1}, or the path of a module",
                        fix="choose another, or auto",
                    )  # fmt: skip
    return {"pairs": pairs, "cka": [[round(float(v), 4) for v in row] for row in alike]}


def choose_temperature(
    folder: Path, recipe: Recipe, student: StudentSpec, shape: Shape, places: Places,
    progress: Progress, *, features: Path | None = None,
) -> None:  # fmt: skip
    """A tenth of the student's training with each candidate, all from the same start and rows.

    The learning rate's whole course is run in each. Chosen is the one with the least cross-entropy
    on the validation rows' labels; the curve stays in `temperature.json`.
    """
    task = open_task(recipe, places.data)
    spec = recipe.training_of(student)
    short = spec.model_copy(update={"epochs": spec.epochs / _TEMPERATURE_SHARE})
    curve = []
    for candidate in recipe.distill.temperature.candidates or ():
        training = Training(
            rows=task.rows("train"),
            spec=short,
            seed=recipe.seed,
            title=f"{student.name}, temperature {candidate:g}",
            **lesson(recipe, student, places, candidate, features),
        )
        model = _student(recipe, shape, places, task, "prefix")
        trial = folder / f"trial-{candidate:g}"
        trial.mkdir(exist_ok=True)
        train(model, training, trial, progress)
        loss, _ = loss_and_accuracy(task.rows("validation"), model)
        curve.append({"temperature": candidate, "loss": loss})
        shutil.rmtree(trial)
    chosen = min(curve, key=lambda point: point["loss"])["temperature"]
    found = {"chosen": chosen, "curve": curve, "steps": training.steps}
    write_json(folder / "temperature.json", found)


def loss_and_accuracy(rows: Rows, model: Callable[..., Any]) -> tuple[float, float]:
    """Mean cross-entropy with the labels, nats, and the share of right answers: of what counts."""
    ours = isinstance(model, nn.Module)  # or answers arrays
    device = next(model.parameters()).device if ours else torch.device("cpu")  # type: ignore[attr-defined]

    @torch.inference_mode()
    def look(batch: Batch) -> tuple[float, int, int]:
        batch = batch.to(device)
        logits = model(**batch.inputs).logits[batch.mask]  # (P, V)
        labels = batch.labels[batch.mask]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return float(loss), int((logits.argmax(-1) == labels).sum()), len(labels)

    found = on_device(look, rows.batches(rows_at_once(rows.num_together)))
    losses, right, counts = zip(*found, strict=True)
    return sum(losses) / sum(counts), sum(right) / sum(counts)


def untaught(folder: Path, recipe: Recipe, shape: Shape, places: Places) -> None:
    """The sorted prefix as it is cut."""
    task = open_task(recipe, places.data)
    model = _student(recipe, shape, places, task, "prefix")
    task.save(cast(PreTrainedModel, model), places.base, folder)


def _student(
    recipe: Recipe, shape: Shape, places: Places, task: Task, start: Start
) -> nn.Module:
    if start == "random":
        config = task.read_config(places.base, where="base")
        axes = read_axes(places)
        torch.manual_seed(recipe.seed)
        return task.build(student_config(config, axes, shape))
    config, axes, state = sorted_base(task, places)
    return build_student(config, task.build, axes, shape, state)


def sorted_base(
    task: Task, places: Places
) -> tuple[PretrainedConfig, tuple[Axis, ...], dict[str, Tensor]]:
    """What students are prefixes of: its config, axes, and weights with what matters first."""
    model = task.load(places.base, where="base")
    axes, scores = read_axes(places), load_importance(places.space / "importance.safetensors")
    return model.config, axes, sort_units(model.state_dict(), axes, scores.units)


def read_axes(places: Places) -> tuple[Axis, ...]:
    return axes_from_json((places.space / "axes.json").read_text(encoding="utf-8"))


def validator(task: Task, seed: int) -> Callable[[nn.Module], float]:
    """Share of right answers on some validation rows."""
    rows = some(task.rows("validation"), _VALIDATION_ROWS, seed=seed)

    return lambda model: loss_and_accuracy(rows, model)[1]


def signal_origins(task: Task, teacher: Path, data: Path) -> dict[str, Any]:
    return origins(teacher, data / "train.parquet", task.preprocessing(teacher))
