"""Does reading stored signals slow training? Write, read, and a student's step beside them.

    python benchmarks/signal_reading.py [--json FILE]

512 examples of 64 positions are written into a store (encode, shard, fsync), opened again, and read
in batches of 8 examples in random order, checksums included in the first pass and not in the
second. Beside it one step (forward, backward, without the optimizer) of a small student, 4 x 256
with its vocabulary's head, from those signals: the least that a training does in the same time.
Floor of a read: the bytes of the batch; it is a gather, a pass over packed bits, and a square.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from limbeck._startup import prepare_torch
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.signals.capture import capture
from limbeck.signals.codecs import Sampled, TopK, bytes_per_position
from limbeck.signals.store import open_store
from limbeck.teachers.stored import StoredTeacher
from limbeck.types import Batch, Need, Signal

_EXAMPLES, _LENGTH, _BATCH = 512, 64, 8
_CODECS: tuple[Sampled | TopK, ...] = (Sampled(12), Sampled(50), TopK(32))


class Rows:
    def __init__(self, vocab_size: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocab_size, (_EXAMPLES, _LENGTH), generator=draw)

    def __len__(self) -> int:
        return _EXAMPLES

    def batch(self, positions: Any) -> Batch:
        at = torch.as_tensor(list(positions))
        ids = self.tokens[at]
        return Batch(
            inputs={"input_ids": ids}, labels=ids, mask=torch.ones_like(ids, dtype=torch.bool),
            example_ids=at,
        )  # fmt: skip


class Mouth:
    """Says the same about every example, so that writing is timed and not a teacher."""

    fingerprint, provides = "benchmark", frozenset({Need.LOGITS})

    def __init__(self, vocab_size: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.said = 3 * torch.randn(_LENGTH, vocab_size, generator=draw)

    def signal(self, batch: Batch, needs: frozenset[Need]) -> Signal:  # noqa: ARG002
        return Signal(logits=self.said.expand(len(batch.example_ids), -1, -1))


def step_ms(vocab_size: int, rows: Rows, teacher: StoredTeacher, orders: list[list[int]]) -> float:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=_LENGTH, n_embd=256, n_layer=4, n_head=4,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    objective = Objective(soft_weight=1.0, hard_weight=0.0)
    times = []
    for order in orders[:5]:
        batch = rows.batch(order)
        target = teacher.signal(batch, objective.needs)
        start = time.perf_counter()
        logits = model(**batch.inputs).logits
        terms = objective.terms(Signal(logits=logits), target, batch)
        terms["soft"].total.backward()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    prepare_torch()
    order = torch.randperm(_EXAMPLES, generator=torch.Generator().manual_seed(2))
    orders = [part.tolist() for part in order.split(_BATCH)]
    positions = _EXAMPLES * _LENGTH
    out = []
    print(f"{'':28} {'bytes':>6} {'write pos/s':>12} {'first read':>11} {'read':>8} {'MB/s':>6} "
          f"{'step':>8} {'share':>7}")  # fmt: skip
    for vocab_size in (49_152, 151_936):
        rows, mouth = Rows(vocab_size), Mouth(vocab_size)
        for codec in _CODECS:
            width = bytes_per_position(codec, vocab_size)
            with tempfile.TemporaryDirectory() as name:
                start = time.perf_counter()
                capture(mouth, rows, {Path(name): codec}, made_from={}, progress=Silent())
                write = positions / (time.perf_counter() - start)
                teacher = StoredTeacher(
                    store=open_store(Path(name)), fingerprint="benchmark", temperature=1.0
                )
                passes = []
                for _ in range(3):
                    start = time.perf_counter()
                    for part in orders:
                        teacher.signal(rows.batch(part), frozenset())
                    passes.append(1000 * (time.perf_counter() - start) / len(orders))
                first, read = passes[0], min(passes[1:])
                step = step_ms(vocab_size, rows, teacher, orders)
            speed = _BATCH * _LENGTH * width / read / 1000
            count = codec.n if isinstance(codec, Sampled) else codec.k
            setting = f"V={vocab_size:,} {codec.name} {count}"
            print(f"{setting:28} {width:>6} {write:>12,.0f} {first:>8.2f} ms {read:>5.2f} ms "
                  f"{speed:>6.0f} {step:>5.0f} ms {100 * read / step:>5.2f} %")  # fmt: skip
            out.append({"measure": "read", "setting": setting, "ours": read, "other": step,
                        "other_name": "a student's step", "ratio": read / step, "unit": "ms",
                        "n": len(orders)})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
