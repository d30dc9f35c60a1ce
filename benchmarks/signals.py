"""What each codec costs and keeps, against full fp16 logits, side by side in one run.

    python benchmarks/signals.py [--quick] [--json FILE]

bytes       of one position
encode      positions a second, from float32 logits in memory to fields; MB/s of those logits
decode      positions a second, from fields to targets
TV          total variation between teacher and decoded targets (top-k: the tail spread evenly
            over the other ids; sampled: of one draw, whose weights are an estimate, not a model)
KL          KL(teacher || decoded), where that is defined: nats
rms error   of one position's gradient towards the student's logits, as a share of that gradient
bias        length of the mean error over draws, corrected for the noise of that mean, as a share
score       that bias in standard errors: all coordinates and positions at once (see `bias_of`).
            Within 3: none was found. Without noise (inf) all of the error is bias; that of fp16
            is its rounding.

Top-k's gradient is shown as three losses see it: the tail dropped, the kept renormalised to sum
to 1 (what most projects do), and the tail as one more class, of which the student has the mass of
all other ids.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.signals.codecs import Dense, Sampled, TopK, bytes_per_position
from limbeck.signals.errors import Gradients, bias_of, distances, topk_weights
from limbeck.types import DenseTargets

VOCABULARIES = {49_152: "SmolLM2", 151_936: "Qwen2.5"}
CODECS: tuple[Dense | TopK | Sampled, ...] = (
    Dense("fp16"),
    *(TopK(k) for k in (8, 32, 64, 128)),
    *(Sampled(n) for n in (8, 12, 24, 50)),
    Sampled(13, "systematic"),  # the bytes of Sampled(12), with the draws of other papers
    Sampled(13, "independent"),
)


def teacher_logits(num_positions: int, vocab_size: int, seed: int = 0) -> Tensor:
    """(P, V) float32, as a small language model's: made, not measured.

    Ids are in the order of their frequency, as a BPE's roughly are: Zipf's law, with normal noise.
    At each position 100 ids, drawn by frequency, fit: they gain 4 to 10 nats less the logarithm of
    their rank. All is scaled by 0.5 to 2.5, so that entropies run from 0.1 to 10 nats, with a
    median near 1.8, a mean near 2.5 (the loss of a small model) and the 32 largest holding 0.9.
    """
    noise = torch.Generator().manual_seed(seed)
    prior = -torch.log(torch.arange(vocab_size) + 3.0)
    logits = prior + torch.randn(num_positions, vocab_size, generator=noise)
    scale = 0.5 + 2 * torch.rand(num_positions, 1, generator=noise)
    fitting = torch.multinomial(prior.exp().expand(num_positions, -1), 100, generator=noise)
    gain = 6 * torch.rand(num_positions, 1, generator=noise) + 1 - torch.arange(1, 101).log()
    gain = gain + 1.5 * torch.randn(num_positions, 100, generator=noise)
    logits.scatter_add_(1, fitting, gain - prior[fitting])
    return logits * scale


def student_logits(teacher: Tensor, seed: int = 1) -> Tensor:
    """A student that has learnt something: flatter than its teacher, and noisy."""
    noise = torch.Generator().manual_seed(seed)
    return 0.7 * teacher + torch.randn(teacher.shape, generator=noise)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    vocab_size: int
    codec: str
    num_bytes: int
    encode: float
    decode: float
    total_variation: float
    kl: float | None
    rms_error: float
    bias: float
    score: float


# --- one codec -----------------------------------------------------------------------------------


def measured(
    codec: Dense | TopK | Sampled, teacher: Tensor, gradients: Gradients, num_draws: int
) -> list[Row]:
    num_positions, vocab_size = teacher.shape
    p, s = gradients.p, gradients.s
    keys = torch.stack([torch.arange(num_positions), torch.zeros(num_positions).long()], 1)
    fields = codec.encode(teacher, keys, 0)
    targets = codec.decode(fields, vocab_size)

    row = Row(
        vocab_size, str(codec), bytes_per_position(codec, vocab_size),
        num_positions / seconds(lambda: codec.encode(teacher, keys, 0)),
        num_positions / seconds(lambda: codec.decode(fields, vocab_size)),
        0, None, 0, 0, 0,
    )  # fmt: skip
    if isinstance(targets, DenseTargets):
        decoded = targets.logits.double().softmax(-1)
        error = gradients.share(decoded)
        row = replace(row, **distances(p, decoded), rms_error=error, bias=error, score=math.inf)
        return [replace(row, codec="dense fp16")]
    weights = torch.zeros_like(p).scatter_add_(1, targets.ids, targets.probs.double())
    if isinstance(codec, Sampled):
        seeds = range(num_draws)
        drawn = [codec.decode(codec.encode(teacher, keys, i), vocab_size) for i in seeds]
        rms, bias, score = bias_of(drawn, gradients)  # type: ignore[arg-type]
        variation = float((weights - p).abs().sum(-1).mean() / 2)
        row = replace(row, total_variation=variation, rms_error=rms, bias=bias, score=score)
        return [replace(row, codec=f"sampled {codec.n} {codec.draws}")]
    rest = (1.0 - (weights > 0).double()) / (vocab_size - codec.k)
    row = replace(row, **distances(p, weights + rest * targets.tail.double().unsqueeze(-1)))
    rows = []
    for loss, w in topk_weights(targets, p, s).items():
        error = gradients.share(w)
        name = f"topk {codec.k} {loss}"
        rows.append(replace(row, codec=name, rms_error=error, bias=error, score=math.inf))
    return rows


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median of a few, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# --- output --------------------------------------------------------------------------------------


def print_table(rows: list[Row]) -> None:
    print(f"{'codec':<25} {'bytes':>7} {'encode/s':>9} {'MB/s':>6} {'decode/s':>9} "
          f"{'TV':>7} {'KL':>8} {'rms error':>9} {'bias':>8} {'score':>6}")  # fmt: skip
    for row in rows:
        kl = "-" if row.kl is None else f"{row.kl:.4f}"
        megabytes = row.encode * row.vocab_size * 4 / 1e6
        print(f"{row.codec:<25} {row.num_bytes:>7,} {row.encode:>9,.0f} {megabytes:>6,.0f} "
              f"{row.decode:>9,.0f} {row.total_variation:>7.4f} {kl:>8} {row.rms_error:>9.5f} "
              f"{row.bias:>8.5f} {row.score:>6.1f}")  # fmt: skip


def as_json(rows: list[Row], num_positions: int) -> list[dict[str, Any]]:
    """Every number beside that of dense fp16 logits of the same vocabulary."""
    dense = {row.vocab_size: row for row in rows if row.codec == "dense fp16"}
    units = {
        "num_bytes": "bytes/position", "encode": "positions/s", "decode": "positions/s",
        "total_variation": "", "kl": "nats", "rms_error": "of the gradient",
        "bias": "of the gradient", "score": "standard errors",
    }  # fmt: skip
    found = []
    for row in rows:
        for measure, unit in units.items():
            ours, other = getattr(row, measure), getattr(dense[row.vocab_size], measure)
            if ours is None or not math.isfinite(ours):
                continue
            other = other if math.isfinite(other) else None
            setting = f"{row.codec}, V={row.vocab_size}"
            ratio = ours / other if other else None
            found.append({
                "measure": measure, "setting": setting, "ours": ours, "other": other,
                "other_name": "dense fp16", "ratio": ratio, "unit": unit, "n": num_positions,
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer positions and draws")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    num_positions, num_draws = (32, 20) if options.quick else (128, 100)
    rows = []
    for vocab_size, model in VOCABULARIES.items():
        teacher = teacher_logits(num_positions, vocab_size)
        p = teacher.double().softmax(-1)
        gradients = Gradients(p, student_logits(teacher).double().softmax(-1))
        entropy = torch.special.entr(p).sum(-1)
        low, middle, high = entropy.quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
        print(f"V = {vocab_size:,} (as {model}), {num_positions} positions, {num_draws} draws, "
              f"entropy {low:.2f} / {middle:.2f} / {high:.2f} nats (5 / 50 / 95 %)")  # fmt: skip
        here = [r for codec in CODECS for r in measured(codec, teacher, gradients, num_draws)]
        print_table(here)
        print()
        rows += here
    if options.json:
        options.json.write_text(json.dumps(as_json(rows, num_positions), indent=1) + "\n")


if __name__ == "__main__":
    main()
