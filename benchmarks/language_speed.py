"""A family of language models beside its teacher in llama.cpp: bytes, and tokens a second.

    python benchmarks/language_speed.py RUN [--format gguf-q8_0] [--rounds 3] [--json FILE]

RUN is a finished run of a language recipe whose `export.formats` have the format. Each file is
loaded in a process of its own and writes; the files take turns, round by round, so that a busier
minute is everybody's. Shown are medians over the rounds. Needs llama-cpp-python (extra 'verify').
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib import util
from pathlib import Path

from limbeck.recipe import file_of
from limbeck.recipe_file import load_recipe
from limbeck.runtime import Timing, time_artifact
from limbeck.tasks.task import open_task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--format", default="gguf-q8_0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10, help="timed calls of a round")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if util.find_spec("llama_cpp") is None:
        parser.error("llama-cpp-python is not installed: pip install 'limbeck[verify]'")
    recipe, _ = load_recipe(asked.run)
    task = open_task(recipe, asked.run / "data")
    folders = {"teacher": asked.run / "teacher"}
    folders |= {s.name: asked.run / "students" / s.name for s in recipe.students}
    found: dict[str, list[Timing]] = {name: [] for name in folders}
    for _ in range(asked.rounds):
        for name, folder in folders.items():
            inputs = task.inputs(task.read_config(folder / "hf", where=name))
            found[name].append(
                time_artifact(
                    folder / "gguf" / file_of(asked.format), asked.format, inputs=inputs,
                    threads=asked.threads, runs=asked.runs, writes=True,
                )
            )
    print(f"{asked.format}, {found['teacher'][0].runtime}, {asked.threads} thread(s), "
          f"medians of {asked.rounds} rounds")  # fmt: skip
    print(f"{'':10} {'MB':>7} {'tokens/s':>9} {'range':>15} {'times the teacher':>18} {'ms':>8}"
          f" {'peak MB':>8}")  # fmt: skip
    rows = []
    base = statistics.median(t.tokens_per_s or 0 for t in found["teacher"])
    for name, timings in found.items():
        speeds = [t.tokens_per_s or 0 for t in timings]
        speed = statistics.median(speeds)
        size = (folders[name] / "gguf" / file_of(asked.format)).stat().st_size / 1e6
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        latency = statistics.median(t.latency_ms for t in timings)
        memory = statistics.median(t.peak_memory_bytes for t in timings) / 1e6
        print(f"{name:10} {size:7.1f} {speed:9.1f} {spread:>15} {speed / base:17.2f}x"
              f" {latency:8.1f} {memory:8.0f}")  # fmt: skip
        rows.append({
            "measure": "tokens per second", "setting": f"{asked.format}, {name}", "ours": speed,
            "other": base, "other_name": "teacher", "ratio": speed / base, "unit": "1/s",
            "n": asked.rounds, "size_mb": size,
        })  # fmt: skip
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
