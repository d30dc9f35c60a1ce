"""A teacher that only answers: a scikit-learn estimator with `predict_proba`, saved by skops.

skops loads no type that was not allowed; pickles are never read. In a run the file lies beside
`estimator.json`, which says how a row reaches the estimator and its answer comes back. It is run by
`runtime_worker`, here and when it is timed alike.
"""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import MissingExtraError, RecipeError, SourceError
from limbeck.progress import Progress
from limbeck.recipe_teacher import EstimatorSpec
from limbeck.run import file_sha256, replaced, write_json
from limbeck.runtime import load_predictor
from limbeck.runtime_worker import ESTIMATOR
from limbeck.tasks.arrays import ArrayClassification, Rows
from limbeck.teachers.blackbox import BlackBox

MODEL = "model.skops"
FORMAT = "skops"
# Forests give plain zeros, whose logarithm nobody can learn. As large as the share of one row in a
# hundred leaves of ten thousand: far below what a student is taught at any usual temperature.
FLOOR = 1e-6
_WHERE = "recipe.teacher.estimator"
_PICKLES = (".pkl", ".pickle", ".joblib", ".sav", ".dill", ".cloudpickle")
_CATEGORIES = 254  # more values of a column are numbers to HistGradientBoosting


def make_estimator(
    folder: Path, spec: EstimatorSpec, source: Path, task: ArrayClassification, seed: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Fill the folder with the estimator: the source's, or one that is fitted on the task's rows.

    Raises SourceError for a file that is no such estimator of the task's columns and labels,
    RecipeError for a setting that scikit-learn does not know.
    """
    try:
        import skops.io
    except ImportError as error:
        raise MissingExtraError.of("teacher.estimator", "tabular") from error
    if spec.kind is None:
        model = _load(source, spec)
        about = _answers(model, task)
        trusted = [*spec.trusted]
    else:
        model, fitted = _fit(spec, task, seed, progress)
        about = _answers(model, task) | fitted
        trusted = skops.io.get_untrusted_types(data=skops.io.dumps(model))
        assert all(name.startswith(("sklearn.", "functools.")) for name in trusted), trusted
    save_estimator(model, folder / MODEL)
    write_json(folder / ESTIMATOR, {"trusted": trusted, "floor": FLOOR, **about})
    # It answers for each label, by the very file that is asked from now on.
    logits = load_predictor(folder / MODEL, FORMAT, threads=1)(
        {name: array[:2] for name, array in task.rows("train").arrays.items()}
    )
    if logits.shape[1] != len(task.labels) or not np.isfinite(logits).all():
        raise SourceError(
            f"{_WHERE}.model", f"predict_proba gives {logits.shape[1]} numbers, or no numbers",
            allowed=f"{len(task.labels)} probabilities", fix="check the estimator",
        )  # fmt: skip


def save_estimator(model: Any, path: Path) -> None:
    """As skops writes it, compressed; the same estimator gives the same bytes.

    skops names an object by its address in memory, and an archive has the time of day.
    """
    import skops.io

    numbers: dict[int, int] = {}

    def renamed(node: Any) -> Any:
        if isinstance(node, list):
            return [renamed(one) for one in node]
        if not isinstance(node, dict):
            return node
        found = {name: renamed(value) for name, value in node.items()}
        if isinstance(found.get("__id__"), int):
            found["__id__"] = numbers.setdefault(found["__id__"], len(numbers))
        if isinstance(found.get("file"), str):
            found["file"] = file(found["file"])
        return found

    def file(name: str) -> str:
        address, dot, ending = name.partition(".")
        if not address.isdigit():
            return name
        return f"{numbers.setdefault(int(address), len(numbers))}{dot}{ending}"

    with replaced(path) as aside, zipfile.ZipFile(io.BytesIO(skops.io.dumps(model))) as made:
        schema = renamed(json.loads(made.read("schema.json")))
        contents = {file(name): name for name in made.namelist() if name != "schema.json"}
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as written:
            for name in sorted(contents):
                written.writestr(zipfile.ZipInfo(name), made.read(contents[name]),
                                 zipfile.ZIP_DEFLATED)  # fmt: skip
            text = json.dumps(schema, indent=1)
            written.writestr(zipfile.ZipInfo("schema.json"), text, zipfile.ZIP_DEFLATED)


def is_estimator(folder: Path) -> bool:
    return (folder / ESTIMATOR).is_file()


def black_box(folder: Path) -> BlackBox:
    """The folder's estimator, to be asked."""
    path = folder / MODEL
    return BlackBox(load_predictor(path, FORMAT, threads=1), file_sha256(path))


def _load(path: Path, spec: EstimatorSpec) -> Any:
    import skops.io

    where = f"{_WHERE}.model"
    if path.suffix.lower() in _PICKLES:
        raise SourceError(
            where, f"{path.name} is a pickle, which can run anybody's code when it is read",
            allowed="a .skops file", fix="if you trust it: skops.io.dump(estimator, 'it.skops')",
        )  # fmt: skip
    try:
        unknown = sorted({*skops.io.get_untrusted_types(file=path)} - {*spec.trusted})
    except Exception as error:  # zipfile's, json's, its own
        raise SourceError(
            where, f"{path.name} is not readable by skops: {str(error)[:200] or repr(error)}",
            allowed="what skops.io.dump writes", fix="save it again",
        ) from error  # fmt: skip
    if unknown:
        raise SourceError(
            where, f"{path.name} holds types that are not allowed: {', '.join(unknown)}",
            allowed=", ".join(spec.trusted) or "what skops knows to be harmless",
            fix="if you trust the file and these types, name them in teacher.estimator.trusted",
        )  # fmt: skip
    try:
        return skops.io.load(path, trusted=[*spec.trusted])
    except Exception as error:
        raise SourceError(
            where, f"{path.name} does not load: {str(error)[:200] or repr(error)}",
            allowed="an estimator of the installed scikit-learn", fix="save it again with that",
        ) from error  # fmt: skip


def _answers(model: Any, task: ArrayClassification) -> dict[str, Any]:
    """How a row reaches it, and which of its answers is which label's. Raises SourceError."""
    where, columns = f"{_WHERE}.model", task.about
    if not callable(getattr(model, "predict_proba", None)):
        raise SourceError(
            where, f"a {type(model).__name__} gives no probabilities",
            allowed="a fitted classifier with predict_proba",
            fix="choose another; an SVC wants probability=True",
        )  # fmt: skip
    classes = [str(label) for label in getattr(model, "classes_", ())]
    if sorted(classes) != sorted(task.labels):
        raise SourceError(
            where, f"it knows {', '.join(classes[:8]) or 'no classes: it is not fitted'}",
            allowed=f"the data's labels: {', '.join(task.labels[:8])}",
            fix="check data.label, or fit it on these labels",
        )  # fmt: skip
    order = [classes.index(label) for label in task.labels]
    values = {one["name"]: one["values"] for one in columns["categories"]}
    numbers = [one["name"] for one in columns["numbers"]]
    known = [*numbers, *values]
    if (names := getattr(model, "feature_names_in_", None)) is not None:
        wanted = [str(name) for name in names]
        if sorted(wanted) != sorted(known):
            raise SourceError(
                where, f"it was fitted on columns {', '.join(wanted[:12])}",
                allowed=f"the task's: {', '.join(known[:12])}",
                fix="name its columns in task.numbers and task.categories",
            )  # fmt: skip
        return {"order": order, "columns": wanted, "numbers": numbers, "values": values}
    count = getattr(model, "n_features_in_", len(known))
    if count != len(known):
        raise SourceError(
            where, f"it was fitted on {count} columns", allowed=f"the task's {len(known)}",
            fix="name its columns in task.numbers, in the order of its array",
        )  # fmt: skip
    return {"order": order, "columns": None, "numbers": numbers, "values": values}


def _fit(
    spec: EstimatorSpec, task: ArrayClassification, seed: int, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """The best of the combinations, and what each reached on the validation rows."""
    train, validation = task.rows("train"), task.rows("validation")
    tries = [*_combinations(spec)]
    found: list[dict[str, Any]] = []
    best: Any = None
    with progress.bar("estimator", len(tries), "fits") as bar:
        for settings in tries:
            model = _classifier(spec, settings, seed, train)
            try:
                model.fit(_table(train), [task.labels[i] for i in train.labels])
            except ValueError as error:  # InvalidParameterError among them
                raise RecipeError(
                    f"{_WHERE}.settings", str(error).splitlines()[0][:300],
                    allowed="what scikit-learn takes", fix="correct it",
                ) from None  # fmt: skip
            right, loss = _score(model, task, validation)
            found.append({"settings": settings, "accuracy": right, "loss": loss})
            if min(found, key=_worse) is found[-1]:
                best = model
            bar.advance(1)
    chosen = min(found, key=_worse)
    progress.say(f"estimator: {chosen['settings'] or 'as scikit-learn has it'}, "
                 f"{100 * chosen['accuracy']:.2f} % of the validation rows")  # fmt: skip
    return best, {"chosen": chosen, "tried": found}


def _worse(one: Mapping[str, Any]) -> tuple[float, float]:
    return -one["accuracy"], one["loss"]


def _combinations(spec: EstimatorSpec) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*spec.search.values()):
        yield {**spec.settings, **dict(zip(spec.search, values, strict=True))}


def _classifier(
    spec: EstimatorSpec, settings: Mapping[str, Any], seed: int, rows: Rows
) -> Any:
    from sklearn import ensemble

    kinds: dict[str, Callable[..., Any]] = {
        "hist_gradient_boosting": ensemble.HistGradientBoostingClassifier,
        "random_forest": ensemble.RandomForestClassifier,
        "extra_trees": ensemble.ExtraTreesClassifier,
    }
    assert spec.kind is not None
    fixed: dict[str, Any] = {"random_state": seed}
    categories = rows.arrays.get("categories")
    if spec.kind == "hist_gradient_boosting" and categories is not None:
        first = rows.arrays["numbers"].shape[1] if "numbers" in rows.arrays else 0
        few = np.flatnonzero(categories.max(0) <= _CATEGORIES) + first
        fixed["categorical_features"] = few.tolist()
    made = kinds[spec.kind](**fixed)
    known = made.get_params()
    for name in settings:
        if name not in known or name in fixed:
            raise RecipeError(
                f"{_WHERE}.{'search' if name in spec.search else 'settings'}.{name}",
                f"no setting of {type(made).__name__}" if name not in known else "is set by seed "
                "and columns", allowed=", ".join(sorted(known.keys() - fixed.keys())),
                fix="correct it, or leave it out",
            )  # fmt: skip
    return made.set_params(**settings)


def _table(rows: Rows) -> np.ndarray:
    """(N, F + K) float64, numbers first, categories by index: as `runtime_worker` makes it."""
    return np.concatenate([rows.arrays[n] for n in ("numbers", "categories") if n in rows.arrays],
                          axis=1, dtype=np.float64)  # fmt: skip


def _score(model: Any, task: ArrayClassification, rows: Rows) -> tuple[float, float]:
    """Share of right answers, and the mean of -log p of the label."""
    probs = model.predict_proba(_table(rows))
    classes: Sequence[str] = model.classes_.tolist()
    probs = probs[:, [classes.index(label) for label in task.labels]]
    own = probs[np.arange(len(rows)), rows.labels]
    right = float(np.mean(probs.argmax(1) == rows.labels))
    return right, float(-np.log(np.maximum(own, FLOOR)).mean())


def described(folder: Path) -> dict[str, Any]:
    """What `estimator.json` says."""
    found: dict[str, Any] = json.loads((folder / ESTIMATOR).read_text(encoding="utf-8"))
    return found
