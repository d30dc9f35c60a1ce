"""Exported files run as they do on a device: alone, in order, and in a process of their own."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from limbeck import runtime, runtime_worker
from limbeck.errors import LimbeckError, MissingExtraError
from limbeck.export.onnx import export_onnx, quantize_int8
from limbeck.tasks.text_classification import TextClassification
from tiny_world import rows_of

MAX_TOKENS, VOCAB, CLASSES = 16, 64, 5
INPUTS = TextClassification(("a", "b"), MAX_TOKENS).inputs(BertConfig(vocab_size=VOCAB))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A tiny BERT in the three formats; the draft exporter is quick and exact enough here."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        num_hidden_layers=2, max_position_embeddings=MAX_TOKENS, num_labels=CLASSES,
        initializer_range=0.3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    paths = {"hf": folder, "onnx-fp32": folder / "a.onnx", "onnx-int8": folder / "b.onnx"}
    model.save_pretrained(folder)
    export_onnx(model, paths["onnx-fp32"], inputs=INPUTS, draft=True)
    quantize_int8(paths["onnx-fp32"], paths["onnx-int8"])
    return paths


@pytest.fixture(scope="module")
def examples() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, rng.integers(2, MAX_TOKENS + 1), dtype="i4") for _ in range(70)]


def predict(files, format, examples, **options):
    return runtime.predict(files[format], format, rows_of(examples), batch_size=8, **options)


def one_by_one(files, format, examples):
    model = runtime.load_predictor(files[format], format, threads=1)
    rows = [
        model({"input_ids": x[None].astype(np.int64), "attention_mask": np.ones((1, len(x)), "i8")})
        for x in examples
    ]
    return np.concatenate(rows)


@pytest.mark.parametrize("format", ["hf", "onnx-fp32", "onnx-int8"])
def test_predictions_are_in_the_order_given_and_of_each_example(files, examples, format):
    done: list[int] = []
    found = predict(files, format, examples, progress=done.append)
    assert found.shape == (70, CLASSES) and found.dtype == np.float32
    assert sum(done) == 70 and min(done) > 0
    alone = one_by_one(files, format, examples)
    assert np.abs(alone - alone[::-1]).max() > 0.5  # examples differ, so order is proved
    np.testing.assert_allclose(found, alone, atol=0 if format == "onnx-int8" else 1e-4)


@pytest.mark.parametrize("format", ["onnx-fp32", "onnx-int8"])
def test_calls_side_by_side_change_nothing(files, examples, format, monkeypatch):
    together = predict(files, format, examples)
    monkeypatch.setattr(runtime, "on_each", map)
    np.testing.assert_array_equal(together, predict(files, format, examples))


def test_int8_answers_do_not_depend_on_the_company(files, examples):
    """Though in one batch they would: the scale of its activations is the whole batch's."""
    some = examples[::3]
    np.testing.assert_array_equal(
        predict(files, "onnx-int8", some), predict(files, "onnx-int8", examples)[::3]
    )
    same_length = [np.resize(x, MAX_TOKENS) for x in examples[:32]]
    model = runtime.load_predictor(files["onnx-int8"], "onnx-int8", threads=1)
    ids = np.stack(same_length).astype(np.int64)
    together = model({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert np.abs(together - predict(files, "onnx-int8", same_length)).max() > 1e-4


def test_torch_and_onnx_say_the_same(files, examples):
    before = torch.get_num_threads()
    hf = predict(files, "hf", examples)
    np.testing.assert_allclose(hf, predict(files, "onnx-fp32", examples), atol=1e-4)
    assert torch.get_num_threads() == before


def test_an_interrupt_does_not_wait_for_the_rest(files, examples):
    calls = []

    def interrupt(count):
        calls.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(files, "onnx-int8", examples * 20, progress=interrupt)
    assert len(calls) == 1


def test_no_examples_is_a_mistake(files):
    with pytest.raises(ValueError, match="no examples"):
        predict(files, "onnx-fp32", [])


def timed(files, format, **options):
    settings = {"inputs": INPUTS, "threads": 1, "runs": 20}
    return runtime.time_artifact(files[format], format, **{**settings, **options})


def test_timing_is_of_a_process_that_holds_nothing_else(files):
    ballast = np.ones(80_000_000)  # 640 MB here must not count as memory there
    timing = timed(files, "onnx-int8", batch_size=4)
    assert ballast.any()
    assert 0 < timing.latency_ms <= timing.latency_p95_ms
    assert timing.latency_iqr_ms >= 0
    assert timing.latency_wall_ms >= 0.9 * timing.latency_ms
    assert timing.throughput_per_s > 0
    assert 10e6 < timing.peak_memory_bytes < 300e6
    assert (timing.device, timing.threads, timing.runs) == ("cpu", 1, 20)
    assert timing.runtime.startswith("onnxruntime 1.")


def test_a_busy_machine_does_not_make_a_file_slower(files):
    """One thread's time is that it held a core, whoever else wanted it."""
    busy = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(4)]
    try:
        disturbed = timed(files, "onnx-fp32", runs=200)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    quiet = timed(files, "onnx-fp32", runs=200)
    assert disturbed.latency_p95_ms < 4 * quiet.latency_p95_ms  # on the wall: time slices of ms
    assert timed(files, "onnx-fp32", threads=2).latency_ms > 0


def test_timing_of_a_folder_uses_torch(files):
    timing = timed(files, "hf", runs=10, batch_size=2)
    assert timing.runtime.startswith("torch 2.")
    assert timing.peak_memory_bytes > 100e6


def test_memory_is_known_without_proc(monkeypatch):
    here = runtime_worker.peak_memory_bytes()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "no such line")
    assert 0.5 < runtime_worker.peak_memory_bytes() / here < 2


