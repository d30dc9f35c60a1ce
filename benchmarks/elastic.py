"""A family of five in one elastic run against five dedicated students, by cost.

    limbeck distill quickstart --out runs/quickstart
    python benchmarks/elastic.py runs/quickstart [--seeds 3] [--cost 0.25 0.5 1] [--json FILE]

The run's teacher, signals and importance are used; all students start as prefixes of the same
sorted teacher and have the same loss, batch size, schedule and optimizer. The dedicated ones train
for `--epochs` each, with the learning rate that was best for each on the validation rows. The
family trains with `Sampling()` for as many steps as cost, by a pilot and in CPU seconds of the
process, the given part of what the five took together; what it did take is printed. `random` are
the dedicated students again, from random weights. A seed is an order of the rows, the same for all.
Accuracy is that of the fp32 students on `--rows` test rows, all if not given; differences are to
the dedicated student of the same size and seed.

Any run will do whose teacher is a transformer with twelve heads: `benchmarks/sections.yaml`,
`vit.yaml`, and with `--measure kl` (to the teacher, thousandths of a nat, less is worse) the
language model of `decoder.yaml`.

Settings are chosen with `--split validation --far --seeds 1`. A quarter of those rows are near
copies of training rows (they answer in the same threads) while the test rows were written later;
so accuracy and loss are also given on the `far` half: the rows whose nearest training row, by the
cosine of TF-IDF over tokens, is further away than the median. `--first 1 --largest 0` is what the
pipeline does: the largest alone, for its share of the cost, then the others in its weights. More
ablations: `--policy`, `--rate`, `--rates`, `--shares`, `--late`, `--switch`, `--unsorted`,
`--hard`; with `--what elastic` only the family is trained, and pilots say what the others cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from limbeck import cores, teaching
from limbeck.architecture.axes import Axis, find_axis
from limbeck.architecture.cut import keep_layers
from limbeck.architecture.importance import load_importance
from limbeck.elastic import Sampling
from limbeck.family import Family
from limbeck.losses.divergence import forward_kl
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.stages import places_of
from limbeck.step import Training
from limbeck.tasks.task import Rows, Task, open_task
from limbeck.train import train
from limbeck.types import Shape

# heads of 12 (hidden alike), ffn of 1536, layers of 6: 40, 17, 8, 3, 1 % of the encoder's weights
_SHAPES = {
    "a": (8, 1152, 5), "b": (6, 768, 4), "c": (5, 512, 3), "d": (4, 384, 2), "e": (3, 320, 1),
}  # fmt: skip
_HEADS, _FFN = 12, 1536
_DEDICATED_RATE = {"a": 5e-4, "b": 1e-3, "c": 2e-3, "d": 2e-3, "e": 4e-3}
_WHAT = ["dedicated", "elastic", "random"]
_PILOT = 64  # steps of the family whose cost says how many steps it may have
_RATE = 8e-4  # of the family's largest


@dataclass(frozen=True)
class Setting:
    """What all trainings have in common."""

    task: Task
    config: PretrainedConfig
    axes: tuple[Axis, ...]
    state: Mapping[str, torch.Tensor]
    shapes: Mapping[str, Shape]
    lesson: Mapping[str, Any]
    rows: Rows

    @property
    def batch_size(self) -> int:
        return self.lesson["spec"].batch_size

    def family(self, names: str) -> Family:
        shapes = {name: self.shapes[name] for name in names}
        return Family(self.config, self.task.build, self.axes, shapes, self.state)

    def from_random_weights(self, seed: int) -> Setting:
        torch.manual_seed(seed)
        return replace(self, state=self.task.build(self.config).state_dict())

    def trained(
        self, family: Family, steps: int, rate: float, seed: int, sampling: Sampling
    ) -> float:
        """CPU seconds."""
        epochs = steps * self.batch_size / len(self.rows)
        spec = self.lesson["spec"].model_copy(update={"epochs": epochs, "learning_rate": rate})
        training = Training(**{**self.lesson, "spec": spec}, rows=self.rows, seed=seed, title="")
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            train(family, training, Path(folder), Silent(), sampling)
            return time.process_time() - start


def prepared(run: Path, *, is_sorted: bool = True, hard: bool = False) -> Setting:
    recipe, _ = load_recipe(run)
    places = places_of(run)
    task = open_task(recipe, places.data)
    config, axes, state = teaching.sorted_base(task, places)
    if not is_sorted:
        state = dict(task.load(places.base, where="base").state_dict())
    scores = load_importance(places.space / "importance.safetensors")
    hidden, ffn = (find_axis(axes, name) for name in ("hidden", "ffn"))
    assert hidden is not None and ffn is not None
    shapes = {}
    for name, (heads, width, layers) in _SHAPES.items():
        sizes = {"hidden": heads * hidden.size // _HEADS, "heads": heads}
        sizes["ffn"] = width * ffn.size // _FFN
        shapes[name] = Shape(sizes, keep_layers(scores.layers, layers))
    lesson = teaching.hard_labels(recipe) if hard else teaching.lesson(recipe, None, places)
    lesson |= {"spec": recipe.distill.training, "balance": "fixed", "looks": 0}
    return Setting(task, config, axes, state, shapes, lesson, task.rows("train"))


def rows_of(run: Path, split: str) -> Rows:
    recipe, _ = load_recipe(run)
    return open_task(recipe, run / "data").rows(split)


Found = dict[str, float]  # by size


@torch.inference_mode()
def accuracy(family: Family, rows: Rows, far: np.ndarray | None = None) -> tuple[Found, str]:
    """Of each size, %. Of the far rows as a text, and the loss on them."""
    found, of_far = {}, []
    for name, size in family.sizes.items():
        rights, losses = [], []
        for batch in rows.batches(64):
            logits, labels = size.model(**batch.inputs).logits[batch.mask], batch.labels[batch.mask]
            rights.append(logits.argmax(-1) == labels)
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        right, loss = torch.cat(rights).numpy(), torch.cat(losses).numpy()
        found[name] = 100 * float(right.mean())
        if far is not None:
            of_far.append((100 * float(right[far].mean()), float(loss[far].mean())))
    listed = "  ".join(f"{name} {value:.2f}" for name, value in found.items())
    said = f"{listed}  mean {statistics.mean(found.values()):.2f} %"
    if far is not None:
        means = [statistics.mean(column) for column in zip(*of_far, strict=True)]
        each = "  ".join(f"{right:.1f} {loss:.3f}" for right, loss in of_far)
        said += f"; far {each}  mean {means[0]:.2f} % {means[1]:.3f} nats"
    return found, said


@torch.inference_mode()
def nearness(family: Family, rows: Rows, teacher: nn.Module) -> tuple[Found, str]:
    """Minus KL(teacher || student) of each size, thousandths of a nat: more is better."""
    sums, count = dict.fromkeys(family.sizes, 0.0), 0
    for batch in rows.batches(64):
        theirs = teacher(**batch.inputs).logits[batch.mask]
        count += len(theirs)
        for name, size in family.sizes.items():
            ours = size.model(**batch.inputs).logits[batch.mask]
            sums[name] += float(forward_kl(ours, theirs).sum())
    found = {name: -1000 * total / count for name, total in sums.items()}
    listed = "  ".join(f"{name} {-value / 1000:.3f}" for name, value in found.items())
    return found, f"{listed}  mean {-statistics.mean(found.values()) / 1000:.4f} nats"


def far_half(rows: Rows, train_rows: Rows) -> np.ndarray:
    """Which rows have their nearest training row further away than the median of all. (N,) bool"""
    postings: dict[int, list[int]] = {}
    for at, tokens in enumerate(train_rows.tokens):
        for token in {*tokens.tolist()}:
            postings.setdefault(token, []).append(at)
    count = len(train_rows)
    idf = {token: np.log((count + 1) / len(at)) for token, at in postings.items()}
    norm = np.array([sum(idf[t] ** 2 for t in {*tokens.tolist()}) for tokens in train_rows.tokens])
    nearest = []
    for tokens in rows.tokens:
        dots, own = np.zeros(count), 0.0
        for token in {*tokens.tolist()}:
            weight = idf.get(token, np.log(count + 1))
            own += weight**2
            dots[postings.get(token, [])] += weight**2
        nearest.append((dots / np.sqrt(norm * own + 1e-9)).max())
    return np.array(nearest) < np.median(nearest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of the quickstart recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cost", type=float, nargs="*", default=[0.25, 0.5, 1.0])
    parser.add_argument("--epochs", type=float, default=1.0, help="of each dedicated student")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--rows", type=int, help="of the split")
    parser.add_argument("--quick", action="store_true", help="0.1 epochs, 500 rows, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--dedicated", type=float, nargs=5, metavar="RATE",
                        default=[*_DEDICATED_RATE.values()])  # fmt: skip
    parser.add_argument("--far", action="store_true", help="also on rows far from training rows")
    parser.add_argument("--measure", choices=("accuracy", "kl"), default="accuracy")
    parser.add_argument("--what", nargs="+", choices=_WHAT, default=_WHAT)
    parser.add_argument("--policy", choices=("one", "sandwich", "all"), default="one")
    parser.add_argument("--rate", type=float, default=_RATE, help="of the family's largest")
    parser.add_argument("--rates", type=float, metavar="POWER", help="of 1 / work; 0: all alike")
    parser.add_argument("--shares", type=float, default=0.0, metavar="POWER", help="of the cost")
    parser.add_argument("--late", type=float, metavar="POWER", help="shares from --switch on")
    parser.add_argument("--switch", type=float, default=0.7, help="part of the steps")
    parser.add_argument("--first", type=float, default=0.0, metavar="PART",
                        help="of its steps: the largest alone, before the family")
    parser.add_argument("--largest", type=float, default=1.0, metavar="SHARE",
                        help="how often the largest is drawn, another 1")
    parser.add_argument("--unsorted", action="store_true", help="prefixes of the unsorted teacher")
    parser.add_argument("--hard", action="store_true", help="hard labels alone")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.rows, options.seeds = 0.1, 500, 1
    with patch.object(cores, "cores", return_value=1):  # CPU seconds of one thread
        results = compared(options)
    report(summary(results))


Results = dict[str, list[Found]]  # 'dedicated', 'random', 'elastic 0.5' -> by seed


def compared(options: argparse.Namespace) -> Results:
    setting = prepared(options.run, is_sorted=not options.unsorted, hard=options.hard)
    names = "".join(setting.shapes)
    rows = rows_of(options.run, options.split)
    rows = rows.sample(options.rows, seed=0)
    far = far_half(rows, setting.rows) if options.far else None
    teacher = setting.task.load(places_of(options.run).teacher, where="teacher").eval()

    def judged(family: Family) -> tuple[Found, str]:
        if options.measure == "kl":
            return nearness(family, rows, teacher)
        return accuracy(family, rows, far)

    steps = round(options.epochs * len(setting.rows) / setting.batch_size)
    rates = dict(zip(names, options.dedicated, strict=True))
    print(f"dedicated students: {steps} steps each; n = {len(rows):,} {options.split} rows")
    results: Results = {}

    def students(what: str, start: Setting, seed: int) -> Found:
        """CPU seconds."""
        seconds, alone, said = {}, {}, []
        for name in names:
            one = start.family(name)
            seconds[name] = start.trained(one, steps, rates[name], seed, Sampling())
            found, text = judged(one)
            alone |= found
            said.append(text)
        results.setdefault(what, []).append(alone)
        mean = statistics.mean(alone.values())
        each = "  ".join(f"{name} {value:.2f}" for name, value in alone.items())
        taken = f"{sum(seconds.values()):.0f} CPU s"
        print(f"seed {seed}, {what}: {each}  mean {mean:.2f}; {taken}", flush=True)
        if far is not None or options.measure == "kl":
            print("  " + "\n  ".join(said))
        return seconds

    def families(seconds: Found, seed: int) -> None:
        whole = sum(seconds.values())
        sampling = sampling_of(options, setting.family(names), seconds)
        pilot = setting.family(names)
        mean = setting.trained(pilot, _PILOT, options.rate, seed, sampling) / _PILOT
        for cost in options.cost:
            family, taken = setting.family(names), 0.0
            largest = names[0]
            part, rate = options.first * seconds[largest] / whole, rates[largest]
            if part:
                first = round(cost * options.first * steps)
                alone = setting.family(largest)
                taken = setting.trained(alone, first, rate, seed, Sampling())
                for own, weight in alone.weights.items():
                    family.weights[own].copy_(weight)
                print(f"first the largest alone, {first} steps, {judged(alone)[1]}", flush=True)
            count = round(cost * (1 - part) * whole / mean)
            taken += setting.trained(family, count, options.rate, seed, sampling)
            if part:
                print(f"the largest as the family leaves it: {judged(family)[1]}", flush=True)
                family.sizes[largest] = alone.sizes[largest]
            found, text = judged(family)
            results.setdefault(f"elastic {cost:g}", []).append(found)
            print(f"seed {seed}, elastic {cost:g}: {text}; {count} steps, {taken:.0f} CPU s, "
                  f"{taken / whole:.2f} of the five", flush=True)  # fmt: skip

    for seed in range(options.first_seed, options.first_seed + options.seeds):
        seconds: Found = {}
        if "dedicated" in options.what:
            seconds = students("dedicated", setting, seed)
        if "elastic" in options.what:
            for name in set(names) - {*seconds}:
                pilot = setting.trained(setting.family(name), 16, 1e-9, seed, Sampling())
                seconds[name] = pilot / 16 * steps
            families(seconds, seed)
        if "random" in options.what:
            students("random", setting.from_random_weights(seed), seed)
        if options.json:
            text = json.dumps(summary(results), indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    return results


def sampling_of(
    options: argparse.Namespace, family: Family, seconds: Mapping[str, float]
) -> Sampling:
    late = {n: s**options.late for n, s in seconds.items()} if options.late is not None else {}
    rates = None
    if options.rates is not None:
        most = max(size.work for size in family.sizes.values())
        rates = {n: (most / s.work) ** options.rates for n, s in family.sizes.items()}
    shares = {n: s**options.shares for n, s in seconds.items()}
    largest = next(iter(family.sizes))
    return Sampling(
        policy=options.policy, shares={**shares, largest: options.largest * shares[largest]},
        late_shares=late, switch=options.switch, rates=rates,
    )  # fmt: skip


def summary(results: Results) -> list[dict[str, Any]]:
    """A row for each setting and size; against dedicated students worst first."""
    out = []
    alone = results.get("dedicated", [])
    for what, by_seed in results.items():
        rows = []
        for name in by_seed[0]:
            each = [found[name] for found in by_seed]
            rows.append({
                "setting": what, "size": name,
                "ours": statistics.mean(each), "n": len(each), "by_seed": each,
            })  # fmt: skip
            if alone and what != "dedicated":
                theirs = [found[name] for found in alone]
                over = [mine - other for mine, other in zip(each, theirs, strict=False)]
                rows[-1] |= {"other": statistics.mean(theirs), "other_name": "dedicated",
                             "over": over}  # fmt: skip
        out += sorted(rows, key=lambda row: statistics.mean(row.get("over", [0])))
    return out


def report(rows: list[dict[str, Any]]) -> None:
    compared_ones = [row for row in rows if "over" in row]
    for what, of_setting in itertools.groupby(compared_ones, lambda row: row["setting"]):
        print(f"\n{what}: difference from the dedicated student, points, worst first")
        means = []
        for row in of_setting:
            over = row["over"]
            means.append(statistics.mean(over))
            print(f"{row['size']}  {means[-1]:+6.2f} ({min(over):+.2f} to {max(over):+.2f})"
                  f"  {row['ours']:.2f} %, alone {row['other']:.2f} %")  # fmt: skip
        print(f"mean {statistics.mean(means):+.2f}")


if __name__ == "__main__":
    main()
