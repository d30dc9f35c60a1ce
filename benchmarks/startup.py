"""What the process settings of `limbeck._startup` are worth: a training step under each of them.

    python benchmarks/startup.py [--busy] [--steps 12]

Each row is a fresh process. A step is forward, backward, clip and AdamW of a BERT classifier of
random weights on 32 examples of 32 tokens: MiniLM's shape (6 x 384) and a small student's
(2 x 128). Floor of the large one: 6 x 32 x 32 x 10.6 M = 65 GFLOP. `--busy` runs beside one
process that never rests, as a neighbour on a shared machine would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_SETTINGS: dict[str, dict[str, str]] = {
    "torch as it comes": {},
    "spin 0": {"GOMP_SPINCOUNT": "0"},
    "spin 0, memory": {"GOMP_SPINCOUNT": "0", "KEEP": "1"},
    "spin 1000, memory": {"GOMP_SPINCOUNT": "1000", "KEEP": "1"},
    "spin 10000, memory": {"GOMP_SPINCOUNT": "10000", "KEEP": "1"},
    "bound, spin 0, memory": {"GOMP_SPINCOUNT": "0", "OMP_PROC_BIND": "true", "KEEP": "1"},
    "bound, spin 10000, memory": {"GOMP_SPINCOUNT": "10000", "OMP_PROC_BIND": "true", "KEEP": "1"},
    "one thread, memory": {"OMP_NUM_THREADS": "1", "KEEP": "1"},
    "shares, as limbeck does": {"GOMP_SPINCOUNT": "0", "SHARES": "1"},
}
_SHAPES = {"6 x 384": (6, 384, 1536, 12), "2 x 128": (2, 128, 512, 4)}


def step_ms(steps: int) -> dict[str, float]:
    """Median milliseconds of a step, on the wall, by shape."""
    import statistics
    import time

    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from limbeck import _startup
    from limbeck.cores import on_each, shares

    in_shares = bool(os.environ.get("SHARES"))
    if in_shares:
        _startup.prepare_torch()
    elif os.environ.get("KEEP"):
        _startup.keep_memory()
    ids, labels = torch.randint(0, 30000, (32, 32)), torch.randint(0, 20, (32,))
    found = {}
    for name, (layers, hidden, ffn, heads) in _SHAPES.items():
        config = BertConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=ffn, num_labels=20, hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        parameters = list(model.parameters())

        def gradients(share: range, model: Any = model, parameters: Any = parameters) -> Any:
            part = slice(share.start, share.stop)
            loss = model(input_ids=ids[part], labels=labels[part]).loss * len(share) / len(ids)
            return torch.autograd.grad(loss, parameters)

        times = []
        for _ in range(steps):
            start = time.perf_counter()
            if in_shares:
                parts = zip(*on_each(gradients, shares(len(ids))), strict=True)
                for parameter, found_parts in zip(parameters, parts, strict=True):
                    parameter.grad = sum(found_parts[1:], found_parts[0])
            else:
                model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
        found[name] = 1000 * statistics.median(times[3:])
    return found


def _child(settings: Mapping[str, str], steps: int) -> dict[str, float]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, __file__, "--child", "--steps", str(steps)],
        env=plain | dict(settings), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--busy", action="store_true", help="beside one process that never rests")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(step_ms(arguments.steps)))
        return
    neighbour = (
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) if arguments.busy else None
    )
    try:
        base: dict[str, float] = {}
        print(f"{'':28}" + "".join(f"{name:>22}" for name in _SHAPES))
        for name, settings in _SETTINGS.items():
            found = _child(settings, arguments.steps)
            base = base or found
            cells = [f"{found[s]:9.1f} ms  {found[s] / base[s]:5.2f}" for s in _SHAPES]
            print(f"{name:28}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    finally:
        if neighbour is not None:
            neighbour.kill()


if __name__ == "__main__":
    main()
