"""Time and peak memory of a head with its loss, forward and backward, side by side in one run.

    python benchmarks/losses.py [--quick] [--json FILE] [--dtype float32|bfloat16] [--width 576]
    python benchmarks/losses.py --targets [--clock cpu]

Peers (`pip install --no-deps trl liger-kernel`, the `peers` extra) are compared where they can be
imported and give our value and gradient on a small case; where not, a line says why. With bfloat16
inputs ours multiplies in fp32, and so does all else by default; `--matmul bfloat16` puts all else
under autocast, which is another precision and, without AMX, several times slower.

Every measurement is a fresh process. Time: the median of interleaved rounds, each the faster of
two steps after a warm-up, with glibc told to keep memory, as in training; `--clock cpu`
counts the process's own time, for a machine with neighbours. Memory, with glibc's defaults: the
kernel's high-water mark (VmHWM) of the first step above what was resident before it; a tiny step
has loaded the code, inputs and teacher signals are resident, gradients are not.

The floor: 2 P V D operations for each of 3 matmuls (logits, hidden's gradient, weight's gradient),
and no bytes beyond the two gradients, 4 (P D + V D). "naive KL stored" has its teacher's logits
given, outside time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NAIVE_LIMIT_BYTES = 16e9  # what a naive path may need; beyond it is skipped and said so
NAIVE_COPIES = 7  # (P, V) fp32 tensors at its peak: student, teacher, both log_softmax, ...
NAIVE = ("naive KL", "naive KL stored", "TRL GKD")
OURS = ("fused KL", "fused top-k", "fused sample")
PEERS = ("TRL GKD", "TRL tiled", "Liger 1024", "Liger 128", "TRL top-k")
PATHS = ("cross-entropy", "naive KL", "naive KL stored", *OURS, *PEERS)
BASES = ("cross-entropy", "naive KL")
# (base, time, memory): what "fused top-k" must reach at V = 49,152, 2,048 positions, bfloat16
TARGETS = (("cross-entropy", 1.25, 0.25), ("naive KL", 0.55, 0.1))
TARGET_SETTING = {"classes": [49_152], "positions": [2048], "dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="V = 32k, 512 positions, width 256")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, help="the student's; the teacher's is twice as wide")
    parser.add_argument("--classes", type=int, nargs="+")
    parser.add_argument("--positions", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--matmul", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS)
    parser.add_argument("--targets", action="store_true", help="their setting, and a verdict")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    if args.targets:
        vars(args).update(TARGET_SETTING)
    classes = args.classes or ([32_000] if args.quick else [32_000, 49_152, 151_936])
    positions = args.positions or ([512] if args.quick else [512, 2048, 8192])
    width = args.width or (256 if args.quick else 576)
    rounds = 1 if args.quick else args.rounds
    cases = [(v, p) for v in classes for p in positions]
    skipped = work({"what": "disagreements"})
    for path in args.paths:
        if path in skipped:
            print(f"{path}: {skipped[path]}")
    args.paths = [path for path in args.paths if path not in skipped]
    rows = [row for v, p in cases for row in compare(v, p, width, args, rounds)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def compare(
    classes: int, positions: int, width: int, args: argparse.Namespace, rounds: int
) -> list[dict]:
    setting = f"V={classes} P={positions} D={width} {args.dtype} inputs, "
    setting += f"{args.matmul} matmuls, {args.clock} clock"
    too_large = 4 * NAIVE_COPIES * classes * positions > NAIVE_LIMIT_BYTES
    paths = [p for p in args.paths if not (too_large and p in NAIVE)]
    found: dict[str, list[dict]] = {path: [] for path in paths}
    for _ in range(rounds):  # interleaved: a disturbance meets all
        for path in paths:
            case = {"path": path, "classes": classes, "positions": positions, "width": width}
            case |= {"dtype": args.dtype, "clock": args.clock, "matmul": args.matmul}
            found[path].append(work(case | {"what": "time"}) | work(case | {"what": "memory"}))
            print(path, found[path][-1], file=sys.stderr, flush=True)
    ms = {p: statistics.median(x["ms"] for x in found[p]) for p in paths}
    mib = {p: statistics.median(x["mib"] for x in found[p]) for p in paths}
    floor = 4 * (positions * width + classes * width) / 2**20
    gigaflops = 6 * positions * classes * width / 1e9
    print(f"\n{setting}: floor {gigaflops:.0f} GFLOP, {floor:.0f} MiB")
    if too_large:
        print(f"  skipped, their tensors alone would pass 16 GB: {', '.join(NAIVE)}")
    print(f"  {'path':<15}{'ms':>9}{'GFLOP/s':>9}{'MiB':>9}{'x CE ms':>9}{'x CE MiB':>9}"
          f"{'x KL ms':>9}{'x KL MiB':>9}")  # fmt: skip
    for path in paths:
        ratios = [
            f"{table[path] / table[other]:9.2f}" if other in paths else f"{'-':>9}"
            for other in BASES
            for table in (ms, mib)
        ]
        speed = gigaflops / ms[path] * 1e3
        print(f"  {path:<15}{ms[path]:9.0f}{speed:9.1f}{mib[path]:9.0f}{''.join(ratios)}")
    spread = max(
        max(x["ms"] for x in found[p]) / min(x["ms"] for x in found[p]) for p in paths
    )
    print(f"  {rounds} rounds; slowest over fastest round of one path: at most {spread:.2f}")
    if args.targets:
        judge(ms, mib)
    return [
        {
            "measure": f"{path}: {measure_name}", "setting": setting, "ours": table[path],
            "other": table[other], "other_name": other, "ratio": table[path] / table[other],
            "unit": unit, "n": rounds,
        }
        for path in paths if path in OURS
        for other in paths if other not in OURS
        for measure_name, table, unit in (("time", ms, "ms"), ("peak memory", mib, "MiB"))
    ]  # fmt: skip


def judge(ms: dict[str, float], mib: dict[str, float]) -> None:
    for base, time_limit, memory_limit in TARGETS:
        for name, table, limit in (("time", ms, time_limit), ("peak memory", mib, memory_limit)):
            if {"fused top-k", base} <= table.keys():
                ratio = table["fused top-k"] / table[base]
                verdict = "reached" if ratio <= limit else "NOT reached"
                print(f"  fused top-k over {base}, {name}: {ratio:.3f}, target {limit}: {verdict}")


def work(case: dict) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(case: dict) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if case["what"] == "disagreements":
        from losses_paths import disagreements

        print(json.dumps(disagreements()))
        return
    if case["what"] == "time":
        from limbeck._startup import keep_memory

        keep_memory()
        step = prepare(case)
        step()
        print(json.dumps({"ms": min(timed(step, case["clock"]) for _ in range(2))}))
        return
    prepare(case | {"classes": 128, "positions": 32, "width": 8})()
    step = prepare(case)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = status("VmRSS")
    step()
    print(json.dumps({"mib": (status("VmHWM") - before) / 1024}))


def timed(step: Callable[[], None], clock: str) -> float:
    now = time.perf_counter if clock == "wall" else time.process_time
    start = now()
    step()
    return (now() - start) * 1e3


def status(name: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def prepare(case: dict) -> Callable[[], None]:
    """One forward and backward, its inputs made."""
    import torch

    from losses_paths import PATHS, make_inputs

    inputs = make_inputs(
        case["path"], case["positions"], case["classes"], case["width"], case["dtype"]
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case["matmul"] == "bfloat16")

    def step() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        with autocast:
            loss = PATHS[case["path"]](inputs)
        loss.backward()

    return step


if __name__ == "__main__":
    main()
