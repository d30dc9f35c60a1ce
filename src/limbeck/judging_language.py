"""What a language model's answers are worth: the `Judge` of a task without labels.

A GGUF file is read back, its weights as they are stored and all else in fp32: what llama.cpp adds
by rounding inside of its products is not in these numbers (docs/language_models.md).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from limbeck.causal import load_causal
from limbeck.gguf_source import read_gguf
from limbeck.judging import Asked, Told
from limbeck.measure_language import DocumentScores, ratio, score_documents

if TYPE_CHECKING:
    from limbeck.tasks.causal_rows import Rows

_PARITY_ROWS = 16  # positions are many


def load_file(path: Path, format: str) -> nn.Module:
    """The exported file's model, in eval mode, that keeps no keys and values."""
    if format == "hf":
        return load_causal(path, where=str(path))
    model, _, _ = read_gguf(path, where=str(path))
    model.config.use_cache = False
    return model.eval()


class OfLanguageModel:
    def ask(self, path: Path, format: str, rows: Any, told: Told) -> Asked:
        scores = _scored(load_file(path, format), rows, told)
        said = {k: v for k, v in asdict(scores).items() if v is not None}
        return Asked(path=path, format=format, rows=rows, said=said)

    def quality(self, asked: Asked) -> dict[str, Any]:
        """Of tokens, with intervals over documents: `n` of them."""
        scores = DocumentScores(**asked.said)
        found = asdict(scores.accuracy(seed=0))
        perplexity = scores.perplexity(seed=0).value
        return {"metric": "next-token_accuracy", **found, "perplexity": perplexity}

    @torch.inference_mode()
    def parity(self, origin: Asked, asked: Asked, rows: Any) -> dict[str, Any]:
        """On some of these rows."""
        few = rows.sample(_PARITY_ROWS, seed=0)
        models = [load_file(a.path, a.format) for a in (origin, asked)]
        apart, same, n = 0.0, 0, 0
        for batch in few.batches(few.num_together):
            one, other = (m(**batch.inputs).logits[batch.mask] for m in models)
            apart = max(apart, float((one - other).abs().max()))
            same += int((one.argmax(-1) == other.argmax(-1)).sum())
            n += len(one)
        return {"max_abs_diff": apart, "agreement": same / n, "n": n}

    def compare(self, teacher: Asked, student: Asked, told: Told) -> dict[str, Any]:
        """Both are asked again, side by side: logits over a vocabulary take too much room."""
        rows: Any = student.rows
        models = [load_file(a.path, a.format) for a in (student, teacher)]
        found = _scored(models[0], rows, told, models[1])
        theirs, mine = (np.asarray(a.said["right"], float) for a in (teacher, student))
        return {
            "retention": asdict(ratio(mine, theirs, seed=0)) if theirs.any() else None,
            "fidelity": {
                "agreement": found.agreement(seed=0).value,
                "mean_kl": found.mean_kl(seed=0).value,
                "n": len(found.documents),
            },
            "capabilities": {},
        }


def _scored(
    model: nn.Module, rows: Rows, told: Told, teacher: nn.Module | None = None
) -> DocumentScores:
    return score_documents(model, rows, teacher=teacher, batch_size=rows.num_together, told=told)
