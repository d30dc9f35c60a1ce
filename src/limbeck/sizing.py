"""Which sizes there are, and the one training that an elastic run gives them all: stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.lazily import scaling, stages
from limbeck.members import Ground
from limbeck.progress import Progress
from limbeck.recipe import Recipe, StudentSpec
from limbeck.run import Made, Run

_TOGETHER = 2  # the format of what an elastic run's training leaves


class Sizes:
    """The plans of a run's students, and of an elastic run its training and frontier."""

    def __init__(self, run: Run, recipe: Recipe, progress: Progress, ground: Ground) -> None:
        self.run, self.recipe, self.progress, self.ground = run, recipe, progress, ground
        self._planner: Any = None

    def all(self) -> dict[str, Made]:
        """Of the students that are trained; a trial decides between rivals, if there are any."""
        students, count = [s for s in self.recipe.students if s.trained], self.recipe.distill.rivals
        if count == 1:
            return {student.name: self.plan(student) for student in students}
        rivals = {student.name: self.rivals(student, count) for student in students}
        trial = self.trial(rivals)
        return {s.name: self.decided(s, rivals[s.name], trial) for s in students}

    def decided(self, student: StudentSpec, rivals: Made, trial: Made) -> Made:
        return self.run.stage(
            f"students/{student.name}/plan", [rivals.digest, trial.digest],
            lambda at: scaling.decide(at, student, rivals.folder, trial.folder),
        )  # fmt: skip

    def rivals(self, student: StudentSpec, count: int) -> Made:
        return self.run.stage(
            f"students/{student.name}/rivals", [*self._for_plan(student, self.ground.space), count],
            lambda at: scaling.plan_rivals(at, student, self._planning(), count),
        )  # fmt: skip

    def trial(self, rivals: Mapping[str, Made]) -> Made:
        recipe, names = self.recipe, [*rivals]
        inputs = [*self.ground.digests, recipe.seed, recipe.task, recipe.distill]
        trainings = [recipe.training_of(recipe.student(name)) for name in names]
        return self.run.stage(
            "trial", [*inputs, trainings, {name: rivals[name].digest for name in names}],
            lambda at: scaling.try_rivals(
                at, recipe, {name: one.folder for name, one in rivals.items()}, self.ground.places,
                self.progress,
            ),
        )  # fmt: skip

    def plan(self, student: StudentSpec) -> Made:
        return self.run.stage(
            f"students/{student.name}/plan", self._for_plan(student, self.ground.space),
            lambda at: self._planning()(at, student),
        )  # fmt: skip

    def cut(self, student: StudentSpec, frontier: Made | None) -> Made:
        """Of a student that is not trained."""
        assert frontier is not None  # the recipe checked it
        return self.run.stage(
            f"students/{student.name}/plan", self._for_plan(student, frontier),
            lambda at: scaling.plan_cut(at, student, self._planning(), frontier.folder),
        )  # fmt: skip

    def _for_plan(self, student: StudentSpec, space: Made) -> list[Any]:
        recipe = self.recipe
        inputs: list[Any] = [space.digest, student.budget, recipe.export.primary]
        budget = student.budget
        timed = budget.latency_ms or budget.energy_mj or budget.memory_mb
        return [*inputs, recipe.task, recipe.measure.of_files] if timed else inputs

    def _planning(self) -> Any:
        """One for all students: what was timed for one serves the next."""
        if self._planner is None:
            self._planner = stages.Planner(self.recipe, self.ground.places, self.progress)
        return self._planner

    def together(self, plans: Mapping[str, Made]) -> Made | None:
        """The one training of an elastic run; the largest student first."""
        recipe = self.recipe
        if recipe.distill.run == "dedicated":
            return None
        found = {name: plan.json("plan.json") for name, plan in plans.items()}
        names = sorted(found, key=lambda name: (-found[name]["cost"]["params"], name))
        trainings = {name: recipe.training_of(recipe.student(name)) for name in names}
        return self.run.stage(
            "family",
            [_TOGETHER, *self.ground.digests, recipe.seed, recipe.task, recipe.distill, trainings,
             {name: found[name]["shape"] for name in names}],
            lambda at: scaling.teach(
                at, recipe, {n: stages.read_plan(plans[n].folder).shape for n in names},
                self.ground.places, self.progress,
            ),
        )  # fmt: skip

    def frontier(self, together: Made | None) -> Made | None:
        """What shapes between the trained ones are worth."""
        if together is None:
            return None
        recipe = self.recipe
        inputs = [together.digest, *self.ground.digests]
        return self.run.stage(
            "frontier", [*inputs, recipe.seed, recipe.export.primary],
            lambda at: scaling.look(
                at, recipe, together.folder, self.ground.places, self.progress
            ),
        )  # fmt: skip
