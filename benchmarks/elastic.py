"""A family of five in one elastic run against five dedicated students, by cost.

    limbeck distill quickstart --out runs/quickstart
    python benchmarks/elastic.py runs/quickstart [--seeds 3] [--cost 0.25 0.5 1] [--json FILE]

The run's teacher, signals and importance are used; all students start as prefixes of the same
sorted teacher and have the same loss, batch size, schedule and optimizer. The dedicated ones train
for `--epochs` each, with the learning rate that was best for each on the validation rows. The
family trains one size a step, for as many steps as cost, by a pilot and in CPU seconds of the
process, the given part of what the five took together; what it did take is printed. Learning rates
and shares of the family were chosen on the validation rows too, with seed 0 (docs/log.md). A seed
is an order of the rows, the same for all. Accuracy is that of the fp32 students on `--rows` test
rows, all if not given; differences are to the dedicated student of the same size and seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PretrainedConfig

from limbeck import cores, teaching
from limbeck.architecture.axes import Axis, axes_from_json, find_axis
from limbeck.architecture.cut import keep_layers, sort_units
from limbeck.architecture.importance import load_importance
from limbeck.elastic import Sampling
from limbeck.family import Family
from limbeck.models import build_classifier
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.step import Training
from limbeck.tasks.task import Rows, Task, open_task
from limbeck.train import train
from limbeck.types import Shape

# heads of 12, ffn of 1536, layers of 6: 40, 17, 8, 3 and 1 % of the encoder's weights
_SHAPES = {
    "a": (8, 1152, 5), "b": (6, 768, 4), "c": (5, 512, 3), "d": (4, 384, 2), "e": (3, 320, 1),
}  # fmt: skip
_DEDICATED_RATE = {"a": 5e-4, "b": 1e-3, "c": 2e-3, "d": 2e-3, "e": 4e-3}
_PILOT = 64  # steps of the family whose cost says how many steps it may have
_RATE = 1e-3  # of the family, times:
_RATES = {"a": 0.8, "b": 1.2, "c": 1.8, "d": 2.5, "e": 4.0}


@dataclass(frozen=True)
class Setting:
    """What all trainings have in common."""

    config: PretrainedConfig
    axes: tuple[Axis, ...]
    state: Mapping[str, torch.Tensor]
    shapes: Mapping[str, Shape]
    lesson: Mapping[str, Any]
    rows: Rows

    def family(self, names: str) -> Family:
        shapes = {name: self.shapes[name] for name in names}
        return Family(self.config, build_classifier, self.axes, shapes, self.state)

    def trained(
        self, family: Family, steps: int, rate: float, seed: int, sampling: Sampling
    ) -> float:
        """CPU seconds."""
        spec = self.lesson["spec"]
        epochs = steps * spec.batch_size / len(self.rows)
        spec = spec.model_copy(update={"epochs": epochs, "learning_rate": rate})
        training = Training(**{**self.lesson, "spec": spec}, rows=self.rows, seed=seed, title="")
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            train(family, training, Path(folder), Silent(), sampling)
            return time.process_time() - start


def prepared(run: Path) -> tuple[Setting, Task]:
    recipe, _ = load_recipe(run)
    task = open_task(recipe, run / "data")
    teacher = task.load(run / "teacher/hf", where="teacher")
    axes = axes_from_json((run / "architecture/axes.json").read_text(encoding="utf-8"))
    scores = load_importance(run / "architecture/importance.safetensors")
    hidden = find_axis(axes, "hidden")
    assert hidden is not None
    shapes = {
        name: Shape(
            {"hidden": hidden.coupled["heads"] * heads, "heads": heads, "ffn": ffn},
            keep_layers(scores.layers, layers),
        )
        for name, (heads, ffn, layers) in _SHAPES.items()
    }
    lesson = teaching.lesson(
        recipe, None, run / "teacher/hf", run / "signals", run / "data", None, None
    )
    lesson |= {"spec": recipe.distill.training, "balance": "fixed", "looks": 0}
    state = sort_units(teacher.state_dict(), axes, scores.units)
    setting = Setting(teacher.config, axes, state, shapes, lesson, task.rows("train"))
    return setting, task


@torch.inference_mode()
def accuracy(family: Family, rows: Rows) -> dict[str, float]:
    """Of each size, %."""
    found = {}
    for name, size in family.sizes.items():
        right = sum(
            int((size.model(**batch.inputs).logits.argmax(-1) == batch.labels).sum())
            for batch in rows.batches(64)
        )
        found[name] = 100 * right / len(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of the quickstart recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cost", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--epochs", type=float, default=1.0, help="of each dedicated student")
    parser.add_argument("--rows", type=int, help="test rows")
    parser.add_argument("--quick", action="store_true", help="0.1 epochs, 500 rows, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.rows, options.seeds = 0.1, 500, 1
    with patch.object(cores, "cores", return_value=1):  # CPU seconds of one thread
        results = compared(options)
    out = report(results)
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


Results = dict[str, list[dict[str, float]]]  # 'dedicated', 'elastic 0.5' -> by seed, by size


def compared(options: argparse.Namespace) -> Results:
    setting, task = prepared(options.run)
    rows = task.rows("test").sample(options.rows, seed=0)
    steps = round(options.epochs * len(setting.rows) / setting.lesson["spec"].batch_size)
    print(f"dedicated students: {steps} steps each; n = {len(rows):,} test rows")
    results: Results = {}
    for seed in range(options.seeds):
        seconds, alone = {}, {}
        for name in setting.shapes:
            one = setting.family(name)
            seconds[name] = setting.trained(one, steps, _DEDICATED_RATE[name], seed, Sampling())
            alone |= accuracy(one, rows)
        whole = sum(seconds.values())
        results.setdefault("dedicated", []).append(alone)
        say(seed, "dedicated", alone, f"{whole:.0f} CPU s")
        # as often as the square root of the cost is small: between equal steps and equal cost
        shares = {name: (whole / cost) ** 0.5 for name, cost in seconds.items()}
        pilot = setting.family("".join(setting.shapes))
        sampling = Sampling(policy="one", shares=shares, rates=_RATES)
        mean = setting.trained(pilot, _PILOT, _RATE, seed, sampling) / _PILOT
        for cost in options.cost:
            family = setting.family("".join(setting.shapes))
            taken = setting.trained(family, round(cost * whole / mean), _RATE, seed, sampling)
            found = accuracy(family, rows)
            results.setdefault(f"elastic {cost:g}", []).append(found)
            say(seed, f"elastic {cost:g}", found,
                f"{taken:.0f} CPU s, {taken / whole:.2f} of the five")  # fmt: skip
    return results


def say(seed: int, what: str, found: Mapping[str, float], cost: str) -> None:
    listed = "  ".join(f"{name} {value:.2f}" for name, value in found.items())
    mean = statistics.mean(found.values())
    print(f"seed {seed}, {what}: {listed}  mean {mean:.2f} %; {cost}", flush=True)


def report(results: Results) -> list[dict[str, Any]]:
    out = []
    alone = results["dedicated"]
    for what, by_seed in results.items():
        if what == "dedicated":
            continue
        print(f"\n{what} of the cost: difference from the dedicated student, points, worst first")
        rows = []
        for name in _SHAPES:
            over = [ours[name] - theirs[name] for ours, theirs in zip(by_seed, alone, strict=True)]
            ours = statistics.mean(found[name] for found in by_seed)
            theirs = statistics.mean(found[name] for found in alone)
            rows.append((statistics.mean(over), min(over), max(over), name, ours, theirs))
        for mean, least, most, name, ours, theirs in sorted(rows):
            print(f"{name}  {mean:+6.2f} ({least:+.2f} to {most:+.2f})  {ours:.2f} %, alone "
                  f"{theirs:.2f} %")  # fmt: skip
            out.append({"measure": "accuracy", "setting": f"{what}, size {name}", "ours": ours,
                        "other": theirs, "other_name": "dedicated", "ratio": ours / theirs,
                        "unit": "%", "n": len(by_seed)})  # fmt: skip
        print(f"mean {statistics.mean(row[0] for row in rows):+.2f}")
    return out


if __name__ == "__main__":
    main()
