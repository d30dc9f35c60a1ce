"""The still, in order. Each stage is skipped when its inputs have not changed since it last ran.

    recipe -> sources -> data -> budgets -> teacher -> signals -> space -> plan -> distil -> export
           -> measure -> report

`stages`, `teaching` and `evaluation` (and with them torch) are imported only by a stage that really
runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.cache import Fetched
from limbeck.energy import CodecarbonMeter
from limbeck.findings import Member, assemble, write_cards
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe, StudentSpec
from limbeck.recipe_file import rebase
from limbeck.report import Report, write_report
from limbeck.run import Made, Meter, Run, open_run
from limbeck.signals.choose import codec_settings, refuse_unserved
from limbeck.sources import fetch


@dataclass(frozen=True)
class Sources:
    model: Fetched
    train: Fetched
    test: Fetched | None


def distill(
    recipe: Recipe,
    out: Path,
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    meter: Meter | None = None,
    repair: bool = False,
) -> Report:
    """The whole family: trained, exported, measured and reported in the folder `out`.

    `base` is the folder that the recipe's relative paths start from. Raises a LimbeckError; an
    unmet budget is no error here but stands in the report.
    """
    progress = progress if progress is not None else Silent()
    base = base or Path.cwd()
    recipe = rebase(recipe, base)
    with open_run(out, recipe, meter or CodecarbonMeter(), repair=repair) as run:
        run.on_stage(lambda name, reused: progress.say(f"{name}: unchanged" if reused else name))
        still = _Still(run, recipe, progress, fetch_sources(recipe, progress, base))
        data = still.data()
        still.budgets(data)
        codec = still.codec(data)
        teacher = still.teacher(data)
        signals = still.signals(teacher, data, codec)
        space = still.space(teacher, data)
        plans = {student.name: still.plan(student, teacher, space) for student in recipe.students}
        features = still.features(teacher, data, space, plans)
        original = still.measured_teacher(teacher, data)
        family = {
            student.name: still.member(
                student, plans, teacher, signals, features, space, data, original
            )
            for student in recipe.students
        }
        linear = still.linear(data) if recipe.evidence.linear else None
        report = assemble(run, recipe, data, space, original, family, linear)
        write_report(report, run.folder)
        write_cards(report, run.folder, still.sources.model, still.sources.train)
        return report


def fetch_sources(recipe: Recipe, progress: Progress, base: Path) -> Sources:
    """Model and data on this machine's disk. What is relative, a hub id say, starts at `base`."""
    told: set[str] = set()

    def show(label: str, _done: int, _total: int) -> None:
        if label not in told:
            told.add(label)
            progress.say(label)

    get = partial(fetch, base=base, progress=show)
    data = recipe.data
    return Sources(
        model=get(recipe.teacher.model, where="recipe.teacher.model", kind="model"),
        train=get(data.train, where="recipe.data.train", kind="data"),
        test=get(data.test, where="recipe.data.test", kind="data") if data.test else None,
    )


@dataclass(frozen=True)
class _Lazily:
    """A module, imported at the first use."""

    module: str

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.module), name)


stages: Any = _Lazily("limbeck.stages")
teaching: Any = _Lazily("limbeck.teaching")
evaluation: Any = _Lazily("limbeck.evaluation")


