"""Tokens per second and peak memory of one distillation step of a language model, side by side.

    python benchmarks/lm_step.py [--quick] [--device cuda] [--json FILE] [--precision fp32 bf16]
                                 [--variants ...]

A teacher of SmolLM2-135M's shape, a student of 38 M, V = 49,152, random weights in fp32 (bf16 is
autocast); 4 x 256 random tokens a step, of which 4 x 192 count, the same for all. --quick: 31 and
8 M, V = 8,192. Every variant is a process of its own with one thread: two steps to warm up, eight
measured, from one optimizer step's end to the next one's, so data, clipping and fused AdamW are in
it, gradient checkpointing is nowhere. Seconds are the process's own (`--clock wall` for those on
the wall): neighbours do not count. Memory is the kernel's high-water mark of the training, models
and optimizer included, above what was resident when everything had been imported.

`--device cuda`: a teacher of SmolLM2-1.7B's shape, a student of SmolLM2-360M's, 16 x 1,024 tokens,
of which 16 x 768 count; seconds on the wall, and memory what torch took of the card at most.

`ours ...` is `limbeck.train` itself: signals that were stored before by another process (sampled,
24 ids, the default; or top-64), or a live teacher; `+ labels` with the hard labels' term beside it,
as recipes have it by default; `hard labels` the same loop without a teacher. Its memory is what
glibc keeps on purpose (`_startup.keep_memory`); `plain loop` is a loop as anyone writes it, with
glibc as it comes, `plain loop, kept` the same with ours. Peers (extra `peers`) run where they can
be imported; how each had to be set up stands in `lm_step_paths.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OURS = {
    "ours, stored": "sampled", "ours, stored top-64": "topk", "ours, stored + labels": "sampled",
    "ours, live": "", "ours, hard labels": "",
}  # fmt: skip
OTHERS = (
    "plain loop", "plain loop, kept", "plain live KL", "TRL GKD", "TRL Distillation, replay",
    "TRL Distillation", "ModelOpt KD", "Liger chunked JSD",
)  # fmt: skip
# (ours, other, most time, most memory): what the first must reach of the second
TARGETS = (
    ("ours, stored", "plain loop", 1.1, 1.0),
    ("ours, stored", "TRL GKD", 0.5, 0.5),
    ("ours, stored", "ModelOpt KD", 0.5, 0.5),
    ("ours, stored", "TRL Distillation, replay", 1 / 2.4, None),
    ("ours, live", "Liger chunked JSD", 1.0, None),
)
WARM, STEPS = 2, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="+", default=[*OURS, *OTHERS])
    parser.add_argument("--clock", choices=["wall", "cpu"], help="cpu, on a GPU wall")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="measured, after two")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from lm_step_paths import run

        run(json.loads(options.worker))
        return
    options.clock = options.clock or ("cpu" if options.device == "cpu" else "wall")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lm-step-") as name:
        case = {"quick": options.quick, "device": options.device, "warm": WARM,
                "steps": options.steps, "stores": name}  # fmt: skip
        for codec in sorted({OURS.get(variant, "") for variant in options.variants} - {""}):
            work(case | {"variant": "capture", "codec": codec, "precision": "fp32"})
        for precision in options.precision:
            rows += compare(case | {"precision": precision}, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def compare(case: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for variant in options.variants:
            one = work(case | {"variant": variant, "codec": OURS.get(variant, "")})
            print(variant, one, file=sys.stderr, flush=True)
            if "missing" in one:
                print(f"{variant}: {one['missing']}")
                continue
            found.setdefault(variant, []).append(one)
    # of several runs the one that neighbours disturbed least
    best = {v: min(runs, key=lambda r: statistics.median(r["cpu"])) for v, runs in found.items()}
    seconds = {v: statistics.median(run[options.clock]) for v, run in best.items()}
    mib = {v: run["mib"] for v, run in best.items()}
    size = "small" if case["quick"] else "real"
    setting = f"{case['device']}, {case['precision']}, {size}, {options.clock} clock"
    base = seconds.get("plain loop")
    load = "/".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"\n{setting}; load {load}\n  {'':<26}{'s/step':>8}{'min':>7}{'max':>7}{'tokens/s':>10}"
          f"{'MiB':>7}{'x loop':>8}{'MiB x loop':>12}  first loss")  # fmt: skip
    for v, s in seconds.items():
        times, loss = best[v][options.clock], best[v]["loss"]
        ratios = f"{s / base:>8.2f}{mib[v] / mib['plain loop']:>12.2f}" if base else " " * 20
        print(f"  {v:<26}{s:>8.3f}{min(times):>7.3f}{max(times):>7.3f}"
              f"{best[v]['tokens'] / s:>10.0f}{mib[v]:>7.0f}{ratios}  {loss}")  # fmt: skip
    for ours, other, most_time, most_memory in TARGETS:
        if not {ours, other} <= seconds.keys():
            continue
        for what, table, most in (("time", seconds, most_time), ("memory", mib, most_memory)):
            if most is not None:
                ratio = table[ours] / table[other]
                verdict = "reached" if ratio <= most else "NOT reached"
                print(f"  {ours} over {other}, {what}: {ratio:.3f}, target {most:.3f}: {verdict}")
    return [
        {
            "measure": f"{ours}: {what}", "setting": setting, "ours": table[ours],
            "other": table[other], "other_name": other, "ratio": table[ours] / table[other],
            "unit": unit, "n": options.steps,
        }
        for ours in OURS if ours in seconds
        for other in OTHERS if other in seconds
        for what, table, unit in (("time", seconds, "s"), ("peak memory", mib, "MiB"))
    ]  # fmt: skip


def work(case: dict[str, Any]) -> dict[str, Any]:
    environment = {
        **os.environ, "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(case)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        if case["variant"] in OTHERS:  # a peer of another version, say: the others go on
            return {"missing": f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"}
        raise SystemExit(f"{case}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
