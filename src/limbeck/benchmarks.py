"""Public benchmarks, run by EleutherAI's lm-eval (extra 'benchmark') on a model's `hf` folder.

A folder of a user's own tasks is read here, as data: what lm-eval gets of it are settings that can
name no Python. lm-eval itself would import what lies beside a YAML file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import yaml

from limbeck import benchmark_worker
from limbeck.archives import close_matches, did_you_mean
from limbeck.cores import cores
from limbeck.errors import LimbeckError, MissingExtraError, RecipeError, SourceError
from limbeck.recipe_measure import BenchmarkSpec
from limbeck.run import write_json

_WHERE = "recipe.measure.benchmarks"
_FORMATS = ("json", "csv", "parquet", "text")
_METRICS = (
    "acc", "acc_norm", "acc_mutual_info", "exact_match", "perplexity", "word_perplexity",
    "byte_perplexity", "bits_per_byte", "brier_score", "mcc", "f1", "bleu", "chrf", "ter",
)  # fmt: skip
_FILTERS = (
    "take_first", "regex", "lowercase", "uppercase", "remove_whitespace", "majority_vote",
)  # fmt: skip
_KEYS = {
    "task", "task_alias", "tag", "dataset_path", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "doc_to_text", "doc_to_target",
    "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter", "num_fewshot",
    "metric_list", "output_type", "generation_kwargs", "repeats", "filter_list", "metadata",
}  # fmt: skip
_METRIC_KEYS = {
    "metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation",
    "ignore_numbers", "regexes_to_ignore",
}  # fmt: skip
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_AGGREGATIONS = (
    "mean", "median", "perplexity", "weighted_perplexity", "bits_per_byte", "f1", "mcc", "bleu",
    "chrf", "ter", "brier_score",
)  # fmt: skip


def version() -> str:
    """lm-eval's. Raises MissingExtraError."""
    if util.find_spec("lm_eval") is None:
        raise MissingExtraError.of(_WHERE, "benchmark")
    return metadata.version("lm-eval")


def check(at: Path, spec: BenchmarkSpec, folder: Path | None, sha256: str | None) -> None:
    """Now, not behind an hour of training: whether the tasks are known and their data can be had.
    `sha256` is the folder's.

    Raises RecipeError, SourceError, LimbeckError.
    """
    found = _asked(spec, folder, None)
    if (unknown := found.get("unknown")) is not None:
        near = close_matches(unknown, found["known"])
        raise RecipeError(
            f"{_WHERE}.tasks", f"lm-eval {version()} knows no {unknown!r}",
            allowed="its tasks, groups and tags, and the tasks in `folder`",
            fix=did_you_mean(near) or "`lm_eval ls tasks` lists them",
        )  # fmt: skip
    if (failed := found.get("failed")) is not None:
        raise SourceError(
            f"{_WHERE}.tasks", f"{failed} cannot be made ready: {found['why'][:300]}",
            allowed="tasks whose data can be had from here",
            fix="fetch the data where there is a network, or leave the task out",
        )  # fmt: skip
    known = {"lm_eval": version(), "examples": found["examples"]}
    known |= {"asked": spec.model_dump(mode="json", exclude={"folder"})}  # scores depend on it
    write_json(at / "tasks.json", known | {"sha256": sha256})


def run(at: Path, spec: BenchmarkSpec, folder: Path | None, model: Path) -> None:
    """The scores of the model in this `hf` folder. Raises LimbeckError where lm-eval fails."""
    write_json(at / "scores.json", _asked(spec, folder, model)["scores"])


