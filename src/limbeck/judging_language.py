"""What a language model's answers are worth: the `Judge` of a task without labels.

A GGUF file is read back, its weights as they are stored and all else in fp32: what llama.cpp adds
by rounding inside of its products is not in these numbers (docs/language_models.md). An ONNX file
is run by ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.answers import Answers, Asker, score
from limbeck.judging import Asked, Told
from limbeck.measure_language import DocumentScores, ratio
from limbeck.onnx_decoder import open_decoder, said_of

_PARITY_ROWS = 16  # positions are many
_STEPS = 32  # of each document, at most, that go through a file's cache

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
        """On some of these rows; of an ONNX file with its cache, step by step, against the model
        without one."""
        few = rows.sample(_PARITY_ROWS, seed=0)
        apart, same = 0.0, 0
        one = _ask(origin.path, origin.format, few, lambda _: None)
        for a, b in _pairs(one, asked, few):
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


def _pairs(one: Answers, asked: Asked, rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of both at the same positions, some at a time."""
    if not asked.format.startswith("onnx"):
        other = _ask(asked.path, asked.format, rows, lambda _: None)
        yield from ((one.logits(at), other.logits(at)) for at in one.chunks())
        return
    decoder, start = open_decoder(asked.path), 0
    for at in range(len(rows)):
        said = said_of(decoder, rows, at, steps=_STEPS)
        yield one.logits(slice(start, start + len(said))).cpu(), said
        start += len(said)
    assert start == len(one.said)