@dataclass
class _Still:
    """One run's stages: for each its name, what it depends on, and what makes it."""

    run: Run
    recipe: Recipe
    progress: Progress
    sources: Sources
    _planner: Any = None

    def data(self) -> Made:
        s, recipe = self.sources, self.recipe
        test = s.test.sha256 if s.test else None
        inputs = [recipe.data, recipe.task, recipe.seed, s.model.sha256, s.train.sha256, test]

        def make(folder: Path) -> None:
            from limbeck.tasks.text_classification import prepare

            self.progress.say("reading and tokenising the data")
            prepare(recipe, s.train.path, s.test.path if s.test else None, s.model.path, folder)

        return self.run.stage("data", inputs, make)

    def budgets(self, data: Made) -> Made:
        recipe, model = self.recipe, self.sources.model
        budgets = [[student.name, student.budget] for student in recipe.students]
        return self.run.stage(
            "budgets", [data.digest, model.sha256, budgets, recipe.task, recipe.export.primary],
            lambda at: stages.check_budgets(at, recipe, model.path, data.folder),
        )  # fmt: skip

    def teacher(self, data: Made) -> Made:
        model = self.sources.model.sha256
        inputs = [data.digest, model, self.recipe.teacher.tune, self.recipe.seed, self.recipe.task]
        return self.run.stage(
            "teacher/hf", inputs,
            lambda at: stages.tune(
                at, self.recipe, self.sources.model.path, data.folder, self.progress
            ),
        )  # fmt: skip

    def codec(self, data: Made) -> dict[str, Any]:
        """Its settings, the temperature among them only where it has to know it."""
        recipe, about = self.recipe, data.json("data.json")
        num_rows = about["rows"]["train"]
        settings = codec_settings(
            recipe.signals, temperature=recipe.distill.temperature.fixed,
            vocab_size=len(about["labels"]), rows=num_rows, positions=num_rows,
        )  # fmt: skip
        refuse_unserved(recipe.distill, settings["codec"])
        return settings

    def signals(self, teacher: Made, data: Made, codec: Mapping[str, Any]) -> Made:
        recipe = self.recipe
        licences = {"teacher": self.sources.model.licence, "data": self.sources.train.licence}
        return self.run.stage(
            "signals", [teacher.digest, data.digest, codec, recipe.seed],
            lambda at: stages.capture(
                at, recipe, teacher.folder, data.folder, codec, licences, self.progress
            ),
        )  # fmt: skip

    def space(self, teacher: Made, data: Made) -> Made:
        return self.run.stage(
            "architecture", [teacher.digest, data.digest, self.recipe.seed],
            lambda at: stages.survey(
                at, self.recipe.seed, teacher.folder, data.folder, self.progress
            ),
        )  # fmt: skip

    def plan(self, student: StudentSpec, teacher: Made, space: Made) -> Made:
        recipe = self.recipe
        inputs: list[Any] = [space.digest, student.budget, recipe.export.primary]
        if student.budget.latency_ms:
            inputs += [recipe.task.max_tokens, recipe.measure]

        def make(folder: Path) -> None:
            if self._planner is None:
                self._planner = stages.Planner(recipe, teacher.folder, space.folder, self.progress)
            self._planner(folder, student)

        return self.run.stage(f"students/{student.name}/plan", inputs, make)

    def features(
        self, teacher: Made, data: Made, space: Made, plans: Mapping[str, Made]
    ) -> Made | None:
        """Hidden states and embeddings, where students learn from them: of the layers they do."""
        recipe, spec = self.recipe, self.recipe.distill
        if spec.hidden is None and spec.embedding is None:
            return None
        what = [
            spec.hidden and [spec.hidden.layers, spec.hidden.dtype],
            spec.embedding and spec.embedding.dtype,
        ]
        shapes = {name: plan.json("plan.json")["shape"] for name, plan in plans.items()}
        return self.run.stage(
            "features", [teacher.digest, data.digest, space.digest, recipe.seed, what, shapes],
            lambda at: teaching.store_features(
                at, recipe, {n: stages.read_plan(p.folder).shape for n, p in plans.items()},
                teacher.folder, space.folder, data.folder, self.progress,
            ),
        )  # fmt: skip

    def measured_teacher(self, teacher: Made, data: Made) -> Member:
        # Students are held against the teacher at its best, not against its own int8 file.
        primary = "onnx-fp32" if "onnx-fp32" in self.recipe.export.formats else "hf"
        return self._measured("teacher", teacher, data, primary)

    def _measured(self, name: str, model: Made, data: Made, primary: str) -> Member:
        recipe, top = self.recipe, name if name == "teacher" else f"students/{name}"
        formats = tuple(recipe.export.formats)
        onnx = self.run.stage(
            f"{top}/onnx", [model.digest, formats, recipe.task.max_tokens],
            lambda at: stages.export(at, recipe, model.folder, data.folder, formats),
        )  # fmt: skip
        measured = self.run.stage(
            f"{top}/measure",
            [model.digest, onnx.digest, data.digest, recipe.measure, recipe.export, primary],
            lambda at: evaluation.measure_artifacts(
                at, recipe, model.folder, onnx.folder, data.folder, name, self.progress,
                primary=primary,
            ),
        )  # fmt: skip
        return Member(name=name, primary=primary, model=model, onnx=onnx, measured=measured)

    def member(
        self, student: StudentSpec, plans: Mapping[str, Made], teacher: Made, signals: Made,
        features: Made | None, space: Made, data: Made, original: Member,
    ) -> Member:  # fmt: skip
        recipe, top = self.recipe, f"students/{student.name}"
        plan = plans[student.name]
        spec = plan.json("plan.json")
        base = [spec["shape"], teacher.digest, space.digest, data.digest, recipe.seed, recipe.task]
        training = recipe.training_of(student)

        stored = features.folder if features else None

        def make(at: Path, *, signals: Path | None, start: str, t: float | None = None) -> None:
            shape = stages.read_plan(plan.folder).shape
            teaching.distil(
                at, recipe, student, shape, teacher.folder, space.folder, signals, data.folder,
                self.progress, start=start, temperature=t, features=stored,
            )  # fmt: skip

        soft = recipe.distill.model_dump(exclude={"training"})
        taught = [*base, training, soft, signals.digest, features.digest if features else None]
        tried = chosen = None
        if recipe.distill.temperature.candidates:
            tried = self.run.stage(
                f"{top}/temperature", taught,
                lambda at: teaching.choose_temperature(
                    at, recipe, student, stages.read_plan(plan.folder).shape, teacher.folder,
                    space.folder, signals.folder, data.folder, self.progress, features=stored,
                ),
            )  # fmt: skip
            chosen = tried.json("temperature.json")["chosen"]
        model = self.run.stage(
            f"{top}/hf", [*taught, chosen],
            partial(make, signals=signals.folder, start="prefix", t=chosen),
        )  # fmt: skip
        member = self._measured(student.name, model, data, recipe.export.primary)
        assert member.measured is not None and original.measured is not None
        mine, theirs = member.measured, original.measured
        compared = self.run.stage(
            f"{top}/compare", [mine.digest, theirs.digest],
            lambda at: evaluation.compare(at, mine.folder, theirs.folder, data.folder),
        )  # fmt: skip
        baselines = {}
        if self._needs_baselines(student, plans):
            baselines["untaught"] = self._baseline(
                student, "untaught", base, data,
                lambda at: teaching.untaught(
                    at, recipe, stages.read_plan(plan.folder).shape, teacher.folder, space.folder,
                    data.folder,
                ),
            )  # fmt: skip
            for name, start in (("hard_labels", "prefix"), ("random_init", "random")):
                baselines[name] = self._baseline(
                    student, name, [*base, training, start], data,
                    partial(make, signals=None, start=start),
                )  # fmt: skip
        return Member(
            name=student.name, primary=member.primary, model=model, onnx=member.onnx,
            measured=mine, plan=plan, compared=compared, tried=tried, features=features,
            baselines=baselines,
        )  # fmt: skip

    def _baseline(
        self, student: StudentSpec, name: str, inputs: list[Any], data: Made, make: Any
    ) -> Made:
        recipe, primary = self.recipe, self.recipe.export.primary
        top = f"students/{student.name}/{name}"
        model = self.run.stage(f"{top}/hf", inputs, make)
        onnx = self.run.stage(
            f"{top}/onnx", [model.digest, primary, recipe.task.max_tokens],
            lambda at: stages.export(
                at, recipe, model.folder, data.folder, (primary,), draft=True
            ),
        )  # fmt: skip
        return self.run.stage(
            f"{top}/quality", [model.digest, onnx.digest, data.digest],
            lambda at: evaluation.quality_of(
                at, recipe, evaluation.artifact_path(model.folder, onnx.folder, primary),
                data.folder, f"{student.name}, {name}", self.progress,
            ),
        )  # fmt: skip

    def _needs_baselines(self, student: StudentSpec, plans: Mapping[str, Made]) -> bool:
        params = {name: plan.json("plan.json")["cost"]["params"] for name, plan in plans.items()}
        smallest = min(params, key=params.__getitem__)
        which = self.recipe.evidence.baselines
        return which == "all" or (which == "smallest" and student.name == smallest)

    def linear(self, data: Made) -> Made:
        return self.run.stage(
            "linear", [data.digest], lambda at: evaluation.linear(at, data.folder, self.progress)
        )
