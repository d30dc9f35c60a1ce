"""One student's own trainings: from the teacher, and those that it is held against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.findings import Member, artifact_path
from limbeck.lazily import evaluation, stages, teaching
from limbeck.progress import Progress
from limbeck.recipe import Recipe, StudentSpec
from limbeck.run import Made, Run
from limbeck.trials import Trials
from limbeck.types import Places


@dataclass(frozen=True)
class Ground:
    """What every student comes from."""

    data: Made
    teacher: Made
    signals: Made | None  # None: it is asked as it goes
    base: Made  # what they are cut from: the teacher, unless the recipe names another
    space: Made  # of the base

    @property
    def digests(self) -> list[str]:
        made = (self.data, self.teacher, self.signals, self.base, self.space)
        return [one.digest for one in made if one is not None]

    @property
    def places(self) -> Places:
        return Places(
            data=self.data.folder, teacher=self.teacher.folder,
            signals=self.signals.folder if self.signals else None,
            base=self.base.folder, space=self.space.folder,
        )  # fmt: skip


class Taught:
    """The trainings of one student; each is a stage of the run."""

    def __init__(
        self, run: Run, recipe: Recipe, progress: Progress, student: StudentSpec, plan: Made,
        ground: Ground, features: Made | None, original: Member, trials: Trials,
    ) -> None:  # fmt: skip
        """`original` is the teacher, measured."""
        self.original, self.trials = original, trials
        self.run, self.recipe, self.progress = run, recipe, progress
        self.student, self.plan, self.ground, self.features = student, plan, ground, features
        self.training = recipe.training_of(student)
        self.start = [
            plan.json("plan.json")["shape"], ground.base.digest, ground.space.digest,
            ground.data.digest, recipe.seed, recipe.task,
        ]  # fmt: skip
        soft = recipe.distill.model_dump(exclude={"training", "run"})
        stored = features.digest if features else None
        signals = ground.signals.digest if ground.signals else None
        taught = [ground.teacher.digest, signals, stored]
        self.inputs = [*self.start, self.training, soft, *taught]

    def shape(self) -> Any:
        return stages.read_plan(self.plan.folder).shape

    def tried(self) -> Made | None:
        """Temperatures, where the recipe leaves the choice."""
        recipe, ground = self.recipe, self.ground
        if not recipe.distill.temperature.candidates:
            return None
        return self.run.stage(
            f"students/{self.student.name}/temperature", self.inputs,
            lambda at: teaching.choose_temperature(
                at, recipe, self.student, self.shape(), ground.places, self.progress,
                features=self.features.folder if self.features else None,
            ),
        )  # fmt: skip

    def model(self, tried: Made | None) -> Made:
        chosen = tried.json("temperature.json")["chosen"] if tried else None
        return self.run.stage(
            f"students/{self.student.name}/hf", [*self.inputs, chosen],
            partial(self._train, taught=True, start="prefix", temperature=chosen),
        )

    def baselines(self) -> dict[str, Made]:
        recipe, ground = self.recipe, self.ground
        found = {
            "untaught": self._held_against(
                "untaught", self.start,
                lambda at: teaching.untaught(at, recipe, self.shape(), ground.places),
            )
        }
        starts = {"hard_labels": "prefix"}
        if recipe.evidence.random_init:
            starts["random_init"] = "random"
        for name, start in starts.items():
            found[name] = self._held_against(
                name, [*self.start, self.training, start, recipe.distill.quantization_aware],
                partial(self._train, taught=False, start=start),
            )
        return found

    def dedicated(self) -> Made:
        """Alone, where the student itself comes from an elastic run."""
        make = partial(self._train, taught=True, start="prefix")
        return self._held_against("dedicated", self.inputs, make)

    def _held_against(self, name: str, inputs: list[Any], make: Any) -> Made:
        """A training's model, exported and asked as the student itself is."""
        recipe, primary, data = self.recipe, self.recipe.export.primary, self.ground.data
        top = f"students/{self.student.name}/{name}"
        model = self.run.stage(f"{top}/hf", inputs, make)
        onnx = self.run.stage(
            f"{top}/{recipe.task.files}", [model.digest, primary, recipe.task],
            lambda at: stages.export(
                at, recipe, model.folder, data.folder, (primary,), draft=True
            ),
        )  # fmt: skip
        self.trials.of(f"{self.student.name}/{name}", top, model, onnx, primary)
        return self.run.stage(
            f"{top}/quality",
            [model.digest, onnx.digest, data.digest, self.original.measured.digest],
            lambda at: evaluation.quality_of(
                at, recipe, artifact_path(model.folder, onnx.folder, primary), data.folder,
                self.original.said, f"{self.student.name}, {name}", self.progress,
            ),
        )  # fmt: skip

    def _train(
        self, at: Path, *, taught: bool, start: str, temperature: float | None = None
    ) -> None:
        teaching.distil(
            at, self.recipe, self.student, self.shape(), self.ground.places, self.progress,
            taught=taught, start=start, temperature=temperature,
            features=self.features.folder if self.features else None,
        )  # fmt: skip
