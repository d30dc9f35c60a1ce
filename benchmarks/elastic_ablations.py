"""What each choice of an elastic run is worth: one thing changed at a time, at equal cost.

    limbeck distill quickstart --out runs/quickstart
    python benchmarks/elastic_ablations.py runs/quickstart [--only sort teacher] [--json FILE]

The five sizes of `elastic.py`, each variant trained for as many steps as cost `--cost` of what five
dedicated students would, by pilots in CPU seconds of the process. Accuracy on the test rows, points
over the default of the same seed. Groups and what they change (numbers of `elastic.md`, section C,
are those of the survey that the issue quotes):

sort      how units are ordered before anything is cut (2)
policy    which sizes a step has (3), each with two learning rates
shares    how often each size is drawn (4)
teacher   stored signals alone or with the next larger size as a second teacher, or that alone (5)
labels    the weight of hard labels (6)
count     2, 3 or 9 sizes; compared are those that the default has too (7)
loss      other divergences than forward KL (8)
first     the largest alone at first, for its share of the cost, then the others in its weights (10)
average   the mean of the weights over the last steps; weight decay

The default here is every size in its turn from the start, so that one thing changes at a time; the
pipeline teaches the largest first (`docs/results.md`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from elastic import _DEDICATED_RATE, _RATE, _SHAPES, Setting, accuracy, prepared, rows_of
from limbeck import cores, elastic
from limbeck.architecture.cut import sort_units
from limbeck.architecture.importance import importance
from limbeck.elastic import ElasticStep, Sampling
from limbeck.family import Family
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.recipe import ImportanceSpec
from limbeck.shared_adamw import SharedAdamW
from limbeck.stages import places_of
from limbeck.tasks.task import some
from limbeck.types import Batch, DenseTargets, Need, Signal

_MORE = {"ab": (7, 960, 5), "bc": (6, 640, 3), "cd": (5, 448, 2), "de": (4, 352, 1)}
_PILOT = 30  # steps whose cost says how many a variant may have
_IMPORTANCE_ROWS = 192


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing that is not as it is by default."""

    group: str
    name: str
    setting: Callable[[Setting], Setting] = lambda setting: setting
    sampling: Callable[[Family, Mapping[str, float]], Sampling] = lambda *_: Sampling()
    rate: float = _RATE
    names: tuple[str, ...] = tuple(_SHAPES)
    ladder: float = 0.0  # weight of the next larger size's answers in the targets
    average: float = 0.0  # decay of a mean of the weights
    first: bool = False  # the largest alone, before the others


