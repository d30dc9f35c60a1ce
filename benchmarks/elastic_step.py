"""What a step of a family costs: CPU time and memory, by size and for all sizes together.

    python benchmarks/elastic_step.py [--quick] [--json FILE]

A random BERT of MiniLM's shape (6 layers of 384, 30,522 words), 32 examples of 20 tokens, one
thread, five sizes with 40 to 1 % of the encoder's weights. `naive` is `functional_call` with views
of the shared weights: each gradient is as large as they are, and torch's fused AdamW walks them
all. `alone` is a plain model with the same optimizer. `family` works on views (`limbeck.family`)
and on what has a gradient (`limbeck.shared_adamw`). Medians of CPU milliseconds, one kind's turn
after the other's.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import BertConfig

from limbeck.architecture.cut import cut, student_config
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.family import Family, Size
from limbeck.models import build_classifier, no_dropout
from limbeck.shared_adamw import SharedAdamW, clip, gather
from limbeck.types import Shape

_SHAPES = {
    "a": (8, 1152, 5), "b": (6, 768, 4), "c": (5, 512, 3), "d": (4, 384, 2), "e": (3, 320, 1),
}  # fmt: skip
_BETAS = (0.9, 0.98)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels)


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rounds = 3 if options.quick else 15
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_attention_heads=12, num_hidden_layers=6, intermediate_size=1536,
        num_labels=20,
    )  # fmt: skip
    teacher = build_classifier(config).eval()
    axes = prove_axes(
        teacher, config, build_classifier, find_axes(config, build_classifier),
        example_inputs(teacher, config), seed=0,
    )  # fmt: skip
    shapes = {
        name: Shape({"hidden": 32 * heads, "heads": heads, "ffn": ffn}, tuple(range(layers)))
        for name, (heads, ffn, layers) in _SHAPES.items()
    }
    state = teacher.state_dict()
    before = resident_mb()
    family = Family(config, build_classifier, axes, shapes, state)
    grown = resident_mb() - before
    held = sum(w.nbytes for w in family.weights.values()) / 1e6
    largest = sum(p.nbytes for p in family.sizes["a"].model.parameters()) / 1e6
    print(f"shared weights {held:.1f} MB, the largest size alone {largest:.1f} MB; "
          f"the process grew by {grown:.1f} MB for five models")  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 30522, (32, 20)),
              "attention_mask": torch.ones(32, 20, dtype=torch.long)}  # fmt: skip
    labels = torch.arange(32) % 20
    ours = SharedAdamW(family.weights, dict.fromkeys(family.weights, 1e-6), 0.01, family.tables)

    steps: list[None] = []

    def elastic(sizes: list[Size]) -> None:
        found = []
        for size in sizes:
            loss = loss_of(size.model(**inputs).logits, labels) / len(sizes)
            gradients = torch.autograd.grad(loss, [p for _, p in size.trainable])
            found.append((size, gradients))
        pieces = gather(family, found)
        clip(pieces, 1.0)
        steps.append(None)
        ours.step(pieces, number=len(steps), factor=1.0)

    shared = {name: w.clone().requires_grad_() for name, w in family.weights.items()}
    theirs = torch.optim.AdamW([*shared.values()], lr=1e-6, betas=_BETAS, fused=True)

    def naive(names: list[str]) -> None:
        for name in names:
            skeleton = skeletons[name]
            views = cut(shared, family.axes, shapes[name])
            logits = functional_call(skeleton, views, (), inputs).logits
            (loss_of(logits, labels) / len(names)).backward()
        torch.nn.utils.clip_grad_norm_(shared.values(), 1.0)
        theirs.step()
        theirs.zero_grad()

    skeletons, alone = {}, {}
    for name, size in family.sizes.items():
        skeletons[name] = build_classifier(student_config(config, axes, shapes[name])).eval()
        plain = family.extract(name)
        for model in (size.model, skeletons[name], plain):
            no_dropout(model)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, betas=_BETAS, fused=True)

        def step(plain: torch.nn.Module = plain, optimizer: torch.optim.AdamW = optimizer) -> None:
            loss_of(plain(**inputs).logits, labels).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        alone[name] = step

    def all_alone() -> None:
        for run in alone.values():
            run()

    kinds: dict[str, dict[str, Callable[[], None]]] = {
        name: {"family": lambda s=size: elastic([s]), "alone": alone[name],
               "naive": lambda n=name: naive([n])}
        for name, size in family.sizes.items()
    }  # fmt: skip
    kinds["all five"] = {"family": lambda: elastic([*family.sizes.values()]), "alone": all_alone,
                         "naive": lambda: naive([*shapes])}  # fmt: skip
    print(f"{'size':10} {'family':>8} {'alone':>8} {'naive':>8}  CPU ms")
    out = []
    for name, ways in kinds.items():
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, run in ways.items():
                start = time.process_time()
                run()
                if turn:
                    times[way].append(1e3 * (time.process_time() - start))
        medians = {way: statistics.median(taken) for way, taken in times.items()}
        print(f"{name:10} " + " ".join(f"{medians[way]:8.1f}" for way in ways), flush=True)
        out += [
            {"measure": "CPU time of a step", "setting": name, "ours": medians["family"],
             "other": medians[other], "other_name": other,
             "ratio": medians["family"] / medians[other], "unit": "ms", "n": rounds}
            for other in ("alone", "naive")
        ]  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