def test_a_broken_file_is_one_sentence_with_its_last_lines(tmp_path):
    broken = {"onnx-fp32": tmp_path / "x.onnx"}
    broken["onnx-fp32"].write_bytes(b"not a model")
    with pytest.raises(LimbeckError, match=r"x\.onnx: .* status 1: .*(?i:protobuf)"):
        timed(broken, "onnx-fp32")
    with pytest.raises(LimbeckError, match=r"x\.onnx: does not load as onnx-fp32"):
        runtime.load_predictor(broken["onnx-fp32"], "onnx-fp32", threads=1)
    with pytest.raises(LimbeckError, match=r"nowhere: does not load as hf"):
        runtime.load_predictor(tmp_path / "nowhere", "hf", threads=1)


def test_a_process_that_hangs_is_ended(files):
    with pytest.raises(LimbeckError, match=r"took longer than 0\.01 s"):
        timed(files, "onnx-fp32", timeout_s=0.01)


def test_a_process_that_is_killed_is_reported(files, tmp_path, monkeypatch):
    suicide = tmp_path / "worker.py"
    suicide.write_text(
        "import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(runtime_worker, "__file__", str(suicide))
    with pytest.raises(LimbeckError, match=r"status -9: out of luck"):
        timed(files, "onnx-fp32")


def test_a_missing_runtime_names_the_extra(files, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("raise ModuleNotFoundError(\"No module named 'onnxruntime'\")")
    monkeypatch.setattr(runtime_worker, "__file__", str(worker))
    with pytest.raises(MissingExtraError, match=r"limbeck\[export\]"):
        timed(files, "onnx-fp32")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"limbeck\[export\]"):
        runtime.load_predictor(files["onnx-fp32"], "onnx-fp32", threads=1)


def test_the_worker_imports_nothing_of_ours_but_networks():
    tree = ast.parse(Path(runtime_worker.__file__).read_text(encoding="utf-8"))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert names - sys.stdlib_module_names == {
        "limbeck", "llama_cpp", "numpy", "onnxruntime", "pandas", "skops", "sklearn", "torch",
        "transformers",
    }  # fmt: skip
    ours = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert [name for name in ours if name.split(".")[0] == "limbeck"] == ["limbeck"], "nets alone"
