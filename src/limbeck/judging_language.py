"""What a language model's answers are worth: the `Judge` of a task without labels.

A GGUF file is read back, its weights as they are stored and all else in fp32: what llama.cpp adds
by rounding inside of its products is not in these numbers (docs/language_models.md).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.answers import Asker, score
from limbeck.judging import Asked, Told
from limbeck.measure_language import DocumentScores, ratio

_PARITY_ROWS = 16  # positions are many

_ask = Asker()


class OfLanguageModel:
    def ask(self, path: Path, format: str, rows: Any, told: Told) -> Asked:
        scores = score(_ask(path, format, rows, told))
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
        one, other = (_ask(a.path, a.format, few, lambda _: None) for a in (origin, asked))
        apart, same = 0.0, 0
        for at in one.chunks():
            a, b = one.logits(at), other.logits(at)
            apart = max(apart, float((a - b).abs().max()))
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
        return {"max_abs_diff": apart, "agreement": same / len(one.said), "n": len(one.said)}

    def compare(self, teacher: Asked, student: Asked, told: Told) -> dict[str, Any]:
        """On the rows that both were asked about."""
        rows: Any = student.rows
        found = score(*(_ask(a.path, a.format, rows, told) for a in (student, teacher)))
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
