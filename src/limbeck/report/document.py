"""report.json: what a run found out, as frozen data. Sizes in bytes, times as the names say.

Qualities are fractions (0.81 is 81 %) and carry their 95 % interval and the number of examples.
`null` always means "not measured". The JSON Schema lies in `docs/report.schema.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from limbeck.errors import DamagedError, RunFolderError
from limbeck.recipe import Spec
from limbeck.report.benchmarks import Benchmarks
from limbeck.report.parting import Parting
from limbeck.report.shapes import FrontierPoint, ShapeEntry, UnitImportance
from limbeck.report.texts import Texts

BudgetKey = Literal["params", "size_mb", "latency_ms", "memory_mb", "energy_mj", "retention"]


class Quality(Spec):
    """The task's metric on held-out data."""

    metric: str
    """Name of the metric, e.g. `accuracy`; more is better."""
    value: float
    """A fraction: 1 is perfect."""
    low: float
    """Lower end of the 95 % bootstrap interval."""
    high: float
    """Upper end of the 95 % bootstrap interval."""
    n: int = Field(ge=0)
    """Examples it was measured on; of a language model the documents, whose tokens count."""
    perplexity: float | None = Field(None, ge=0)
    """Of a language model: exp of the mean loss of a token, less is better. Comparable between
    models of one tokenizer alone."""
    mean_kl: float | None = None
    """Of a baseline: mean of KL(teacher || this) at temperature 1, in nats; the student's own is
    its `fidelity`."""


class Retention(Spec):
    """Student's quality divided by the teacher's, on the same examples."""

    value: float
    """1 means that nothing was lost."""
    low: float
    """Lower end of the 95 % bootstrap interval."""
    high: float
    """Upper end of the 95 % bootstrap interval."""
    n: int = Field(ge=0)
    """Examples it was measured on."""


class Latency(Spec):
    """Of one batch-1 call, in milliseconds."""

    median: float = Field(ge=0)
    """Half of the calls were faster."""
    p95: float = Field(ge=0)
    """95 % of the calls were faster."""
    n: int | None = Field(None, ge=1)
    """Timed calls."""


class Parity(Spec):
    """How far an exported file is from the model it came from."""

    max_abs_diff: float = Field(ge=0)
    """Largest difference between two logits."""
    agreement: float = Field(ge=0, le=1)
    """Share of examples with the same top-1 answer."""
    n: int | None = Field(None, ge=1)
    """Examples it was measured on."""


class Artifact(Spec):
    """One exported file or folder, and what was measured on it."""

    format: str = Field(min_length=1)
    """`hf`, `onnx-fp32`, `onnx-int8`, ..."""
    path: str
    """Relative to the run's folder."""
    size_bytes: int = Field(ge=0)
    """On disk; of a folder, everything in it."""
    quality: Quality | None = None
    """Of this very file."""
    latency_ms: Latency | None = None
    """Batch 1."""
    throughput_per_s: float | None = Field(None, ge=0)
    """Examples per second, batch 32."""
    tokens_per_s: float | None = Field(None, ge=0)
    """Of a language model: tokens written per second, one after the other."""
    runtime: str | None = None
    """Name and version of what ran it for the times."""
    peak_memory_bytes: int | None = Field(None, ge=0)
    """Of the process that ran it."""
    device: str
    """What it was measured on, e.g. `cpu`."""
    threads: int = Field(ge=1)
    """CPU threads while it was measured."""
    parity: Parity | None = None
    """Null for the format that the others came from."""


class TeacherEntry(Spec):
    """The model that is distilled."""

    name: str = Field(min_length=1)
    """Where it came from, or its short name."""
    params: int | None = Field(ge=0)
    """Parameters, embeddings included; null for an estimator, which has none to count."""
    primary: str
    """The format that budgets and retention speak of."""
    artifacts: tuple[Artifact, ...] = Field(min_length=1)
    """Everything exported."""

    @model_validator(mode="after")
    def _primary_is_there(self) -> Self:
        if self.artifact(self.primary) is None:
            raise ValueError(f"{self.name}: no artifact has the primary format {self.primary!r}")
        return self

    def artifact(self, format: str) -> Artifact | None:
        return next((a for a in self.artifacts if a.format == format), None)

    @property
    def main(self) -> Artifact:
        """The artifact in the primary format."""
        return next(a for a in self.artifacts if a.format == self.primary)


