"""lm-eval in a process of its own: it is slow to import, speaks much, and sets every seed anew.

Imports nothing of limbeck: `benchmarks` starts this file by its path (`python -P`). A request is
one JSON object on stdin; the answer is the last line on stdout, as JSON.
"""

import json
import math
import os
import sys
from typing import Any

_BATCH = 4  # (B, T, V) logits are large


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Whether lm-eval knows the tasks, and has their data; what it calls their versions."""
    manager = _manager()
    own = {task["task"]: task for task in request["own"]}
    if unknown := [n for n in request["tasks"] if n not in own and n not in manager.all_tasks]:
        return {"unknown": unknown[0], "known": [*own, *manager.all_tasks]}
    found: dict[str, int] = {}
    for name in request["tasks"]:
        try:
            loaded = manager.load([own.get(name, name)])["tasks"]
            found |= {leaf: len(task.eval_docs) for leaf, task in loaded.items()}
        except Exception as error:  # whatever a task's own Python or the hub's library says
            return {"failed": name, "why": f"{type(error).__name__}: {error}"}
    return {"examples": found}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The model's scores. lm-eval's own seeds: the few examples before a question are the same."""
    import torch
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    manager = _manager()
    own = {task["task"]: task for task in request["own"]}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = HFLM(
        pretrained=request["model"], device=device, dtype="float32", batch_size=_BATCH,
        trust_remote_code=False,
    )  # fmt: skip
    found = evaluator.simple_evaluate(
        model=model, tasks=[own.get(name, name) for name in request["tasks"]],
        num_fewshot=request["num_fewshot"], limit=request["limit"], task_manager=manager,
        log_samples=False, confirm_run_unsafe_code=False,
    )  # fmt: skip
    scores = []
    for task, metrics in _shown(found, request["tasks"]).items():
        for key, value in metrics.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            better = found["higher_is_better"].get(task) or {}
            scores.append(
                {
                    "task": task, "metric": metric, "filter": None if filter == "none" else filter,
                    "version": str(found["versions"].get(task, "N/A")),
                    "num_fewshot": found["n-shot"].get(task),
                    "higher_is_better": better.get(metric), "value": _finite(value),
                    "stderr": _finite(metrics.get(f"{metric}_stderr,{filter}")),
                    "n": _examples(found, task),
                }
            )  # fmt: skip
    return {"scores": scores}


def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _shown(found: dict[str, Any], asked: list[str]) -> dict[str, dict[str, Any]]:
    """Tasks and groups that were asked for; of a group without a score of its own what is in it,
    of a tag its tasks."""
    scored = {
        name: metrics
        for name, metrics in found["results"].items()
        if any("," in key for key in metrics)
    }
    below = found.get("group_subtasks", {})

    def first_scored(name: str) -> list[str]:
        if name in scored:
            return [name]
        return [one for child in below.get(name, ()) for one in first_scored(child)]

    names = dict.fromkeys(one for name in asked for one in first_scored(name))
    inside = {leaf for name in asked for leaf in _leaves(found, name)}
    names |= dict.fromkeys(name for name in scored if name not in inside)
    return {name: scored[name] for name in names}


def _leaves(found: dict[str, Any], name: str) -> set[str]:
    """What is in a group, to the last."""
    below = found.get("group_subtasks", {}).get(name, [])
    return {*below, *(leaf for one in below for leaf in _leaves(found, one))}


def _examples(found: dict[str, Any], task: str) -> int:
    names = {task, *_leaves(found, task)}
    return sum(found["n-samples"][name]["effective"] for name in names & {*found["n-samples"]})


def _finite(value: Any) -> float | None:
    """lm-eval writes N/A where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _only_what_is_shown() -> None:
    """A task's templates are a stranger's: they read the example, and reach nothing else.

    lm-eval renders them in jinja's plain environment, in which a template can run any Python.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    utils.env = sandbox


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    asked = json.load(sys.stdin)
    if asked["own"]:
        _only_what_is_shown()
    done = check(asked) if asked["model"] is None else run(asked)
    print(json.dumps(done), file=answer, flush=True)
