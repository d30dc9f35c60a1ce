"""Attention that is learnt in bf16 on a CPU: ours, over all heads at once, against torch's own.

    python benchmarks/attention.py [--runs 6] [--json FILE]

Forward and backward of causal attention with a mask, from fp32 heads of 64 (32 of the first), one
thread, its own CPU milliseconds, the least of the runs; the two in turn. Products as
`device.products_in("bf16")` has them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from limbeck._startup import prepare_torch
from limbeck.attention import scaled_dot_product_attention
from limbeck.device import products_in

# rows, heads, tokens, width
_CASES = [(32, 4, 20, 32), (16, 9, 64, 64), (4, 9, 128, 64), (2, 9, 256, 64), (2, 4, 512, 64),
          (1, 4, 1024, 64), (1, 4, 2048, 64)]  # fmt: skip


def milliseconds(function: Callable[..., Tensor], parts: list[Tensor], mask: Tensor) -> float:
    began = time.thread_time()
    found = function(*parts, attn_mask=mask)
    torch.autograd.grad(found, parts, torch.ones_like(found))
    return 1000 * (time.thread_time() - began)


def in_bf16(*parts: Tensor, attn_mask: Tensor) -> Tensor:
    query, key, value = (part.bfloat16() for part in parts)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prepare_torch()
    rows: list[dict[str, Any]] = []
    print(f"{'rows, heads, tokens, width':28}{'torch, ms':>11}{'ours, ms':>10}{'ratio':>7}")
    for case in _CASES:
        batch, heads, tokens, width = case
        torch.manual_seed(0)
        parts = [torch.randn(batch, tokens, heads, width).transpose(1, 2).requires_grad_()
                 for _ in range(3)]  # fmt: skip
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril()
        found: dict[str, list[float]] = {"torch": [], "ours": []}
        with products_in("bf16"):
            for _ in range(options.runs):
                found["torch"].append(milliseconds(in_bf16, parts, mask))
                found["ours"].append(milliseconds(scaled_dot_product_attention, parts, mask))
        theirs, ours = min(found["torch"]), min(found["ours"])
        print(f"{', '.join(map(str, case)):28}{theirs:11.2f}{ours:10.2f}{ours / theirs:7.2f}")
        rows.append({
            "measure": "attention, forward and backward", "setting": ", ".join(map(str, case)),
            "ours": ours, "other": theirs, "other_name": "torch, bf16", "ratio": ours / theirs,
            "unit": "ms", "n": options.runs,
        })  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