class BudgetEntry(Spec):
    """What a student might cost at most, and what it was measured to cost."""

    asked: dict[BudgetKey, int | float] = Field(min_length=1)
    """Limits, as the recipe says: upper ones, but for `retention`."""
    measured: dict[BudgetKey, int | float | None]
    """The same keys; null: could not be measured, so not met."""
    predicted: dict[BudgetKey, int | float] = Field(default_factory=dict)
    """What the plan said before any training, where it said anything."""
    met: bool
    """Whether every limit holds."""

    @classmethod
    def of(
        cls, asked: Mapping[BudgetKey, float], measured: Mapping[BudgetKey, float | None],
        predicted: Mapping[BudgetKey, float] | None = None,
    ) -> BudgetEntry:  # fmt: skip
        """With `met` as the numbers say."""
        return cls(
            asked={**asked}, measured={**measured}, predicted={**(predicted or {})},
            met=_met(asked, measured),
        )  # fmt: skip

    @model_validator(mode="after")
    def _says_what_the_numbers_say(self) -> Self:
        if self.asked.keys() != self.measured.keys():
            raise ValueError("`asked` and `measured` have different keys")
        if self.met != _met(self.asked, self.measured):
            raise ValueError(f"met is {self.met}, but the numbers say otherwise")
        return self


def _met(asked: Mapping[BudgetKey, float], measured: Mapping[BudgetKey, float | None]) -> bool:
    return all(holds(key, limit, measured.get(key)) for key, limit in asked.items())


def holds(key: str, limit: float, found: float | None) -> bool:
    """Whether a limit is kept; what was not measured is not."""
    if found is None:
        return False
    return found >= limit if key == "retention" else found <= limit


class Fidelity(Spec):
    """How like the teacher a student answers, right or wrong."""

    agreement: float = Field(ge=0, le=1)
    """Share of examples with the teacher's top-1 answer."""
    mean_kl: float | None = None
    """Mean of KL(teacher || student) at temperature 1, in nats."""
    n: int = Field(ge=0)
    """Examples it was measured on."""


class Capability(Spec):
    """What a student kept of one named slice of the held-out data."""

    quality: Quality
    """The student's."""
    teacher_quality: Quality
    """The teacher's, on the same examples."""
    retention: Retention | None = None
    """Null where the teacher's quality is zero."""
    n: int = Field(ge=0)
    """Examples in the slice."""


class Baselines(Spec):
    """The same student made in other ways, at equal budget, as the primary format."""

    hard_labels: Quality | None = None
    """Same start, same steps, no teacher."""
    random_init: Quality | None = None
    """Hard labels only, from random weights, same steps."""
    untaught: Quality | None = None
    """Cut out of the teacher and not trained at all."""
    dedicated: Quality | None = None
    """Of an elastic run: same start, loss and steps, with weights of its own."""


class StudentEntry(TeacherEntry):
    """One member of the family."""

    params: int = Field(ge=0)
    """Parameters, embeddings included."""
    shape: ShapeEntry
    """What was cut."""
    reason: str
    """Which rule chose this shape, in one sentence."""
    budget: BudgetEntry
    """Asked, measured, met."""
    retention: Retention | None = None
    """Of the primary format; null where the teacher's quality is zero."""
    fidelity: Fidelity | None = None
    """Of the primary format."""
    capabilities: dict[str, Capability] = Field(default_factory=dict)
    """By name; for a classifier one per class."""
    baselines: Baselines = Baselines()
    """What the student must be better than."""
    partings: tuple[Parting, ...] = ()
    """Images: some that the primary format answers otherwise than the teacher, the furthest (KL)
    first."""
    trained: bool = True
    """false: cut between the trained sizes of an elastic run."""


class Environment(Spec):
    """Where the numbers were made."""

    cpu: str
    """The processor's name."""
    cores: int = Field(ge=1)
    """Cores that the process may use."""
    threads: int = Field(ge=1)
    """Threads that it was told to use."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Name to version: python, the system, the libraries."""


