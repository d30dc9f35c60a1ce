"""The verbs, as functions. Heavy imports happen inside: `limbeck --help` needs none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.architecture.axes import Axis
    from limbeck.chatting import Chat
    from limbeck.progress import Progress
    from limbeck.recipe import Recipe
    from limbeck.report import Report
    from limbeck.scaling import LoadedFamily
    from limbeck.signals.verify import Verification
    from limbeck.types import Plan

    AnyRecipe = str | Path | Recipe | Mapping[str, Any]


def distill(
    recipe: AnyRecipe, out: str | Path, *, overrides: Sequence[str] = (),
    repair: bool = False, progress: Progress | None = None, teacher: Any = None,
    train: Any = None, test: Any = None,
) -> Report:  # fmt: skip
    """Distil the recipe's teacher into its family of students, in the folder `out`.

    `recipe` is a built-in name, a file, a Recipe, or what its YAML would hold as a dict;
    `overrides` are `a.b=c` as with `--set`, for a name or a file.
    `teacher` is a fitted scikit-learn estimator in place of the recipe's teacher (extra 'tabular').
    `train` and `test` are tables in place of `data.train` and `data.test`: of pandas, pyarrow,
    polars, or whatever else speaks Arrow.
    Raises LimbeckError subclasses; an unmet budget stands in the report.
    """
    from limbeck import pipeline

    given: dict[str, Any] = {}
    if train is not None or test is not None or teacher is not None:
        from limbeck.tasks import given as kept

        tables = {"train": train, "test": test}
        data = {n: kept.keep_table(t, f"distill({n}=...)") for n, t in tables.items()
                if t is not None}  # fmt: skip
        given = {"data": data} if data else {}
        if teacher is not None:
            given["teacher"] = kept.keep_estimator(teacher, "distill(teacher=...)")
    loaded, base = _load(recipe, overrides, given)
    return pipeline.distill(loaded, Path(out), base=base, repair=repair, progress=progress)


def plan(
    recipe: AnyRecipe, *, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Plan:
    """Before any training: each student's shape, parameters, predicted size and latency, and what
    the stored signals will take."""
    from limbeck import planning

    loaded, base = _load(recipe, overrides)
    return planning.plan(loaded, base, progress)


def load_report(run: str | Path) -> Report:
    """The report of a finished run."""
    from limbeck.report import read_report

    return read_report(Path(run))


def list_recipes() -> dict[str, Path]:
    """The built-in recipes by name."""
    from limbeck.recipe_file import built_in_recipes

    return built_in_recipes()


def axes(model: str | Path, *, progress: Progress | None = None) -> tuple[Axis, ...]:
    """What of a model can be made smaller: each axis proved on its weights, or the reason why not.

    `model` is a folder or a source, as a recipe's `teacher.model`. Raises SourceError, AxisError.
    """
    from limbeck import anatomy
    from limbeck.progress import Silent

    return anatomy.axes_of(str(model), progress or Silent())


def scale(
    run: str | Path, *, name: str, budget: Mapping[str, float], progress: Progress | None = None
) -> Report:
    """Add a student to a finished elastic run, cut between its sizes with no training.

    `budget` has the keys of a recipe's: params, size_mb, latency_ms. The run's recipe has it from
    then on. Raises RecipeError for a run that is not elastic or a budget that none of its shapes
    keeps.
    """
    from limbeck import pipeline

    return pipeline.scale(Path(run), name, budget, progress=progress)


def load_family(run: str | Path) -> LoadedFamily:
    """The trained weights of an elastic run: `cut(params="3M")` gives a model of its own.

    Raises RunFolderError where the folder holds none.
    """
    from limbeck import scaling

    return scaling.LoadedFamily(Path(run))


def try_student(student: str | Path, what: str) -> list[tuple[str, float]]:
    """(label, probability), most probable first, from an exported file or its folder.

    `what` is a text, or the path of an image for a model of images."""
    from limbeck import trying

    return trying.classify(Path(student), what)


def write_with(
    student: str | Path, prompt: str, *, max_new_tokens: int = 60
) -> Iterator[str] | None:
    """What an exported language model writes after the prompt, piece by piece as it is written.

    None for a model that classifies. Raises SourceError, DataError."""
    from limbeck import trying

    return trying.write(Path(student), prompt, max_new_tokens)


def chat_with(
    student: str | Path, *, system: str | None = None, max_new_tokens: int = 256,
    sampling_temperature: float = 0.0, seed: int = 0,
) -> Chat:  # fmt: skip
    """A conversation with an exported language model: `chat.say(text)` streams an answer.

    Temperature 0 is the likeliest token each time. Raises SourceError, DataError."""
    from limbeck import chatting
    from limbeck.generating import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens, sampling_temperature=sampling_temperature, seed=seed
    )
    return chatting.Chat.of(Path(student), sampling, system)


def describe_signals(folder: str | Path) -> dict[str, str]:
    """What a capture holds and what it was made from; `folder` is a run's or the capture's own."""
    from limbeck import keeping

    return keeping.describe(Path(folder))


def verify_signals(folder: str | Path, *, rows: int = 64) -> tuple[int, Verification | None]:
    """Check every checksum, and rows drawn at random against the teacher where the run has it.

    (shards checked, comparison). Raises DamagedError and DataError.
    """
    from limbeck import keeping

    return keeping.check(Path(folder), rows)


def prune_signals(folder: str | Path) -> dict[Path, int]:
    """Remove files that are no part of the capture; each with its bytes."""
    from limbeck import keeping

    return keeping.prune(Path(folder))


def doctor() -> dict[str, Any]:
    """What this installation can do: versions, extras, devices, cache."""
    from limbeck import checkup

    return checkup.examine()


def _load(
    recipe: AnyRecipe, overrides: Sequence[str], given: Mapping[str, Any] | None = None
) -> tuple[Recipe, Path]:
    """`given` are sections that take the place of the recipe's, which may then lack them as a dict;
    of `data` only what is named."""
    from limbeck.recipe import Recipe
    from limbeck.recipe_file import load_recipe, validate

    if isinstance(recipe, Mapping):
        whole, base = dict(recipe), Path.cwd()
    elif isinstance(recipe, Recipe):
        whole, base = recipe.model_dump(mode="json"), Path.cwd()
    else:
        loaded, base = load_recipe(recipe, overrides)
        if not given:
            return loaded, base
        whole = loaded.model_dump(mode="json")
    for section, values in (given or {}).items():
        whole[section] = {**(whole.get("data") or {}), **values} if section == "data" else values
    return validate(whole), base
