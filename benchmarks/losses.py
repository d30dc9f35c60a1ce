"""Time and peak memory of a head with its loss, forward and backward, side by side in one run.

    python benchmarks/losses.py [--quick] [--json FILE] [--dtype float32|bfloat16] [--width 576]

Every measurement is a fresh process. Time: the median of interleaved rounds, each the faster of
two steps after a warm-up, with glibc told to keep memory, as in training; `--clock cpu`
counts the process's own time, for a machine with neighbours. Memory, with glibc's defaults: the
kernel's high-water mark (VmHWM) of the first step above what was resident before it; a tiny step
has loaded the code, inputs and teacher signals are resident, gradients are not.

The floor: 2 P V D operations for each of 3 matmuls (logits, hidden's gradient, weight's gradient),
and no bytes beyond the two gradients, 4 (P D + V D).
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
PATHS = ["cross-entropy", "naive KL", "fused KL", "fused top-k", "fused sample"]
TOP_K = 64


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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    classes = args.classes or ([32_000] if args.quick else [32_000, 49_152, 151_936])
    positions = args.positions or ([512] if args.quick else [512, 2048, 8192])
    width = args.width or (256 if args.quick else 576)
    rounds = 3 if args.quick else args.rounds
    cases = [(v, p) for v in classes for p in positions]
    rows = [row for v, p in cases for row in compare(v, p, width, args, rounds)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def compare(
    classes: int, positions: int, width: int, args: argparse.Namespace, rounds: int
) -> list[dict]:
    setting = f"V={classes} P={positions} D={width} {args.dtype} {args.clock} clock"
    too_large = 4 * NAIVE_COPIES * classes * positions > NAIVE_LIMIT_BYTES
    paths = [p for p in PATHS if not (too_large and p == "naive KL")]
    found: dict[str, list[dict]] = {path: [] for path in paths}
    for _ in range(rounds):  # interleaved: a disturbance meets all
        for path in paths:
            case = {"path": path, "classes": classes, "positions": positions, "width": width}
            case |= {"dtype": args.dtype, "clock": args.clock}
            found[path].append(measure(case, "time") | measure(case, "memory"))
    ms = {p: statistics.median(x["ms"] for x in found[p]) for p in paths}
    mib = {p: statistics.median(x["mib"] for x in found[p]) for p in paths}
    floor = 4 * (positions * width + classes * width) / 2**20
    gigaflops = 6 * positions * classes * width / 1e9
    print(f"\n{setting}: floor {gigaflops:.0f} GFLOP, {floor:.0f} MiB")
    if too_large:
        print("  naive KL: skipped, its tensors alone would pass 16 GB")
    print(f"  {'path':<15}{'ms':>9}{'GFLOP/s':>9}{'MiB':>9}{'x CE ms':>9}{'x CE MiB':>9}"
          f"{'x KL ms':>9}{'x KL MiB':>9}")  # fmt: skip
    for path in paths:
        ratios = [
            f"{table[path] / table[other]:9.2f}" if other in paths else f"{'-':>9}"
            for other in ("cross-entropy", "naive KL")
            for table in (ms, mib)
        ]
        speed = gigaflops / ms[path] * 1e3
        print(f"  {path:<15}{ms[path]:9.0f}{speed:9.1f}{mib[path]:9.0f}{''.join(ratios)}")
    return [
        {
            "measure": f"{path}: {measure_name}", "setting": setting, "ours": table[path],
            "other": table[other], "other_name": other, "ratio": table[path] / table[other],
            "unit": unit, "n": rounds,
        }
        for path in paths if path.startswith("fused")
        for other in ("cross-entropy", "naive KL") if other in paths
        for measure_name, table, unit in (("time", ms, "ms"), ("peak memory", mib, "MiB"))
    ]  # fmt: skip


def measure(case: dict, what: str) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(case | {"what": what})]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def worker(case: dict) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if case["what"] == "time":
        from limbeck._startup import keep_memory

        keep_memory()
        step = prepare(case)
        step()
        print(json.dumps({"ms": min(timed(step, case["clock"]) for _ in range(2))}))
        return
    prepare(case | {"classes": 2 * TOP_K, "positions": 32, "width": 8})()
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
    from torch.nn import functional as F

    from limbeck.losses import fused
    from limbeck.losses.divergence import forward_kl

    torch.manual_seed(0)
    num, classes, width = case["positions"], case["classes"], case["width"]
    path = case["path"]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case["dtype"] == "bfloat16")
    hidden = torch.randn(num, width).to(getattr(torch, case["dtype"])).requires_grad_()
    weight = (torch.randn(classes, width) / width**0.5).requires_grad_()
    head = fused.Head(weight=weight)
    each = torch.full((num,), 1 / num)
    labels = torch.randint(classes, (num,))
    needs_teacher = path in ("naive KL", "fused KL")
    # as at capture: a teacher's last hidden states are what is stored, its head is at hand
    teacher_hidden = torch.randn(num, 2 * width) if needs_teacher else None
    teacher_weight = torch.randn(classes, 2 * width) / width**0.5 if needs_teacher else None
    ids = torch.randint(classes - TOP_K, (num, 1)) + torch.arange(TOP_K)  # distinct
    probs = torch.rand(num, TOP_K).softmax(-1) * 0.9
    tail = torch.full((num,), 0.1)

    def fused_step(loss: fused.Loss) -> torch.Tensor:
        return fused.fused_loss(hidden, head, [fused.Term(loss=loss, weight=each)]).total

    def total() -> torch.Tensor:
        if path == "cross-entropy":
            return F.cross_entropy(F.linear(hidden, weight).float(), labels)
        if path == "naive KL":
            with torch.no_grad():
                teacher = F.linear(teacher_hidden, teacher_weight).float()
            log_q = F.linear(hidden, weight).float().log_softmax(-1)
            return F.kl_div(log_q, teacher.log_softmax(-1), log_target=True,
                            reduction="batchmean")  # fmt: skip
        if path == "fused KL":
            other = fused.Head(weight=teacher_weight)
            return fused_step(fused.against_head(forward_kl, teacher_hidden, other))
        if path == "fused top-k":
            return fused_step(fused.against_sparse(forward_kl, ids, probs, tail))
        return fused_step(fused.against_sample(ids, probs))

    def step() -> None:
        hidden.grad = weight.grad = None
        with autocast:
            loss = total()
        loss.backward()

    return step


if __name__ == "__main__":
    main()