class Stage(Spec):
    """One line of the ledger. A reused stage keeps the cost of when it was made."""

    name: str
    """As in the run's folder."""
    seconds: float = Field(ge=0)
    """Wall time."""
    energy_wh: float | None = None
    """Watt-hours; null: not metered."""
    energy_source: str
    """`measured: ...`, `estimated: ...` or `not metered`."""
    reused: bool
    """Whether this run found it already made."""


class TrainingPoint(Spec):
    """One line of a training log."""

    step: int = Field(ge=0)
    """Optimizer steps so far."""
    loss: float | None = None
    """What the optimizer minimised."""
    terms: dict[str, float] = Field(default_factory=dict)
    """Its parts, weights included: soft (the teacher's soft targets), hard (the hard labels),
    hidden (states), embedding; of a step on the student's own texts on_policy alone."""
    gradients: dict[str, float] = Field(default_factory=dict)
    """Norm of each part's gradient, at a few steps."""
    cosines: dict[str, Annotated[float, Field(ge=-1.001, le=1.001)]] = Field(default_factory=dict)
    """Between two parts' gradients, `soft, hard` say: below 0 they pull against each other."""
    weights: dict[str, float] = Field(default_factory=dict)
    """The balance's factor of each part, where it is not fixed."""
    sizes: dict[str, float] = Field(default_factory=dict)
    """Of an elastic run: the loss of each size that the step taught."""
    validations: dict[str, float] = Field(default_factory=dict)
    """Of an elastic run: each size's `validation`."""
    examples_per_s: float | None = None
    """Training speed."""
    writing: float | None = Field(None, ge=0)
    """Share of the time since the last point that the student wrote texts to learn from."""
    validation: float | None = None
    """Quality on the validation rows, a fraction."""


class Report(Spec):
    """A whole run."""

    limbeck: str
    """Version that made it."""
    recipe: dict[str, Any]
    """The resolved recipe, every default written out."""
    environment: Environment
    """Where the numbers were made."""
    teacher: TeacherEntry
    """The model that was distilled."""
    students: tuple[StudentEntry, ...] = Field(min_length=1)
    """In the recipe's order."""
    stages: tuple[Stage, ...] = ()
    """In the order they were run."""
    linear: Quality | None = None
    """A linear model on TF-IDF of the same tokens: when a transformer is not needed."""
    training: dict[str, tuple[TrainingPoint, ...]] = Field(default_factory=dict)
    """Curves by the name of the model that was trained."""
    labels: tuple[str, ...] = ()
    """Class names, by index."""
    texts: Texts | None = None
    """What language models write; null where the recipe does not ask (`measure.generate`)."""
    benchmarks: Benchmarks | None = None
    """Public ones, of language models; null where the recipe names none."""
    frontier: tuple[FrontierPoint, ...] = ()
    """Of an elastic run, the largest first."""
    layer_importance: tuple[float, ...] | None = None
    """By the teacher's layer; more is more important."""
    unit_importance: tuple[UnitImportance, ...] = ()
    """Of the axes that can be cut."""
    importance: dict[Literal["units", "layers"], str] = Field(default_factory=dict)
    """What these numbers measure."""
    warnings: tuple[str, ...] = ()
    """What a reader must know, in plain sentences."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [student.name for student in self.students]
        if len({*names}) < len(names):
            raise ValueError("two students have the same name")
        return self

    @classmethod
    def schema_json(cls, **_: Any) -> str:
        """The JSON Schema of a written report.json, as published in `docs/`."""
        schema = cls.model_json_schema(mode="serialization")
        draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        return json.dumps(draft | schema, indent=1, ensure_ascii=False)

    @property
    def metric(self) -> str:
        """What the qualities are called."""
        quality = self.teacher.main.quality
        return quality.metric.replace("_", " ") if quality else "quality"


def read_report(folder: Path) -> Report:
    """A run's report. Raises RunFolderError if there is none, DamagedError if it is unreadable."""
    path = folder / "report.json"
    try:
        return Report.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(
            str(folder), "holds no report.json", allowed="the folder of a finished run",
            fix="let `limbeck distill` end there first",
        ) from None  # fmt: skip
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise DamagedError(
            str(path), f"not a report this version reads: {where or 'it'}: {first['msg']}",
            allowed="what docs/report.schema.json describes",
            fix="run the same `limbeck distill` again: it writes the report anew",
        ) from None  # fmt: skip
