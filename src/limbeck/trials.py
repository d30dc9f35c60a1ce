"""What language models are put to beside the test rows: texts that they write, public benchmarks.

Each model has a stage of its own, so that a new setting measures no file anew.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

from limbeck import benchmarks
from limbeck.errors import MissingExtraError
from limbeck.fetching import Sources
from limbeck.findings import artifact_path
from limbeck.lazily import texts
from limbeck.progress import Progress
from limbeck.recipe import Recipe
from limbeck.report import Benchmark, Benchmarks, TextExample, Texts, TextScores
from limbeck.run import Made, Run

_EXAMPLES = 6  # texts that the report shows
_RIVALS = ("hard_labels", "dedicated")  # baselines that write too; others write nonsense


def require_extras(recipe: Recipe) -> None:
    """Raises MissingExtraError now, not behind an hour of training."""
    wanted = ("rouge_score", "sacrebleu") if recipe.measure.generate else ()
    if not all(util.find_spec(module) for module in wanted):
        raise MissingExtraError.of("recipe.measure.generate", "lm")
    if recipe.measure.benchmarks is not None:
        benchmarks.version()


class Trials:
    """The stages of one run, and what came of them by the model's name."""

    def __init__(self, run: Run, recipe: Recipe, progress: Progress) -> None:
        self.run, self.recipe, self.progress = run, recipe, progress
        self.prompts: Made | None = None
        self.written: dict[str, Made] = {}
        self.tasks: Made | None = None
        self.own: Path | None = None  # a folder of the user's own tasks
        self.scored: dict[str, Made] = {}

    def prepare(self, sources: Sources, data: Made, own: Made) -> None:
        """Before anything is trained. `own` are the data in the students' tokens."""
        recipe, model, base = self.recipe, sources.model, sources.base
        if (spec := recipe.measure.benchmarks) is not None:
            own_tasks = sources.benchmarks
            self.own, digest = (own_tasks.path, own_tasks.sha256) if own_tasks else (None, None)
            asked = spec.model_dump(mode="json", exclude={"folder"})
            self.tasks = self.run.stage(
                "benchmarks", [asked, digest, benchmarks.version()],
                lambda at: benchmarks.check(at, spec, self.own, digest),
            )  # fmt: skip
        if recipe.measure.generate is None:
            return
        source = sources.test or sources.train
        made_from = [data.digest, own.digest, model.sha256, base and base.sha256, recipe.base]
        self.prompts = self.run.stage(
            "prompts", [*made_from, recipe.measure.generate, recipe.seed],
            lambda at: texts.choose(
                at, recipe, source.path, data.folder, own.folder, model.path, base and base.path
            ),
        )  # fmt: skip

    def of(self, name: str, top: str, model: Made, files: Made, format: str) -> None:
        """Of a model whose stages are below `top`: its file of this format. Baselines are called
        `STUDENT/BASELINE`."""
        rival = name.partition("/")[2]
        if self.tasks is not None and not rival:
            self.scored[name] = self._scores(name, top, model, self.tasks)
        recipe, prompts = self.recipe, self.prompts
        if prompts is None or (rival and rival not in _RIVALS):
            return
        path = artifact_path(model.folder, files.folder, format)
        self.written[name] = self.run.stage(
            f"{top}/texts",
            [model.digest, files.digest, prompts.digest, format, recipe.measure.generate],
            lambda at: texts.write(
                at, recipe, path, format, prompts.folder, name, self.progress,
                of_teacher=name == "teacher",
            ),
        )  # fmt: skip

    def _scores(self, name: str, top: str, model: Made, tasks: Made) -> Made:
        spec = self.recipe.measure.benchmarks
        assert spec is not None

        def make(at: Path) -> None:
            self.progress.say(f"{name}: lm-eval asks it {', '.join(spec.tasks)}")
            benchmarks.run(at, spec, self.own, model.folder)

        return self.run.stage(f"{top}/benchmarks", [model.digest, tasks.digest], make)

    def benchmarks(self) -> Benchmarks | None:
        """As the report has them."""
        if self.tasks is None:
            return None
        spec = self.recipe.measure.benchmarks
        assert spec is not None
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for name, made in self.scored.items():
            for entry in made.json("scores.json"):
                score = {key: entry.pop(key) for key in ("value", "stderr", "n")}
                key = (entry["task"], entry["metric"], str(entry["filter"]))
                found.setdefault(key, entry | {"scores": {}})["scores"][name] = score
        return Benchmarks(
            lm_eval=self.tasks.json("tasks.json")["lm_eval"], limit=spec.limit,
            results=tuple(map(Benchmark.model_validate, found.values())),
        )  # fmt: skip

    def texts(self) -> Texts | None:
        """As the report has them."""
        if self.prompts is None:
            return None
        spec = self.recipe.measure.generate
        assert spec is not None
        known = self.prompts.json("prompts.json")
        found = {name: made.json("texts.json") for name, made in self.written.items()}
        shown = {name: texts["written"] for name, texts in found.items() if "/" not in name}
        examples = [
            TextExample(
                prompt=prompt["prompt"], reference=prompt["reference"],
                written={name: written[i] for name, written in shown.items()},
            )
            for i, prompt in enumerate(known["prompts"][:_EXAMPLES])
        ]  # fmt: skip
        return Texts(
            max_new_tokens=spec.max_new_tokens, examples=tuple(examples),
            scores={n: TextScores.model_validate(texts["scores"]) for n, texts in found.items()},
            notes=tuple(known["notes"]),
        )  # fmt: skip