def variants(setting: Setting, run: Path) -> list[Variant]:
    def with_loss(**changes: Any) -> Callable[[Setting], Setting]:
        return lambda s: replace(
            s, lesson={**s.lesson, "objective": replace(s.lesson["objective"], **changes)}
        )

    def with_spec(**changes: Any) -> Callable[[Setting], Setting]:
        return lambda s: replace(
            s, lesson={**s.lesson, "spec": s.lesson["spec"].model_copy(update=changes)}
        )

    def drawn(power: float, late: float | None = None) -> Callable[..., Sampling]:
        def sampling(_family: Family, seconds: Mapping[str, float]) -> Sampling:
            after = {} if late is None else {n: s**late for n, s in seconds.items()}
            shares = {n: s**power for n, s in seconds.items()}
            return Sampling(shares=shares, late_shares=after, switch=0.6)

        return sampling

    def policy(kind: Any) -> Callable[..., Sampling]:
        return lambda *_: Sampling(policy=kind)

    def sorted_by(units: Any) -> Callable[[Setting], Setting]:
        return lambda s: replace(s, state=resorted(s, run, units))

    found = [
        Variant(group="default", name="default"),
        Variant(group="sort", name="unsorted",
                setting=lambda _: replace(prepared(run, is_sorted=False))),
        Variant(group="sort", name="magnitude", setting=sorted_by("magnitude")),
        Variant(group="sort", name="activation", setting=sorted_by("activation")),
        *(Variant(group="policy", name=f"{kind}, rate {rate:g}", sampling=policy(kind), rate=rate)
          for kind in ("all", "sandwich") for rate in (1e-3, 2e-3)),
        Variant(group="shares", name="1 / sqrt(cost)", sampling=drawn(-0.5)),
        Variant(group="shares", name="sqrt(cost)", sampling=drawn(0.5)),
        Variant(group="shares", name="alike, then sqrt(cost)", sampling=drawn(0, 0.5)),
        Variant(group="teacher", name="stored and the next larger, alike", ladder=0.5),
        Variant(group="teacher", name="the next larger alone", ladder=1.0),
        *(Variant(group="labels", name=f"hard labels {weight:g}",
                  setting=with_loss(hard_weight=weight, soft_weight=1 - weight))
          for weight in (0.0, 0.25, 1.0)),
        Variant(group="count", name="2 sizes", names=("a", "e")),
        Variant(group="count", name="3 sizes", names=("a", "c", "e")),
        Variant(group="count", name="9 sizes", setting=with_more,
                names=("a", "ab", "b", "bc", "c", "cd", "d", "de", "e")),
        Variant(group="loss", name="reverse KL", setting=with_loss(divergence="reverse_kl")),
        Variant(group="loss", name="dist", setting=with_loss(divergence="dist")),
        Variant(group="first", name="the largest first", first=True,
                sampling=lambda family, _: Sampling(
                    shares={n: float(n != "a") for n in family.sizes})),
        Variant(group="average", name="mean of weights, 0.98", average=0.98),
        Variant(group="average", name="mean of weights, 0.99", average=0.99),
        Variant(group="average", name="weight decay 0.1", setting=with_spec(weight_decay=0.1)),
    ]  # fmt: skip
    assert isinstance(setting.lesson["objective"], Objective)
    return found


def resorted(setting: Setting, run: Path, units: Any) -> Mapping[str, Tensor]:
    """As the pipeline's survey, on as many rows, by another measure of units."""
    model = setting.task.load(places_of(run).base, where="base")
    rows = some(setting.rows, _IMPORTANCE_ROWS, seed=0)
    axes = [axis for axis in setting.axes if axis.proved]
    spec = ImportanceSpec(units=units, layers="block-influence")  # layers stay as they were
    batches = list(rows.batches(rows.num_together))
    scores = importance(model, axes, batches, Silent(), spec)
    return sort_units(model.state_dict(), setting.axes, scores.units)


def with_more(setting: Setting) -> Setting:
    """Sizes between the five."""
    largest = setting.shapes["a"]
    each = largest.sizes["hidden"] // largest.sizes["heads"]
    more = {}
    for name, (heads, ffn, layers) in _MORE.items():
        kept = next(s.layers for s in setting.shapes.values() if len(s.layers) == layers)
        sizes = {"hidden": each * heads, "heads": heads, "ffn": ffn}
        more[name] = replace(largest, sizes=sizes, layers=kept)
    return replace(setting, shapes={**setting.shapes, **more})


@dataclass(frozen=True)
class Ladder:
    """A size's targets: the mean of what is stored and what the next larger size says now."""

    stored: Any
    larger: nn.Module
    weight: float
    temperature: float
    provides: frozenset[Need] = field(default=frozenset({Need.LOGITS}))
    fingerprint: str = "ladder"

    @torch.no_grad()
    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:
        theirs = self.stored.signal(batch, needs).targets.logits / self.temperature
        self.larger.eval()
        own = self.larger(**batch.inputs).logits[batch.mask] / self.temperature
        mixed = (1 - self.weight) * theirs.softmax(-1) + self.weight * own.softmax(-1)
        return Signal(targets=DenseTargets(logits=mixed.clamp_min(1e-9).log() * self.temperature))


def laddered(weight: float) -> Any:
    """While this is entered, each size but the largest also learns from the next larger one."""
    begin = ElasticStep.__init__

    def init(self: ElasticStep, family: Family, training: Any, sampling: Sampling) -> None:
        begin(self, family, training, sampling)
        names = [*family.sizes]
        for larger, name in itertools.pairwise(names):
            temperature = training.objective.temperature.fixed or 1.0
            model = family.sizes[larger].model
            teacher = Ladder(training.teacher, model, weight, temperature)
            self.steps[name].training = replace(training, teacher=teacher)

    return patch.object(elastic.ElasticStep, "__init__", init)


