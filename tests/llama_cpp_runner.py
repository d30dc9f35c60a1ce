"""llama.cpp on one thread, for tests: tokens and log-probabilities of a GGUF file."""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest


@contextmanager
def without_amx():
    """Without its AMX kernels, which end the process (0.3.36). Skips where it is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    inner = llama_cpp.llama_cpp
    settings = inner.llama_model_default_params()
    settings.use_extra_bufts = False
    with patch.object(inner, "llama_model_default_params", lambda: settings):
        yield llama_cpp


@contextmanager
def opened(path: Path, n_ctx: int = 128):
    with without_amx() as llama_cpp:
        found = llama_cpp.Llama(
            str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
            type_k=0, type_v=0,  # keys and values in fp32
        )  # fmt: skip
    try:
        yield found
    finally:
        found.close()


def tokens(llama, text: str) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=False, special=True)


def log_probs(llama, ids: list[int]) -> np.ndarray:
    """(T - 1,) of each token after the first."""
    llama.reset()
    llama.eval(ids)
    logits = llama.scores[: len(ids) - 1].astype(np.float64)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logits[np.arange(len(ids) - 1), ids[1:]]


def greedy(llama, ids: list[int], n: int) -> list[int]:
    llama.reset()
    llama.eval(ids)
    said = []
    for _ in range(n):
        said.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(said[-1:])
    return said
