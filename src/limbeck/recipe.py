"""Every setting there is, documented under the field and checked before anything is loaded.

A recipe is frozen data, written as YAML. Sizes are in MB = 10^6 bytes, times in milliseconds.
No import of torch: `limbeck --help` and a misspelt setting answer at once.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from limbeck.errors import RecipeError
from limbeck.recipe_checks import (
    check_elastic,
    check_lora,
    check_measure,
    check_quantization,
    check_uld,
)
from limbeck.recipe_data import DataSpec, Source
from limbeck.recipe_measure import MeasureSpec
from limbeck.recipe_task import ImageTask, TaskSpec, task_of
from limbeck.recipe_teacher import EstimatorSpec
from limbeck.recipe_teaching import DistillSpec, SignalsSpec, Spec, TrainingSpec

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]
Format = Literal["hf", "onnx-fp32", "onnx-int8", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]


def file_of(format: str) -> str:
    """The name of an exported file; `hf` is a folder and has none."""
    ending, _, kind = format.partition("-")
    return f"model-{kind}.{ending}"


class TeacherSpec(Spec):
    model: Source | None = None
    """A model folder or hub id that transformers' Auto classes load; language-modeling: a .gguf
    file too (extra 'lm')."""
    trim_vocabulary: bool = False
    """language-modeling: first cut the vocabulary to the tokens of the training text (and those
    that spell everything else). A smaller embedding for teacher and students."""
    config: dict[str, Any] | None = None
    """Instead of a model: `model_type` and fields of a transformers config. It starts from random
    weights, and `tune` teaches it all it knows."""
    estimator: EstimatorSpec | None = None
    """tabular, instead of a model: a scikit-learn estimator, asked for its probabilities."""
    tune: TrainingSpec | None = None
    """Teach the teacher the task first, with hard labels. Leave out if it knows it already."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if [self.model, self.config, self.estimator].count(None) != 2:
            raise ValueError("not one teacher: either `model`, `config` or `estimator`")
        if self.estimator is not None and self.tune is not None:
            raise ValueError("`tune` has no effect on an estimator: its `search`")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` names no architecture: `model_type: resnet`, say")
        if self.config is not None and self.tune is None:
            raise ValueError("`config` alone knows nothing: add `tune`")
        return self


class BaseSpec(Spec):
    """Another architecture, or another model of the same, that students are cut from."""

    model: Source | None = None
    """A pretrained model, as `teacher.model`; text: with the teacher's own tokenizer."""
    config: dict[str, Any] | None = None
    """`model_type` and fields of a transformers config: the largest student there could be, with
    random weights to start from. What the inputs need (`vocab_size`, say) is the teacher's."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.model is None) == (self.config is None):
            raise ValueError("not one base: either `model` or `config`")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` names no architecture: `model_type: bert`, say")
        return self


class BudgetSpec(Spec):
    """Upper limits; a student must keep all that are given."""

    params: int | None = Field(None, ge=1)
    """Parameters, embeddings included."""
    size_mb: float | None = Field(None, gt=0)
    """The primary format's file on disk, 10^6 bytes."""
    latency_ms: float | None = Field(None, gt=0)
    """Median of one batch-1 call of the primary format, inputs of the largest size."""
    memory_mb: float | None = Field(None, gt=0)
    """Peak of a process that does nothing but run the primary format's file, 10^6 bytes."""
    energy_mj: float | None = Field(None, gt=0)
    """Of one batch-1 call, millijoules: `measure.watts` times its latency, an estimate."""
    retention: float | None = Field(None, gt=0, le=1.5)
    """At least this share of the teacher's quality, with as few parameters as that takes. Only of a
    student that is cut from an elastic run (`trained: false`)."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_dump(exclude_none=True):
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"an empty budget: one or more of {known}")
        return self


class StudentSpec(Spec):
    name: Name
    """Its folder's name."""
    budget: BudgetSpec
    """What it may cost."""
    epochs: float | None = Field(None, gt=0, le=1000)
    """Instead of `distill.training.epochs`: a small student affords more passes."""
    learning_rate: float | None = Field(None, gt=0, lt=1)
    """Instead of `distill.training.learning_rate`: a small student bears more."""
    trained: bool = True
    """false: not trained, but cut out of the elastic run's weights, between those that were
    (`limbeck scale` adds such students)."""


class ImportanceSpec(Spec):
    """What students keep first: the units and layers that matter most on training rows."""

    units: Literal["taylor", "activation", "magnitude"] = "taylor"
    """`taylor`: how much the loss would change without the unit, to first order (three passes over
    some rows); `activation`: how large what it gives is (one); `magnitude`: how large its weights
    are (none)."""
    layers: Literal["leave-one-out", "block-influence"] = "leave-one-out"
    """`leave-one-out`: how much the loss rises when the layer is skipped (one pass for each layer);
    `block-influence`: how far the layer turns what runs through it (one for all)."""


