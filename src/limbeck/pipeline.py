"""The still, in order. Each stage is skipped when its inputs have not changed since it last ran.

    recipe -> sources -> model -> data -> budgets -> teacher -> signals -> space -> plan -> distil
           -> export -> measure -> report

What the stages do (and with it torch) is imported only when one really runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from limbeck.energy import CodecarbonMeter
from limbeck.errors import RecipeError
from limbeck.fetching import Sources, fetch_sources, remade
from limbeck.findings import Member, assemble, write_cards
from limbeck.lazily import evaluation, scaling, stages, teaching
from limbeck.members import Ground, Taught
from limbeck.progress import Progress, Silent
from limbeck.recipe import Recipe, StudentSpec
from limbeck.recipe_file import RECIPE, load_recipe, rebase, validate
from limbeck.report import Report, write_report
from limbeck.run import Made, Meter, Run, open_run, write_text
from limbeck.signals.choose import codec_settings, refuse_unserved, sizes_of
from limbeck.sizing import Sizes
from limbeck.trials import Trials, require_extras

_SURVEY = 4  # the format of what the stage `architecture` leaves


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
    require_extras(recipe)
    with open_run(out, recipe, meter or CodecarbonMeter(), repair=repair) as run:
        run.on_stage(lambda name, reused: progress.say(f"{name}: unchanged" if reused else name))
        still = _Still(run, recipe, progress, fetch_sources(recipe, progress, base))
        recipe = still.settled()
        still.model()
        data = still.data()
        own = still.own_data(data)
        still.trials.prepare(still.sources, data, own)
        still.budgets(own)
        codec = still.codec(data)
        teacher = still.teacher(data)
        signals = still.signals(teacher, data, codec) if codec else None
        cut_from = still.base(teacher, own)
        space = still.space(cut_from, own)
        ground = Ground(own, teacher, signals, cut_from, space)
        sizes = Sizes(run, recipe, progress, ground)
        plans = sizes.all()
        features = still.features(ground, plans)
        together = sizes.together(plans)
        frontier = sizes.frontier(together)
        for student in recipe.students:
            if not student.trained:
                plans[student.name] = sizes.cut(student, frontier)
        original = still.measured_teacher(teacher, data)
        family = {
            student.name: still.member(student, plans, ground, features, together, original)
            for student in recipe.students
        }
        linear = still.linear(data) if recipe.linear else None
        report = assemble(
            run, recipe, own, space, original, family, together, frontier, linear,
            still.trials.texts(), still.trials.benchmarks(),
        )  # fmt: skip
        write_report(report, run.folder)
        write_cards(report, run.folder, still.sources.model, still.sources.train)
        return report


def scale(
    run: Path, name: str, budget: Mapping[str, float], *, progress: Progress | None = None
) -> Report:
    """One more student of a finished elastic run: into its recipe, and the recipe again, in which
    all else is unchanged."""
    recipe, base = load_recipe(run)
    if recipe.distill.run != "elastic":
        raise RecipeError(
            "recipe.distill.run", f"{run} trained each student alone: nothing lies between them",
            allowed="elastic", fix="distil again with `--set distill.run=elastic`",
        )  # fmt: skip
    students = [s.model_dump(mode="json", exclude_none=True) for s in recipe.students]
    more = {"name": name, "budget": dict(budget), "trained": False}
    wanted = validate({**recipe.model_dump(mode="json"), "students": [*students, more]})
    before = (run / RECIPE).read_text(encoding="utf-8")
    try:
        return distill(wanted, run, base=base, progress=progress)
    except RecipeError:  # a budget that cannot be kept: the run stays as it was
        write_text(run / RECIPE, before)
        raise


@dataclass
class _Still:
    """One run's stages: for each its name, what it depends on, and what makes it."""

    run: Run
    recipe: Recipe
    progress: Progress
    sources: Sources

    @cached_property
    def trials(self) -> Trials:
        return Trials(self.run, self.recipe, self.progress)

    def settled(self) -> Recipe:
        """With the precision that this run's first machine was fast in: it stays the run's own."""
        asked = self.recipe.precisions
        if "auto" in asked and not self.recipe.task.has_tokens:
            self.recipe = self.recipe.in_precision("fp32")  # bf16 is slow in convolutions
        elif asked != {"fp32"}:
            made = self.run.stage("precision", [], lambda at: stages.measure_precisions(at))
            took = made.json("precision.json")
            fp32, bf16 = took["milliseconds"]["fp32"], took["milliseconds"]["bf16"]
            times = f"bf16 takes {bf16 / fp32:.2g} times as long as fp32"
            if "auto" in asked:
                self.progress.say(f"precision: {took['faster']}, as {times}")
            elif took["faster"] == "fp32":
                self.progress.say(f"precision: bf16 was asked for, but {times}; `auto` chooses")
            self.recipe = self.recipe.in_precision(took["faster"])
        return self.recipe

    def model(self) -> None:
        """The teacher made ready: from a GGUF file, with fewer tokens."""
        model, train = self.sources.model, self.sources.train
        if not remade(self.recipe, model.path):
            return
        recipe = self.recipe
        inputs: list[Any] = [model.sha256, recipe.task]
        if recipe.teacher.trim_vocabulary:
            which = recipe.data.model_dump(exclude={"max_train_rows", "max_test_rows"})
            inputs += [train.sha256, which, recipe.seed]  # of those that are left, all texts
        made = self.run.stage(
            "model", inputs, lambda at: stages.make_model(at, recipe, model.path, train.path)
        )
        plain = replace(model, path=made.folder, sha256=made.digest)
        self.sources = replace(self.sources, model=plain)

    def data(self) -> Made:
        s, recipe = self.sources, self.recipe
        test = s.test.sha256 if s.test else None
        inputs = [recipe.data, recipe.task, recipe.seed, s.model.sha256, s.train.sha256, test]

        def make(folder: Path) -> None:
            from limbeck.tasks.task import prepare

            self.progress.say("reading and preparing the data")
            prepare(recipe, s.train.path, s.test.path if s.test else None, s.model.path, folder)

        return self.run.stage("data", inputs, make)

    def own_data(self, data: Made) -> Made:
        """In the students' tokens, where those are others than the teacher's."""
        s, recipe = self.sources, self.recipe
        if not recipe.of_another_tokenizer:
            return data
        assert s.base is not None  # the recipe checked it
        base, test = s.base.path, s.test.path if s.test else None
        return self.run.stage(
            "base/data", [data.digest, recipe.data, recipe.task, recipe.seed, s.base.sha256],
            lambda at: stages.prepare_own(at, recipe, s.train.path, test, base, data.folder),
        )  # fmt: skip

    def budgets(self, data: Made) -> Made:
        recipe, model, base = self.recipe, self.sources.model, self.sources.base
        budgets = [[student.name, student.budget] for student in recipe.students if student.trained]
        return self.run.stage(
            "budgets",
            [data.digest, model.sha256, budgets, recipe.task, recipe.export.primary, recipe.base],
            lambda at: stages.check_budgets(
                at, recipe, model.path, base and base.path, data.folder
            ),
        )  # fmt: skip

    def teacher(self, data: Made) -> Made:
        model = self.sources.model.sha256
        spec = self.recipe.teacher
        inputs: list[Any] = [data.digest, model, spec.tune, self.recipe.seed, self.recipe.task]
        inputs += [spec.estimator] if spec.estimator else []
        return self.run.stage(
            "teacher/hf", inputs,
            lambda at: stages.tune(
                at, self.recipe, self.sources.model.path, data.folder, self.progress
            ),
        )  # fmt: skip

    def codec(self, data: Made) -> dict[str, Any] | None:
        """Its settings, the temperature among them only where it has to know it; None where no
        signals are stored."""
        recipe = self.recipe
        if recipe.of_another_tokenizer:
            return None
        settings = codec_settings(
            recipe.signals, temperature=recipe.distill.temperature.fixed,
            **sizes_of(data.json("data.json")),
        )
        refuse_unserved(recipe.distill, settings["codec"])
        return settings

    def signals(self, teacher: Made, data: Made, codec: Mapping[str, Any]) -> Made:
        recipe = self.recipe
        licences = {"teacher": self.sources.model.licence, "data": self.sources.train.licence}
        precision = recipe.distill.training.precision
        lower = [] if precision == "fp32" else [precision]
        return self.run.stage(
            "signals", [teacher.digest, data.digest, codec, recipe.seed, *lower],
            lambda at: stages.capture(
                at, recipe, teacher.folder, data.folder, codec, licences, self.progress
            ),
        )  # fmt: skip

    def base(self, teacher: Made, data: Made) -> Made:
        """What students are cut from."""
        recipe, model = self.recipe, self.sources.base
        if recipe.base is None:
            return teacher
        inputs = [teacher.digest, data.digest, recipe.base.config, model and model.sha256]
        return self.run.stage(
            "base/hf", [*inputs, recipe.seed, recipe.task],
            lambda at: stages.make_base(
                at, recipe, teacher.folder, model and model.path, data.folder
            ),
        )  # fmt: skip

    def space(self, base: Made, data: Made) -> Made:
        recipe = self.recipe
        return self.run.stage(
            "architecture",
            [_SURVEY, base.digest, data.digest, recipe.seed, recipe.importance,
             recipe.distill.training.precision],
            lambda at: stages.survey(
                at, recipe, base.folder, data.folder, self.progress
            ),
        )  # fmt: skip

    def features(self, ground: Ground, plans: Mapping[str, Made]) -> Made | None:
        """Hidden states and embeddings, where students learn from them: of the layers they do."""
        recipe, spec = self.recipe, self.recipe.distill
        if spec.hidden is None and spec.embedding is None:
            return None
        what = [
            spec.hidden and [spec.hidden.layers, spec.hidden.dtype],
            spec.embedding and spec.embedding.dtype,
        ]
        shapes = {name: plan.json("plan.json")["shape"] for name, plan in plans.items()}
        made = (ground.teacher, ground.base, ground.data, ground.space)
        inputs = [*[one.digest for one in made], recipe.seed]
        return self.run.stage(
            "features", [*inputs, what, shapes],
            lambda at: teaching.store_features(
                at, recipe, {n: stages.read_plan(p.folder).shape for n, p in plans.items()},
                ground.places, self.progress,
            ),
        )  # fmt: skip

    def measured_teacher(self, teacher: Made, data: Made) -> Member:
        # Students are held against the teacher at its best, not against its own int8 file.
        exact = "onnx-fp32" in self.recipe.export.formats and self.recipe.task.has_labels
        primary = "onnx-fp32" if exact else "hf"
        if self.recipe.teacher.estimator is not None:  # deployed as it is
            return self._measured("teacher", teacher, data, "skops", ("skops",), ())
        return self._measured("teacher", teacher, data, primary)

    def _measured(
        self, name: str, model: Made, data: Made, primary: str,
        formats: tuple[str, ...] | None = None, written: tuple[str, ...] | None = None,
    ) -> Member:  # fmt: skip
        """The model in these formats, of which some have to be `written` first; as the recipe says
        unless they are given."""
        recipe, top = self.recipe, name if name == "teacher" else f"students/{name}"
        formats = formats or tuple(recipe.export.formats)
        written = formats if written is None else written
        onnx = self.run.stage(
            f"{top}/{recipe.task.files}", [model.digest, written, recipe.task],
            lambda at: stages.export(at, recipe, model.folder, data.folder, written),
        )  # fmt: skip
        measured = self.run.stage(
            f"{top}/measure",
            [model.digest, onnx.digest, data.digest, recipe.measure.of_files, recipe.export,
             primary],
            lambda at: evaluation.measure_artifacts(
                at, recipe, model.folder, onnx.folder, data.folder, name, self.progress,
                primary=primary, formats=formats,
            ),
        )  # fmt: skip
        self.trials.of(name, top, model, onnx, primary)
        return Member(name=name, primary=primary, model=model, onnx=onnx, measured=measured)

    def member(
        self, student: StudentSpec, plans: Mapping[str, Made], ground: Ground,
        features: Made | None, together: Made | None, original: Member,
    ) -> Member:  # fmt: skip
        recipe, top, plan = self.recipe, f"students/{student.name}", plans[student.name]
        taught = Taught(
            self.run, recipe, self.progress, student, plan, ground, features, original,
            self.trials,
        )  # fmt: skip
        tried = taught.tried() if together is None else None
        if together is None:
            model = taught.model(tried)
        else:
            model = self.run.stage(
                f"{top}/hf", [together.digest, *taught.start],
                lambda at: scaling.extract(
                    at, recipe, taught.shape(), together.folder, ground.places
                ),
            )  # fmt: skip
        member = self._measured(student.name, model, ground.data, recipe.export.primary)
        compare = evaluation.compare
        if recipe.of_another_tokenizer:
            compare = partial(evaluation.compare_texts, teachers=self.run.folder / "data")
        compared = self.run.stage(
            f"{top}/compare", [member.measured.digest, original.measured.digest],
            lambda at: compare(
                at, recipe, member.said, original.said, ground.data.folder, self.progress
            ),
        )  # fmt: skip
        baselines = taught.baselines() if self._needs_baselines(student, plans) else {}
        if student.name in recipe.evidence.dedicated:
            baselines["dedicated"] = taught.dedicated()
        return Member(
            name=student.name, primary=member.primary, model=model, onnx=member.onnx,
            measured=member.measured, plan=plan, compared=compared, tried=tried, features=features,
            baselines=baselines,
        )  # fmt: skip

    def _needs_baselines(self, student: StudentSpec, plans: Mapping[str, Made]) -> bool:
        """A student that was not trained has none: nothing was spent on it."""
        params = {
            s.name: plans[s.name].json("plan.json")["cost"]["params"]
            for s in self.recipe.students if s.trained
        }  # fmt: skip
        smallest = min(params, key=params.__getitem__)
        which = self.recipe.evidence.baselines
        return (which == "all" and student.trained) or (
            which == "smallest" and student.name == smallest
        )

    def linear(self, data: Made) -> Made:
        return self.run.stage(
            "linear", [data.digest],
            lambda at: evaluation.linear(at, self.recipe, data.folder, self.progress),
        )
