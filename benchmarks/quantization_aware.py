"""What training on a file's rounded weights is worth: perplexity of the file itself.

    limbeck distill smol --out runs/smol
    python benchmarks/quantization_aware.py runs/smol --student small [--seeds 2] [--json FILE]

The run's student is trained again from the same start, rows, steps and teacher's signals: plainly,
and with the last half or all of the steps on weights as a Q4_0 file holds them. Each is then
measured on all test texts with plain weights and rounded as Q8_0 and Q4_0 hold them (to the bit
what is read back of the file: tests/test_quantization.py). A seed is an order of the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

from limbeck import teaching
from limbeck.progress import Silent
from limbeck.quantization import Rounding
from limbeck.recipe_teaching import QuantizationAwareSpec
from limbeck.stages import places_of, read_plan, settled_recipe
from limbeck.step import Training
from limbeck.tasks.task import open_task
from limbeck.train import train

Format = Literal["gguf-q8_0", "gguf-q4_0"]
_FORMATS: tuple[Format, ...] = ("gguf-q8_0", "gguf-q4_0")
_SHARES = {"plain": None, "last half": 0.5, "all steps": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--student", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    recipe = settled_recipe(asked.run)
    places, task = places_of(asked.run), open_task(recipe, asked.run / "data")
    student = recipe.student(asked.student)
    shape = read_plan(asked.run / "students" / student.name / "plan").shape
    test, files = task.rows("test"), ("plain weights", *_FORMATS)
    found: dict[tuple[str, str], list[float]] = {}
    print(f"{'seed':>4} {'trained':10} " + " ".join(f"{f:>14}" for f in files) + f" {'CPU s':>7}")
    for seed in range(asked.seeds):
        for variant, share in _SHARES.items():
            aware = share and QuantizationAwareSpec(format="gguf-q4_0", share=share)
            model = teaching._student(recipe, shape, places, task, "prefix")
            training = Training(
                rows=task.rows("train"), spec=recipe.training_of(student), seed=seed,
                title=variant, quantization=aware or None,
                **teaching.lesson(recipe, student, places),
            )  # fmt: skip
            began = time.process_time()
            with tempfile.TemporaryDirectory(prefix="limbeck-") as at:
                train(model, training, Path(at), Silent())
            took = time.process_time() - began
            losses = {files[0]: teaching.loss_and_accuracy(test, model.eval())[0]}
            for file in _FORMATS:
                with Rounding(model, QuantizationAwareSpec(format=file, share=1.0), 1).at(0):
                    losses[file] = teaching.loss_and_accuracy(test, model)[0]
            for file, loss in losses.items():
                found.setdefault((file, variant), []).append(math.exp(loss))
            said = " ".join(f"{math.exp(losses[file]):14.2f}" for file in files)
            print(f"{seed:4} {variant:10} {said} {took:7.0f}", flush=True)
    rows = []
    for (file, variant), values in found.items():
        base = statistics.mean(found[file, "plain"])
        rows.append({
            "measure": "perplexity", "setting": f"{file}, {variant}", "unit": "",
            "ours": statistics.mean(values), "other": base, "other_name": "plain",
            "ratio": statistics.mean(values) / base, "n": len(values),
        })  # fmt: skip
        print(f"{file:14} {variant:10} {statistics.mean(values):8.2f} "
              f"{statistics.mean(values) / base:7.4f}x plain")  # fmt: skip
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
