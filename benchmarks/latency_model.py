"""Predicted against measured latency and memory of shapes that the model was not fitted to.

    limbeck distill quickstart --out runs/quickstart
    python benchmarks/latency_model.py runs/quickstart [--shapes 20] [--json FILE]

The planner's own model (`architecture.plan.CostModel`), fitted to the anchors that it always times,
then asked about shapes drawn at random from the space, each exported with random weights and timed
as the planner times them. The second column is after the model has seen half of the others too,
which is what a plan of several students comes to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.architecture.plan import Candidate, CostModel, Sample, anchors
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.stages import Planner, places_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run of the quickstart recipe")
    parser.add_argument("--shapes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="6 shapes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    recipe, _ = load_recipe(options.run)
    planner = Planner(recipe, places_of(options.run), Silent())
    count = 6 if options.quick else options.shapes
    random = np.random.default_rng(options.seed)
    drawn = [planner.space[i] for i in random.choice(len(planner.space), count, replace=False)]
    for anchor in anchors(planner.space):
        planner.costs.measure(anchor)
    truth = {c.key: planner.measured(c) for c in drawn}
    first = {c.key: planner.costs.fitted(c) for c in drawn}
    half, rest = drawn[: count // 2], drawn[count // 2 :]
    more = CostModel(lambda c: {**truth, **_known(planner.costs)}[c.key])
    for candidate in [*(c for c, _ in planner.costs.measured.values()), *half]:
        more.measure(candidate)
    print("layers hidden   ffn |  measured ms  anchors only  with half |  MB measured  predicted")
    for c in drawn:
        real, said = truth[c.key], first[c.key]
        seen = f"{more.fitted(c).latency_ms:9.3f}" if c in rest else " " * 9
        print(f"{c.num_layers:6} {c.sizes['hidden']:6} {c.sizes['ffn']:5} | {real.latency_ms:12.3f}"
              f"  {said.latency_ms:12.3f}  {seen} | {real.memory_mb:12.1f}  {said.memory_mb:9.1f}")
    later = {c.key: more.fitted(c) for c in rest}
    out = [
        _row("latency, anchors only", drawn, truth, first, "latency_ms"),
        _row("latency, with half", rest, truth, later, "latency_ms"),
        _row("memory, anchors only", drawn, truth, first, "memory_mb"),
        _row("memory, with half", rest, truth, later, "memory_mb"),
    ]
    for row in out:
        print(f"{row['setting']}: median error {row['ours']:.1f} %, largest {row['other']:.1f} %, "
              f"n = {row['n']}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def _known(model: CostModel) -> dict[Any, Sample]:
    return {key: sample for key, (_, sample) in model.measured.items()}


def _row(
    setting: str, shapes: list[Candidate], truth: dict[Any, Sample], said: dict[Any, Sample],
    what: str,
) -> dict[str, Any]:  # fmt: skip
    errors = [
        100 * abs(getattr(said[c.key], what) / getattr(truth[c.key], what) - 1) for c in shapes
    ]
    median, most = statistics.median(errors), max(errors)
    return {"measure": "error of the prediction", "setting": setting, "ours": median, "other": most,
            "other_name": "the largest", "ratio": median / most, "unit": "%", "n": len(shapes)}


if __name__ == "__main__":
    main()