class Averaged:
    """While this is entered, an exponential mean of the weights is kept; `use` puts it in place."""

    def __init__(self, decay: float) -> None:
        self.decay, self.mean = decay, dict[str, Tensor]()

    def entered(self) -> Any:
        step, averaged = SharedAdamW.step, self

        @torch.no_grad()
        def stepped(self: SharedAdamW, *args: Any, **kwargs: Any) -> None:
            step(self, *args, **kwargs)
            for name, weight in self.weights.items():
                if name not in averaged.mean:
                    averaged.mean[name] = weight.clone()
                averaged.mean[name].lerp_(weight, 1 - averaged.decay)

        return patch.object(SharedAdamW, "step", stepped)

    @torch.no_grad()
    def use(self, family: Family) -> None:
        for name, weight in family.weights.items():
            weight.copy_(self.mean[name])


def trained(
    setting: Setting, variant: Variant, whole: float, seconds: Mapping[str, float], seed: int
) -> tuple[Family, int, float]:
    """The family, its steps, and the CPU seconds that they took of the `whole`."""
    setting = variant.setting(setting)

    def family() -> Family:
        shapes = {name: setting.shapes[name] for name in variant.names}
        return Family(setting.config, setting.task.build, setting.axes, shapes, setting.state)

    costs = {name: seconds.get(name, statistics.mean(seconds.values())) for name in variant.names}
    sampling = variant.sampling(family(), costs)
    averaged = Averaged(variant.average)
    ladder = laddered(variant.ladder) if variant.ladder else nullcontext()
    average = averaged.entered() if variant.average else nullcontext()
    with ladder, average:
        pilot = setting.trained(family(), _PILOT, variant.rate, seed, sampling) / _PILOT
        averaged.mean.clear()
        made, taken, left = family(), 0.0, whole
        alone = setting.family("a")
        if variant.first:
            steps = round(whole / sum(seconds.values()))
            taken = setting.trained(alone, steps, _DEDICATED_RATE["a"], seed, Sampling())
            left -= steps * seconds["a"]
            for name, weight in alone.weights.items():
                made.weights[name].copy_(weight)
        count = round(left / pilot)
        taken += setting.trained(made, count, variant.rate, seed, sampling)
    if variant.average:
        averaged.use(made)
    if variant.first:
        made.sizes["a"] = alone.sizes["a"]
    return made, count, taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--cost", type=float, default=0.5, help="of five dedicated students")
    parser.add_argument("--epochs", type=float, default=1.0, help="that each of those would have")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--only", nargs="+", default=[], help="groups")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    setting = prepared(options.run)
    rows = rows_of(options.run, "test").sample(options.rows, seed=0)
    chosen = [v for v in variants(setting, options.run)
              if v.group in ("default", *options.only) or not options.only]  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {}
    with patch.object(cores, "cores", return_value=1):
        each = {
            name: setting.trained(setting.family(name), 24, 1e-9, 0, Sampling()) / 24
            for name in _SHAPES
        }
        steps = round(options.epochs * len(setting.rows) / setting.batch_size)
        whole = options.cost * steps * sum(each.values())
        print(f"{whole:.0f} CPU s for each; n = {len(rows):,}; points over the default", flush=True)
        for seed in range(options.seeds):
            for variant in chosen:
                made, count, taken = trained(setting, variant, whole, each, seed)
                right, _ = accuracy(made, rows)
                right = {name: value for name, value in right.items() if name in _SHAPES}
                found.setdefault(f"{variant.group}: {variant.name}", []).append(right)
                default = found["default: default"][seed]
                over = {name: value - default[name] for name, value in right.items()}
                shown = right if variant.group == "default" else over
                listed = "  ".join(f"{name} {value:+6.2f}" for name, value in shown.items())
                print(f"{seed} {variant.group:8} {variant.name:34} {listed}  mean "
                      f"{statistics.mean(shown.values()):+.2f}  {count} steps, {taken:.0f} CPU s",
                      flush=True)  # fmt: skip
                if options.json:
                    text = json.dumps(found, indent=1)
                    options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
