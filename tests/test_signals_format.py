"""`docs/signals.md` says enough: a reader of numpy, json and safetensors alone finds the same."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from limbeck.progress import Silent
from limbeck.signals.capture import capture
from limbeck.signals.codecs import Sampled, TopK
from limbeck.signals.store import open_store
from test_store import MADE_FROM, Mouth, N, RowsOf


def bits(count: int) -> int:
    return max(1, int(np.ceil(np.log2(count))))


def unpacked(row: np.ndarray, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits: value i has bits [i b, (i + 1) b) of the stream."""
    stream = np.unpackbits(row, bitorder="little")[: width * count].reshape(count, width)
    return stream @ (1 << np.arange(width))


def read(folder, example: int) -> tuple[dict, dict[str, np.ndarray]]:
    """The manifest, and an example's fields."""
    manifest = json.loads((folder / "manifest.json").read_text())
    index = load_file(folder / "index.safetensors")
    assert manifest["schema"] == 2
    whole = (folder / "index.safetensors").read_bytes()
    assert hashlib.sha256(whole).hexdigest() == manifest["index_sha256"]
    (at,) = np.flatnonzero(index["example_ids"] == example)
    shard = manifest["shards"][index["shard"][at]]
    assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    tensors = load_file(folder / shard["file"])
    assert tensors["example_ids"][index["row"][at]] == example
    first, count = index["first"][at], index["count"][at]
    fields = {k: v[first : first + count] for k, v in tensors.items()}
    return manifest, {k: v for k, v in fields.items() if k not in ("example_ids", "counts")}


CODECS = (
    TopK(5, temperatures=(1.0, 2.0)), TopK(3, "int8"), Sampled(7), Sampled(7, "systematic"),
)  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_another_projects_reader_finds_the_same(tmp_path, codec):
    rows = RowsOf()
    capture(Mouth(), rows, {tmp_path: codec}, made_from=MADE_FROM, progress=Silent(), seed=1)
    store, temperature = open_store(tmp_path), codec.temperatures[-1]
    for example in rows.ids[: N // 5].tolist():
        expected = store.targets(torch.tensor([example]), temperature)
        manifest, fields = read(tmp_path, example)
        vocab, settings = manifest["vocab_size"], manifest["codec"]
        for position in range(len(expected.ids)):
            own = {name: values[position] for name, values in fields.items()}
            if settings["codec"] == "topk":
                k = min(settings["k"], vocab)
                ids = unpacked(own["ids"], bits(vocab), k)
                logits = own["logits"].astype(np.float64)
                if settings["values"] == "int8":
                    logits = -own["range"] * logits / 254
                mass = np.exp(logits / temperature)
                odds = np.exp(own["tails"][settings["temperatures"].index(temperature)])
                probs = mass / mass.sum() / (1 + odds)
                tail = expected.tail[position].item()
                assert tail == pytest.approx(odds / (1 + odds), rel=1e-5, abs=1e-9)
            else:
                n = min(settings["n"], vocab)
                ids = unpacked(own["ids"], bits(vocab), n)
                width = bits(settings["n"] + 1)
                if settings["draws"] == "distinct":
                    codes = unpacked(own["weights"], width + 2, n)
                    probs = (codes / (2 ** (width + 2) - 1)) ** 2
                else:
                    probs = unpacked(own["weights"], width, n) / settings["n"]
            assert ids.tolist() == expected.ids[position].tolist()
            np.testing.assert_allclose(probs, expected.probs[position].numpy(), rtol=1e-5)