def own_tasks(folder: Path, *, cache: Path) -> dict[str, dict[str, Any]]:
    """The folder's tasks by name, as lm-eval takes them; what it makes of their data goes to
    `cache`.

    Raises SourceError for whatever could run code or read elsewhere.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".pyc", ".so"):
            raise _refused(path, "it is Python, which would run here")
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(path for ending in ("yaml", "yml") for path in folder.rglob(f"*.{ending}")):
        task = _task(path, folder.resolve())
        if task["task"] in found:
            raise _refused(path, f"task {task['task']!r} stands in another file too")
        task["dataset_kwargs"]["cache_dir"] = str(cache)
        found[task["task"]] = task
    if not found:
        raise SourceError(
            f"{_WHERE}.folder", f"{folder} holds no tasks", allowed="a .yaml file for each task",
            fix="name the folder that has them",
        )  # fmt: skip
    return found


def _task(path: Path, folder: Path) -> dict[str, Any]:
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        tag = str(error.problem).partition("'")[2].partition("'")[0] or "a tag"
        raise _refused(path, f"it has {tag}, which would run Python here") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _refused(path, f"no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise _refused(path, "it names no task")
    for what, given, known in (
        ("the setting", task, _KEYS),
        ("in dataset_kwargs", _dict(task, "dataset_kwargs", path), {"data_files"}),
        ("in generation_kwargs", _dict(task, "generation_kwargs", path), _GENERATION_KEYS),
        *(("in metric_list", one, _METRIC_KEYS) for one in _dicts(task, "metric_list", path)),
    ):
        if strange := sorted(map(str, {*given} - known)):
            raise _refused(path, f"{what} {strange[0]!r} is not for tasks of your own",
                           allowed=", ".join(sorted(known)))  # fmt: skip
    _one_of(task.get("dataset_path"), _FORMATS, "dataset_path", path)
    for one in _dicts(task, "metric_list", path):
        _one_of(one.get("metric"), _METRICS, "metric", path)
        _one_of(one.get("aggregation", "mean"), _AGGREGATIONS, "aggregation", path)
    for one in _dicts(task, "filter_list", path):
        for step in _dicts(one, "filter", path):
            _one_of(step.get("function"), _FILTERS, "filter function", path)
    files = task.get("dataset_kwargs", {}).get("data_files")
    task["dataset_kwargs"] = {"data_files": _inside(files, path, folder)}
    return task


def _dict(task: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = task.get(name, {})
    if not isinstance(found, dict):
        raise _refused(path, f"{name} is {found!r}", allowed="settings by name")
    return found


def _dicts(task: Mapping[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    found = task.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _refused(path, f"{name} is {found!r}", allowed="a list of settings by name")
    return found


def _one_of(value: Any, known: tuple[str, ...], what: str, path: Path) -> None:
    if value not in known:
        raise _refused(path, f"{what} is {value!r}", allowed=", ".join(known))


def _inside(files: Any, path: Path, folder: Path) -> Any:
    """`data_files` as paths of their own. They start at the YAML file, and stay in the folder."""
    if isinstance(files, dict):
        return {str(split): _inside(one, path, folder) for split, one in files.items()}
    if isinstance(files, list):
        return [_inside(one, path, folder) for one in files]
    found = (path.parent / str(files)).resolve()
    plain = isinstance(files, str) and not {*"*?[]{}"} & {*files} and "::" not in files
    if not plain or not found.is_relative_to(folder) or not found.is_file():
        raise _refused(path, f"data_files has {files!r}", allowed="files in that folder")
    return str(found)


def _refused(path: Path, found: str, *, allowed: str = "") -> SourceError:
    return SourceError(
        f"{_WHERE}.folder", f"{path.name}: {found}",
        allowed=allowed or "YAML files of settings and templates, and their data",
        fix="take it out, or bring the task into lm-eval itself",
    )  # fmt: skip


def _asked(spec: BenchmarkSpec, folder: Path | None, model: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="limbeck-") as aside:
        own = own_tasks(folder, cache=Path(aside)) if folder is not None else {}
        if own and not own.keys() & {*spec.tasks}:
            raise RecipeError(
                f"{_WHERE}.folder", "it has no effect: none of its tasks is named",
                allowed=", ".join(own), fix="name one in `tasks`, or leave it out",
            )  # fmt: skip
        request = {
            "tasks": [*spec.tasks], "own": [own[name] for name in spec.tasks if name in own],
            "limit": spec.limit, "num_fewshot": spec.num_fewshot,
            "model": None if model is None else str(model.resolve()),
        }  # fmt: skip
        environment = {
            **os.environ, "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": str(cores()),
            "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        done = subprocess.run(
            # By path and with -P: `-m limbeck.benchmark_worker` would import limbeck around it.
            [sys.executable, "-P", benchmark_worker.__file__], input=json.dumps(request),
            capture_output=True, text=True, env=environment, check=False, cwd=aside,
        )  # fmt: skip
    if done.returncode != 0 or not done.stdout.strip():
        said = [line.strip() for line in done.stderr.strip().splitlines()[-3:]]
        raise LimbeckError(
            _WHERE, f"lm-eval {version()} ended with status {done.returncode}: "
            f"{' / '.join(said)[:600] or 'it said nothing'}",
            fix=f"try it by hand: `lm_eval run --tasks {','.join(spec.tasks)}`",
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
