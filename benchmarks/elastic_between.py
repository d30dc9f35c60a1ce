"""How good are sizes of a family that were never trained?

    limbeck distill quickstart --out runs/quickstart
    python benchmarks/elastic_between.py runs/quickstart [--svg FILE]

The five sizes of `elastic.py` are trained in one run of `--steps` steps. Then twenty mixes of ffn
and layers at their hidden widths are read off the same weights, without any training, and held
against the straight line between the trained sizes around them, over the logarithm of the work
(weights that a position is multiplied with). A second family, trained at three hidden widths (8, 5
and 3 heads of 32), is read off at the widths between. Accuracy on the test rows, n = all, one seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from elastic import _RATE, _SHAPES, Setting, accuracy, prepared, rows_of
from elastic_picture import Series, draw
from limbeck import cores
from limbeck.architecture.axes import find_axis
from limbeck.architecture.cut import keep_layers
from limbeck.architecture.importance import load_importance
from limbeck.elastic import Sampling
from limbeck.family import Family
from limbeck.types import Shape

# (heads, ffn, layers) at the hidden widths of a, b, c and d
_BETWEEN = (
    (8, 960, 5), (8, 768, 5), (8, 1152, 4), (8, 960, 4), (8, 768, 4), (8, 1152, 3), (8, 512, 3),
    (6, 768, 3), (6, 640, 4), (6, 512, 4), (6, 512, 3), (6, 768, 2), (6, 384, 2), (5, 448, 3),
    (5, 384, 3), (5, 512, 2), (5, 384, 2), (4, 320, 2), (4, 384, 1), (4, 320, 1),
)  # fmt: skip
_WIDTHS = ((8, 1152, 5), (5, 512, 3), (3, 320, 1))
_OTHER_WIDTHS = ((7, 960, 4), (6, 768, 4), (4, 384, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of the quickstart recipe")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", type=int, help="test rows")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    options = parser.parse_args()
    setting = prepared(options.run)
    with patch.object(cores, "cores", return_value=1):
        trained, between = read_off(setting, options, [*_SHAPES.values()], _BETWEEN)
        widths, others = read_off(setting, options, _WIDTHS, _OTHER_WIDTHS)
    points = compared("mixes at trained hidden widths", trained, between)
    hole = compared("untrained hidden widths", widths, others)
    if options.svg:
        draw(options.svg, "Sizes that were never trained: accuracy on test rows, %",
             "work: thousands of weights that a position is multiplied with", [
                 Series("trained sizes", sorted(trained.values()), "#1f5fa8"),
                 Series("mixes of ffn and layers", points, "#1f5fa8", line=False, hollow=True),
                 Series("trained at three widths", sorted(widths.values()), "#c2571a"),
                 Series("other hidden widths", hole, "#c2571a", line=False, hollow=True),
             ])  # fmt: skip


Numbers = tuple[int, int, int]
Spots = dict[str, tuple[float, float]]  # by size: thousands of weights, %


def read_off(
    setting: Setting, options: argparse.Namespace, numbers: list[Numbers] | tuple[Numbers, ...],
    others: tuple[Numbers, ...],
) -> tuple[Spots, Spots]:  # fmt: skip
    """Trains the first ones; of these and of the others."""
    scores = load_importance(options.run / "architecture/importance.safetensors")
    hidden = find_axis(setting.axes, "hidden")
    assert hidden is not None
    shapes = {
        f"{heads}x{ffn}x{layers}": Shape(
            {"hidden": hidden.coupled["heads"] * heads, "heads": heads, "ffn": ffn},
            keep_layers(scores.layers, layers),
        )
        for heads, ffn, layers in (*numbers, *others)
    }
    all_of = replace(setting, shapes=shapes)
    family = Family(all_of.config, all_of.task.build, all_of.axes, shapes, all_of.state)
    names = [*shapes]
    first = names[: len(numbers)]
    sampling = Sampling(shares=dict.fromkeys(first, 1.0))
    all_of.trained(family, options.steps, _RATE, 0, sampling)
    rows = rows_of(options.run, "test").sample(options.rows, seed=0)
    found, _ = accuracy(family, rows)
    spots = {name: (family.sizes[name].work / 1000, found[name]) for name in names}
    return {n: spots[n] for n in first}, {n: spots[n] for n in names[len(numbers) :]}


def compared(what: str, trained: Spots, others: Spots) -> list[tuple[float, float]]:
    line = sorted(trained.values())
    listed = ", ".join(f"{name} {right:.2f}" for name, (_, right) in trained.items())
    print(f"\n{what}; trained: {listed} %")
    print("heads x ffn x layers   accuracy   over the line")
    over = []
    for name, (work, right) in sorted(others.items(), key=lambda spot: -spot[1][0]):
        over.append(right - _on(line, work))
        print(f"{name:<20}    {right:6.2f}      {over[-1]:+6.2f}")
    print(f"mean {statistics.mean(over):+.2f}, worst {min(over):+.2f}, within a point of the line "
          f"or above it: {sum(o >= -1 for o in over)} of {len(over)}", flush=True)  # fmt: skip
    return [*others.values()]


def _on(line: list[tuple[float, float]], work: float) -> float:
    """The straight line over the logarithm of the work."""
    for (low, below), (high, above) in itertools.pairwise(line):
        if low <= work <= high:
            part = math.log(work / low) / math.log(high / low)
            return below + part * (above - below)
    raise AssertionError(f"{work} is not between the trained sizes")


if __name__ == "__main__":
    main()
