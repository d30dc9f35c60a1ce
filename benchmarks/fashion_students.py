"""What the teacher is worth to each of a finished run's students, and what their files cost.

    limbeck distill fashion --out runs/fashion
    python benchmarks/fashion_students.py runs/fashion [--seeds 3] [--kept FILE] [--json FILE]

Each student is trained once more from the teacher's stored signals and once from hard labels only:
the same start (the teacher's prefix), rows, steps and learning rate, the student's own; these were
chosen for the taught ones. A seed is an order of the rows, the same for both; with the run's own
seed its own student stands for the taught one. Accuracy of fp32 students on all test rows;
intervals are 95 %, Student's t over seeds. Files: as the run measured them, one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from limbeck.recipe_file import load_recipe
from limbeck.report import read_report
from limbeck.tasks.task import open_task
from students import T_OF, Kept, accuracy_on_test, table, trained

_QUICK_EPOCHS = 0.1


def files(run: Path) -> list[dict[str, Any]]:
    """Prints what the report says of each exported file."""
    report = read_report(run)
    first = report.teacher.artifacts
    heads = ("kB", "accuracy", "ms, batch 1", "images/s")
    print("\n{:12} {:10} {:>8} {:>10} {:>12} {:>9}".format("model", "file", *heads))
    out = []
    for name, model in [("teacher", report.teacher), *((s.name, s) for s in report.students)]:
        for one, theirs in zip(model.artifacts, first, strict=True):
            assert one.latency_ms and theirs.latency_ms and one.quality
            print(f"{name:12} {one.format:10} {one.size_bytes / 1e3:8.1f} "
                  f"{100 * one.quality.value:8.2f} % {one.latency_ms.median:12.3f} "
                  f"{one.throughput_per_s or 0:9,.0f}")  # fmt: skip
            out.append({
                "measure": "latency, batch 1", "setting": f"{name}, {one.format}",
                "ours": one.latency_ms.median, "other": theirs.latency_ms.median,
                "other_name": f"teacher, {one.format}", "unit": "ms", "n": one.latency_ms.n,
                "ratio": one.latency_ms.median / theirs.latency_ms.median,
            })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of the fashion recipe")
    parser.add_argument("--seeds", type=int, default=3, choices=[1, *sorted(T_OF)])
    parser.add_argument("--only", nargs="+", metavar="STUDENT")
    parser.add_argument("--quick", action="store_true", help="a tenth of a pass, two seeds")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="what is in it is not made again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    run, kept = options.run, Kept(options.kept)
    plain, _ = load_recipe(run)
    names = [s.name for s in plain.students if options.only is None or s.name in options.only]
    seeds = [plain.seed + i for i in range(2 if options.quick else options.seeds)]
    out = files(run)
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        changes = (f"students.{name}.epochs={_QUICK_EPOCHS}",) if options.quick else ()
        for variant in ("hard labels", "taught"):
            for seed in seeds:
                training = f"{name}, {variant}, seed {seed}"
                if training not in kept.found:
                    recipe, _ = load_recipe(run, changes)
                    said = "the run's own"
                    if variant == "taught" and seed == plain.seed and not options.quick:
                        model = open_task(plain, run / "data").load(
                            run / "students" / name / "hf", where=name
                        )
                        right = accuracy_on_test(run, plain, model)
                    else:
                        right, seconds = trained(
                            run, recipe, name, seed, hard=variant == "hard labels",
                            start="prefix",
                        )  # fmt: skip
                        said = f"{seconds:.0f} CPU s"
                    kept.add(training, right)
                    print(f"{training}: {100 * right:.2f} %, {said}", flush=True)
                found.setdefault(name, {}).setdefault(variant, []).append(kept.found[training])
    n = len(open_task(plain, run / "data").rows("test"))
    print(f"\nfp32, n = {n:,} test rows, seeds {seeds}")
    out += table(found)
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