class EvidenceSpec(Spec):
    baselines: Literal["none", "smallest", "all"] = "smallest"
    """Which students are trained again for the same steps with hard labels only, from the same
    start and from random weights."""
    random_init: bool = True
    """Of those the ones from random weights too, which cost as much as all others."""
    dedicated: tuple[Name, ...] = ()
    """Of an elastic run: these students also alone, from the same start, with the same loss and as
    many steps as the run spent on them."""
    linear: bool | None = None
    """Also fit a linear model on TF-IDF of the same tokens, tuned on the validation rows. Default:
    where there are tokens."""


class ExportSpec(Spec):
    formats: tuple[Format, ...] = ("hf", "onnx-fp32", "onnx-int8")
    """What is written for the teacher and for each student; `hf` always is. Default for
    language-modeling: hf, gguf-f16, gguf-q8_0, gguf-q4_0; onnx-fp32, with a cache, where asked."""
    primary: Format = "onnx-int8"
    """The format that budgets and retention speak of. Default for language-modeling: gguf-q8_0."""

    @field_validator("formats")
    @classmethod
    def _each_once_and_hf_always(cls, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        if len({*formats}) < len(formats):
            raise ValueError("a format twice: each of them once")
        return formats if "hf" in formats else ("hf", *formats)

    @model_validator(mode="after")
    def _primary_is_written(self) -> Self:
        if self.primary not in self.formats:
            raise ValueError(
                f"`primary` {self.primary!r} is not written: one of {', '.join(self.formats)}"
            )
        return self


class Recipe(Spec):
    """A whole run. `limbeck recipes show quickstart` prints one to start from."""

    name: Name
    """For the run's titles."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice follows from it."""
    task: TaskSpec
    """What the models do."""
    data: DataSpec
    """What they learn it from, and what they are measured on."""
    teacher: TeacherSpec
    """The model that you have."""
    base: BaseSpec | None = None
    """What students are cut from. Left out: the teacher itself."""
    importance: ImportanceSpec = ImportanceSpec()
    """What of it students keep."""
    signals: SignalsSpec = SignalsSpec()
    """How what the teacher says is stored, once for all students."""
    distill: DistillSpec
    """How students are taught."""
    students: tuple[StudentSpec, ...] = Field(min_length=1)
    """The models that you need, each by what it may cost."""
    evidence: EvidenceSpec = EvidenceSpec()
    """What the students are held against."""
    export: ExportSpec = ExportSpec()
    """The files that are written."""
    measure: MeasureSpec = MeasureSpec()
    """How these files are measured."""

    @model_validator(mode="before")
    @classmethod
    def _formats_of_the_task(cls, value: Any) -> Any:
        """The defaults of `export` are the task's."""
        given = value.get("task") if isinstance(value, dict) else None
        task = task_of(given.get("kind") if isinstance(given, dict) else None)
        export = value.get("export", {}) if task else None
        if task is None or task.has_labels or not isinstance(export, dict):
            return value
        return {**value, "export": {"formats": task.formats, "primary": task.primary, **export}}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [student.name for student in self.students]
        twice = sorted({name for name in names if names.count(name) > 1} | ({"teacher"} & {*names}))
        if twice:
            raise ValueError(f"two models are called {twice[0]!r}: different names")
        return self

    @model_validator(mode="after")
    def _temperature_is_captured(self) -> Self:
        topk, fixed = self.signals.topk, self.distill.temperature.fixed
        if topk and topk.temperatures and fixed and fixed not in topk.temperatures:
            raise ValueError(
                f"`signals.topk.temperatures` lacks {fixed:g}: a list with "
                "`distill.temperature` in it"
            )
        return self

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        distill = self.distill
        terms = [distill.hard_weight, distill.hidden, distill.embedding]
        if distill.balance != "fixed" and not any(terms):
            raise ValueError("`distill.balance` has no effect with one term: fixed, or hard_weight")
        if distill.on_policy is not None:
            if distill.balance != "fixed":
                raise ValueError(f"`distill.balance` {distill.balance} weighs the terms of a step, "
                                 "and on-policy steps have one: fixed")  # fmt: skip
            if distill.on_policy.divergence is None and distill.divergence.kind == "dkd":
                raise ValueError("`distill.on_policy` cannot take over dkd, which is about the "
                                 "label: a `divergence` of its own")  # fmt: skip
        check_uld(self)
        if distill.training.label_smoothing and not distill.hard_weight:
            raise ValueError("`distill.training.label_smoothing` has no effect without hard "
                             "labels: `distill.hard_weight` above 0")  # fmt: skip
        check_lora(self)
        check_quantization(self)
        check_elastic(self)
        check_measure(self)
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        task = self.task
        for name in task.idle_data:
            if getattr(self.data, name) != DataSpec.model_fields[name].default:
                raise ValueError(f"`data.{name}` has no effect for {task.kind}: leave it out")
        known = (*task.formats, *task.more_formats)
        if strange := [f for f in self.export.formats if f not in known]:
            raise ValueError(f"`export.formats` has {strange[0]!r}, which is not for {task.kind}: "
                             f"{', '.join(known)}")  # fmt: skip
        if not task.has_labels and self.evidence.linear:
            raise ValueError("`evidence.linear` is a model for labels, and there are none: null")
        if task.has_labels and self.distill.on_policy is not None:
            raise ValueError(f"`distill.on_policy` is for models that write, not for {task.kind}: "
                             "null")  # fmt: skip
        if task.has_labels and self.teacher.trim_vocabulary:
            raise ValueError(f"`teacher.trim_vocabulary` has no effect for {task.kind}: "
                             "leave it out")  # fmt: skip
        if task.has_tokens:
            if self.teacher.config is not None:
                raise ValueError("`teacher.config` brings no tokenizer: `teacher.model`; `base` "
                                 "takes a config for students")  # fmt: skip
            return self
        if self.evidence.linear:
            raise ValueError(f"`evidence.linear` is a model on words; {task.kind} has none: null")
        mixup = isinstance(task, ImageTask) and task.augment is not None and task.augment.mixup
        if mixup and self.distill.divergence.kind == "dkd":
            raise ValueError("`distill.divergence: dkd` parts one label from all else, and with "
                             "`augment.mixup` there are two: another divergence")  # fmt: skip
        for name in ("hidden", "embedding"):
            if getattr(self.distill, name) is not None and not isinstance(task, ImageTask):
                raise ValueError(f"`distill.{name}` is for tokens, and {task.kind} has none: null")
        return self

    @model_validator(mode="after")
    def _estimator_has_a_base(self) -> Self:
        if self.teacher.estimator is None:
            return self
        if not self.task.takes_estimators:
            raise ValueError(f"`teacher.estimator` is for tabular, not for {self.task.kind}: "
                             "`teacher.model` or `teacher.config`")  # fmt: skip
        if self.base is None:
            raise ValueError("no student can be cut from an estimator: `base: {config: "
                             "{model_type: limbeck-tabular, ...}}`")  # fmt: skip
        return self

    @property
    def linear(self) -> bool:
        """Whether a linear model is fitted too."""
        possible = self.task.has_tokens and self.task.has_labels
        return possible if self.evidence.linear is None else self.evidence.linear

    @model_validator(mode="after")
    def _budgets_can_be_kept(self) -> Self:
        for student in self.students:
            if student.budget.energy_mj is not None and self.measure.watts is None:
                raise ValueError(
                    f"`{student.name}` has a budget of energy, and nothing says what the device "
                    "draws: `measure.watts`"
                )
            if student.budget.retention is not None and student.trained:
                raise ValueError(
                    f"`{student.name}` shall keep a share of the quality, which is known of "
                    "students cut from an elastic run alone: `trained: false`, or another budget"
                )
        return self

    @property
    def of_another_tokenizer(self) -> bool:
        """Whether students read other tokens than their teacher."""
        return self.distill.divergence.kind == "uld"

    @classmethod
    def schema_json(cls, **_: Any) -> str:
        """The JSON Schema of a recipe's YAML, as published in `docs/`: editors complete by it."""
        draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        return json.dumps(draft | cls.model_json_schema(), indent=1, ensure_ascii=False)

    def training_of(self, student: StudentSpec) -> TrainingSpec:
        """`distill.training` with the student's own settings in place."""
        own = student.model_dump(include={"epochs", "learning_rate"}, exclude_none=True)
        return self.distill.training.model_copy(update=own)

    @property
    def precisions(self) -> set[str]:
        """That its trainings name."""
        trainings = (self.distill.training, self.teacher.tune)
        return {training.precision for training in trainings if training}

    def in_precision(self, precision: str) -> Recipe:
        """The same with `auto` settled."""
        whole = self.model_dump(mode="json")
        for training in (whole["distill"]["training"], whole["teacher"]["tune"]):
            if training and training["precision"] == "auto":
                training["precision"] = precision
        return Recipe.model_validate(whole)

    def student(self, name: str) -> StudentSpec:
        for student in self.students:
            if student.name == name:
                return student
        raise RecipeError("students", f"no student is called {name!r}")
