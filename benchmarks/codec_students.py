"""What stored signals are worth to a student: the same one, taught from each codec.

    python benchmarks/codec_students.py [--quick] [--json FILE]

A small language model of our own making (4 x 192, byte-pair vocabulary of 4,096) is trained on
20 Newsgroups and asked once about 1,500 stretches of 64 tokens, for each codec into a store of its
own. A student (2 x 96, random start) is then taught for the same steps from each store, with soft
targets alone, once a seed (its start and the order of the rows; the draws of a sample are those of
the store). Compared is KL(teacher || student), nats a token, on stretches that neither was
trained on. "hard labels" is the next token itself. The limit is the student's, not 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from limbeck._startup import prepare_torch
from limbeck.cores import on_each
from limbeck.losses.divergence import forward_kl
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.recipe import TrainingSpec
from limbeck.recipe_file import load_recipe
from limbeck.signals.capture import capture
from limbeck.signals.codecs import Codec, Dense, Sampled, TopK, bytes_per_position
from limbeck.signals.store import open_store
from limbeck.sources import fetch
from limbeck.step import Training
from limbeck.tasks.tables import read_table
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.stored import NoTeacher, StoredTeacher
from limbeck.train import train
from limbeck.types import Batch

_VOCAB, _LENGTH = 4096, 64
_CODECS: dict[str, Codec] = {
    "dense fp16": Dense(),
    "topk 8": TopK(8),
    "topk 32": TopK(32),
    "sampled 12": Sampled(12),
    "sampled 24": Sampled(24),
}


@dataclass(frozen=True)
class Stretches:
    """Rows of tokens; a position counts where there is a next token."""

    tokens: Tensor  # (N, T) int64

    num_views, num_together = 1, 32

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, positions: Sequence[int]) -> Batch:
        at = torch.as_tensor(positions)
        ids = self.tokens[at]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, -1] = False
        return Batch(
            inputs={"input_ids": ids}, labels=ids.roll(-1, 1), mask=mask, example_ids=at.long()
        )


def stretches(numbers: dict[str, int]) -> dict[str, Stretches]:
    """As many for each purpose, none of them in two."""
    recipe, base = load_recipe("quickstart")
    path = fetch(recipe.data.train, where="data", base=base, kind="data").path
    texts = list(read_table(path, recipe.data, where="data").texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=_VOCAB, show_progress=False)
    flat = [i for at in order for i in tokenizer.encode(texts[at]).ids]
    rows = torch.tensor(flat[: sum(numbers.values()) * _LENGTH]).view(-1, _LENGTH)
    parts = rows.split(list(numbers.values()))
    return {name: Stretches(part) for name, part in zip(numbers, parts, strict=True)}


def language_model(layers: int, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=_VOCAB, n_positions=_LENGTH, n_embd=width, n_layer=layers, n_head=width // 32,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def taught(
    model: nn.Module, rows: Stretches, teacher: Any, objective: Objective, steps: int, seed: int
) -> nn.Module:
    spec = TrainingSpec(
        epochs=steps * 32 / len(rows), batch_size=32, learning_rate=2e-3, weight_decay=0.01
    )
    training: Any = Training(
        rows=rows, teacher=teacher, objective=objective, spec=spec, seed=seed, title=""
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, training, Path(folder), Silent())
    return model


def held_out_kl(student: nn.Module, teacher: nn.Module, rows: Stretches) -> float:
    @torch.inference_mode()
    def total(start: int) -> tuple[float, int]:
        batch = rows.batch(range(start, min(start + 16, len(rows))))
        ours, theirs = (m(**batch.inputs).logits[batch.mask] for m in (student, teacher))
        kl = forward_kl(ours, theirs)
        return float(kl.sum()), len(kl)

    sums, counts = zip(*on_each(total, range(0, len(rows), 16)), strict=True)
    return sum(sums) / sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    prepare_torch()
    steps, seeds = (20, 1) if options.quick else (200, 3)
    rows = stretches({"teacher": 6_000, "student": 1_500, "held out": 256})
    hard, soft = Objective(hard_weight=1), Objective(soft_weight=1, hard_weight=0)
    start = time.perf_counter()
    big = taught(language_model(4, 192, 0), rows["teacher"], NoTeacher(), hard, 2 * steps, 0)
    print(f"teacher: {2 * steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    live = LiveTeacher(big, "benchmark")

    found: dict[str, list[float]] = {}
    bytes_of: dict[str, int] = {"hard labels": 0}
    with tempfile.TemporaryDirectory() as name:
        stores = {}
        for codec, made in _CODECS.items():
            at = Path(name) / codec.replace(" ", "-")
            capture(live, rows["student"], {at: made}, made_from={}, progress=Silent())
            stores[codec] = open_store(at)
            bytes_of[codec] = bytes_per_position(made, _VOCAB)
        print(f"captured {len(_CODECS)} times at {time.perf_counter() - start:.0f} s", flush=True)
        for seed in range(seeds):
            for codec in ("hard labels", *_CODECS):
                teacher = NoTeacher() if codec == "hard labels" else StoredTeacher(
                    store=stores[codec], fingerprint="benchmark", temperature=1.0
                )  # fmt: skip
                objective = hard if codec == "hard labels" else soft
                student = language_model(2, 96, seed + 1)
                taught(student, rows["student"], teacher, objective, steps, seed)
                found.setdefault(codec, []).append(held_out_kl(student, big, rows["held out"]))
                print(f"seed {seed}, {codec}: {found[codec][-1]:.4f} nats, "
                      f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    dense = found["dense fp16"]
    print(f"\n{'codec':<24} {'bytes':>7} {'KL':>8} {'sd':>7} {'over dense, by seed':>24}")
    for codec, kls in found.items():
        apart = [a - b for a, b in zip(kls, dense, strict=True)]
        sd = statistics.stdev(kls) if len(kls) > 1 else 0.0
        print(f"{codec:<24} {bytes_of[codec]:>7,} {statistics.mean(kls):>8.4f} {sd:>7.4f} "
              f"{' '.join(f'{a:+.4f}' for a in apart):>24}")  # fmt: skip
    if options.json:
        rows_out = [
            {"measure": "held-out KL", "setting": codec, "ours": statistics.mean(kls),
             "other": statistics.mean(dense), "other_name": "dense fp16",
             "ratio": statistics.mean(kls) / statistics.mean(dense), "unit": "nats a token",
             "n": len(kls)}
            for codec, kls in found.items()
        ]  # fmt: skip
        options.json.write_text(json.dumps(rows_out, indent=1) + "\n")


if __name__ == "__main__":
    main()
