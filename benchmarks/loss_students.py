"""What each loss, temperature and balance is worth to one small student on 20 Newsgroups.

    limbeck distill quickstart --out runs/quickstart
    python benchmarks/loss_students.py runs/quickstart [--seeds 3] [--json FILE]

The run's teacher, stored signals and smallest student's shape and start are used. Every variant
changes one thing of the base (forward KL, T = 2, soft 0.25, hard 0.75, fixed) and has the same
start, steps, batch size and learning rate; nothing was tuned for any of them. A seed is an order
of the rows, the same for all variants. Accuracy is that of the fp32 student on all test rows, KL
that to the teacher's exported fp32 file. Intervals are 95 %, Student's t over seeds, of the
difference from hard labels alone with the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import measure, teaching
from limbeck.cores import on_each
from limbeck.progress import Silent
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe
from limbeck.stages import places_of, read_plan
from limbeck.tasks.task import Rows, open_task
from limbeck.types import Batch

_BASE = ("distill.soft_weight=0.25", "distill.hard_weight=0.75", "distill.temperature=2",
         "distill.training.batch_size=32")  # fmt: skip
_VARIANTS: dict[str, tuple[str, ...]] = {
    "hard labels": (),
    "base": (),
    **{kind: (f"distill.divergence={kind}",) for kind in (
        "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "akl", "dkd", "dist", "ranking",
    )},
    "standardized": ("distill.standardize=true",),
    "soft alone": ("distill.soft_weight=1", "distill.hard_weight=0"),
    "T = 1": ("distill.temperature=1",),
    "T = 4": ("distill.temperature=4",),
    "T from 4 to 1": ("distill.temperature={start: 4, end: 1}",),
    "T auto": ("distill.temperature=auto",),
    "T by entropy, 0.5": ("distill.temperature={entropy: 0.5}",),
    "calibrated": ("distill.balance=calibrated",),
    "uncertainty": ("distill.balance=uncertainty",),
    "upgrad": ("distill.balance=upgrad",),
    **{f"hidden {loss}": (f"distill.hidden={loss}",) for loss in (
        "{loss: mse}", "{loss: cosine}", "{loss: relation}", "{loss: cka}",
        "{loss: cosine, layers: last}", "{loss: cosine, layers: uniform}",
    )},
    **{f"embedding {loss}": (f"distill.embedding={{loss: {loss}}}",) for loss in (
        "mse", "cosine", "similarity_kl", "rkd_distance", "rkd_angle", "cka",
    )},
    "dist, hidden cosine": ("distill.divergence=dist", "distill.hidden={loss: cosine}"),
}  # fmt: skip
_T_OF = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 95 %, by number of seeds


def logits_of(model: torch.nn.Module, rows: Rows) -> np.ndarray:
    @torch.inference_mode()
    def forward(batch: Batch) -> np.ndarray:
        found: np.ndarray = model(**batch.inputs).logits.numpy()
        return found

    return np.concatenate(list(on_each(forward, rows.batches(32))))


def features_of(run: Path, recipe: Recipe, name: str, kept: Path) -> Path | None:
    """Captured once for all variants and seeds that want the same."""
    spec = recipe.distill
    if spec.hidden is None and spec.embedding is None:
        return None
    what = f"{spec.hidden.layers if spec.hidden else None}-{bool(spec.embedding)}"
    folder = kept / what
    if not folder.exists():
        shape = read_plan(run / "students" / name / "plan").shape
        folder.mkdir()
        teaching.store_features(
            folder, recipe.model_copy(update={"seed": 0}), {name: shape}, places_of(run), Silent()
        )
    return folder


def taught(
    run: Path, recipe: Recipe, name: str, features: Path | None, *, hard: bool
) -> tuple[Any, float | None]:
    """The trained student, and the temperature that was found for it."""
    student = recipe.student(name)
    shape = read_plan(run / "students" / name / "plan").shape
    places = places_of(run)
    temperature = None
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        if recipe.distill.temperature.candidates and not hard:
            (folder / "t").mkdir()
            teaching.choose_temperature(
                folder / "t", recipe, student, shape, places, Silent()
            )
            found = json.loads((folder / "t/temperature.json").read_text(encoding="utf-8"))
            temperature = found["chosen"]
        (folder / "hf").mkdir()
        teaching.distil(
            folder / "hf", recipe, student, shape, places, Silent(), taught=not hard,
            temperature=temperature, features=features,
        )  # fmt: skip
        return open_task(recipe, places.data).load(folder / "hf", where=name).eval(), temperature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the quickstart recipe")
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(_T_OF))
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument(
        "--only", nargs="+", choices=_VARIANTS, default=[*_VARIANTS], metavar="NAME",
        help="besides hard labels, these variants alone",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    theirs = np.load(options.run / "teacher/measure/logits.npy", allow_pickle=False)
    plain, _ = load_recipe(options.run)
    rows = open_task(plain, options.run / "data").rows("test")
    params = {
        s.name: json.loads((options.run / f"students/{s.name}/plan/plan.json").read_text())
        for s in plain.students
    }
    name = min(params, key=lambda n: params[n]["cost"]["params"])
    print(f"student {name}: {params[name]['shape']}, {options.epochs} epochs, n = {len(rows):,}")
    start, found = time.perf_counter(), {}
    chosen = {n: c for n, c in _VARIANTS.items() if n in ("hard labels", *options.only)}
    kept = Path(tempfile.mkdtemp(prefix="limbeck-"))
    for seed in range(options.seeds):
        for variant, changes in chosen.items():
            own = (f"students.{name}.epochs={options.epochs}",)
            recipe, _ = load_recipe(options.run, (*_BASE, *own, *changes))
            recipe = recipe.model_copy(update={"seed": seed})
            features = features_of(options.run, recipe, name, kept)
            model, t = taught(options.run, recipe, name, features, hard=variant == "hard labels")
            ours = logits_of(model, rows)
            right = float(measure.correct(ours, rows.labels).mean())
            kl = float(measure.mean_kl(theirs, ours))
            found.setdefault(variant, []).append((right, kl))
            said = f", T = {t:g}" if t else ""
            print(f"seed {seed}, {variant}: {100 * right:.2f} %, KL {kl:.3f}{said}, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    shutil.rmtree(kept)
    hard = [right for right, _ in found["hard labels"]]
    print(f"\n{'':20} {'accuracy':>9} {'over hard labels':>24} {'KL':>7}")
    out = []
    for variant, pairs in found.items():
        over = [100 * (right - base) for (right, _), base in zip(pairs, hard, strict=True)]
        wide = _T_OF[len(over)] * statistics.stdev(over) / math.sqrt(len(over))
        mean, kl = 100 * statistics.mean(r for r, _ in pairs), statistics.mean(k for _, k in pairs)
        gain = statistics.mean(over)
        interval = f"{gain:+.2f} ({gain - wide:+.2f} to {gain + wide:+.2f})"
        print(f"{variant:20} {mean:8.2f} % {interval:>24} {kl:7.3f}")
        out.append({"measure": "accuracy", "setting": variant, "ours": mean,
                    "other": 100 * statistics.mean(hard), "other_name": "hard labels",
                    "ratio": mean / 100 / statistics.mean(hard), "unit": "%",
                    "n": len(pairs)})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
