"""A language model's ONNX file says, with its cache, what the model says without one."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

import limbeck
import tiny_language
from limbeck import answers, runtime, texts, trying
from limbeck.causal import load_causal
from limbeck.cli import main
from limbeck.errors import LimbeckError, SourceError
from limbeck.generating import Sampling, generate
from limbeck.judging_language import OfLanguageModel
from limbeck.onnx_decoder import OnnxCausal, open_headless
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.runtime_worker import Decoder, onnx_session
from limbeck.tasks.rows import token_inputs
from test_measure_language import fields, rows
from tiny_world import quickly

onnx = pytest.importorskip("onnx")
from limbeck.export.onnx_language import export_decoder  # noqa: E402

TOKENIZER = tiny_language.tokenizer()
PROMPTS = TOKENIZER(["the old man", "12", "and the sea; theology of a mansion"])["input_ids"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A run's student: `hf` and its file."""
    folder = tmp_path_factory.mktemp("student")
    tiny_language.save(folder / "hf")
    (folder / "gguf").mkdir()
    model, path = load_causal(folder / "hf", where="x"), folder / "gguf/model-fp32.onnx"
    export_decoder(model, path, where="x")
    return folder


def test_names_are_those_that_others_expect_and_nothing_is_stored_twice(student):
    path = student / "gguf/model-fp32.onnx"
    graph = onnx.load(path).graph
    past = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert [one.name for one in graph.input] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in past)
    ]  # fmt: skip
    assert [one.name for one in graph.output] == ["logits", *(f"present.{n}" for n in past)]
    weights = sum(p.numel() for p in load_causal(student / "hf", where="x").parameters()) * 4
    assert weights < path.stat().st_size < weights + 80_000
    assert b".py" not in path.read_bytes(), "stack traces hold this machine's paths"


@pytest.mark.parametrize("made", ["llama", "untied qwen2"])
def test_step_by_step_with_its_cache_it_is_the_model_without_one(student, tmp_path, made):
    model, path = load_causal(student / "hf", where="x"), student / "gguf/model-fp32.onnx"
    if made != "llama":
        model = tiny_language.model(made=Qwen2ForCausalLM, tie_word_embeddings=False)
        path = tmp_path / "m.onnx"
        export_decoder(model, path, where="x")
    decoder = Decoder(onnx_session(str(path), 1))
    ids = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    wanted = model(input_ids=ids).logits.detach().numpy()
    for sizes in ([1] * ids.shape[1], [3, 1, ids.shape[1] - 4], [ids.shape[1]]):
        past, said = (), []
        for part in ids.split(sizes, dim=1):
            found, past = decoder(part.numpy(), past)
            said.append(found)
        assert np.abs(np.concatenate(said, 1) - wanted).max() < 1e-4


def test_greedy_tokens_are_the_models_own_whatever_the_batch(student):
    model = load_causal(student / "hf", where="x")
    file = OnnxCausal(student / "gguf/model-fp32.onnx", student / "hf")
    greedy = Sampling(max_new_tokens=20, sampling_temperature=0)
    wanted = generate(model, PROMPTS, greedy, ends=(), batch_size=1)
    for size in (1, 3):  # in a batch shorter prompts are padded on the left
        found = generate(file, PROMPTS, greedy, ends=(), batch_size=size)
        for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
            assert ours.tolist() == theirs.tolist()
        for ours, theirs in zip(found.log_probs, wanted.log_probs, strict=True):
            assert np.allclose(ours, theirs, atol=1e-4)


def test_it_writes_for_the_report_what_its_folder_does(student, tmp_path):
    folder = tiny_language.make_language_world(tmp_path, measure={"generate": {}})
    recipe, _ = load_recipe(folder / "recipe.yaml")
    prompts = [
        {"document": i, "prompt": "", "reference": "the sea", "tokens": ids, "own": ids}
        for i, ids in enumerate(PROMPTS)
    ]
    known = {"prompts": prompts, "ends": [2, 2], "notes": []}
    (tmp_path / "prompts.json").write_text(json.dumps(known))
    said = []
    for file, format in (("hf", "hf"), ("gguf/model-fp32.onnx", "onnx-fp32")):
        texts.write(
            tmp_path, recipe, student / file, format, tmp_path, "x", Silent(), of_teacher=False
        )
        said.append((tmp_path / "texts.json").read_text())
    assert said[0] == said[1] and len(json.loads(said[0])["written"]) == 3


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_it_is_asked_without_its_last_matrix_and_held_against_the_model_with_it(student, layout):
    path, hf, judge = student / "gguf/model-fp32.onnx", student / "hf", OfLanguageModel()
    assert open_headless(path)[1] is not None
    told = []
    found = answers.onnx_answers(path, rows(layout), told.append)
    assert sum(told) == len(rows(layout))
    wanted = answers.answers(load_causal(hf, where="x"), rows(layout), told.append)
    for a, b in zip(*(fields(answers.score(x))[:4] for x in (found, wanted)), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    origin = judge.ask(hf, "hf", rows(layout), told.append)
    asked = judge.ask(path, "onnx-fp32", rows(layout), told.append)
    parity = judge.parity(origin, asked, rows(layout))
    assert parity["agreement"] == 1 and 0 < parity["max_abs_diff"] < 1e-4
    assert parity["n"] == len(wanted.labels)


def test_parity_finds_a_cache_that_is_wrong(student, tmp_path):
    """One that the pass over a whole row never looks at."""
    model = onnx.load(student / "gguf/model-fp32.onnx")
    names = ["past_key_values.0.key", "past_key_values.1.key"]
    for node in model.graph.node:
        if node.op_type == "Concat" and node.input[0] in names:
            node.input[0] = names[1 - names.index(node.input[0])]
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf/model-fp32.onnx"
    onnx.save(model, path)
    judge, hf = OfLanguageModel(), student / "hf"
    origin, asked = (judge.ask(p, f, rows("pack"), lambda _: None)
                     for p, f in ((hf, "hf"), (path, "onnx-fp32")))  # fmt: skip
    assert judge.quality(asked)["value"] == judge.quality(origin)["value"]
    assert judge.parity(origin, asked, rows("pack"))["max_abs_diff"] > 0.1


def test_it_is_timed_in_writing_without_torch(student):
    timing = runtime.time_artifact(
        student / "gguf/model-fp32.onnx", "onnx-fp32", inputs=token_inputs(32, 400), threads=1,
        runs=10, writes=True,
    )  # fmt: skip
    assert timing.tokens_per_s > 1 and timing.latency_ms > 0 and timing.throughput_per_s is None
    assert timing.runtime.startswith("onnxruntime")


def test_try_streams_from_the_file_itself(student, capsys, monkeypatch):
    path = student / "gguf/model-fp32.onnx"
    assert main(["try", str(student / "hf"), "the old"]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("limbeck.causal.load_causal", None)
    pieces = trying.write(path, "the old", 12)
    assert next(pieces) and next(pieces)
    assert main(["try", str(path), "the old"]) == 0
    assert capsys.readouterr().out == wanted


def test_what_cannot_be_exported_or_loaded_is_named(tmp_path, monkeypatch):
    settings = tiny_language.config().to_dict() | {"sliding_window": 8, "model_type": None}
    slides = MistralForCausalLM(MistralConfig(**settings)).eval()
    with pytest.raises(SourceError, match=r"x: a MistralForCausalLM, whose cache .*Sliding"):
        export_decoder(slides, tmp_path / "m.onnx", where="x")
    monkeypatch.setattr("limbeck.export.onnx_language.MAX_BYTES", 1000)
    with pytest.raises(SourceError, match=r"x: .* GB of weights; allowed: 2 GB"):
        export_decoder(tiny_language.model(), tmp_path / "m.onnx", where="x")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(LimbeckError, match=r"m\.onnx: does not load as ONNX"):
        OnnxCausal(tmp_path / "m.onnx", tiny_language.save(tmp_path / "hf"))


def test_a_recipe_that_asks_for_it_gets_it_in_its_report(tmp_path):
    folder = tiny_language.make_language_world(
        tmp_path, export={"formats": ["hf", "onnx-fp32"], "primary": "onnx-fp32"}
    )
    timed = runtime.time_artifact
    with quickly(), patch.object(runtime, "time_artifact", timed):
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    (student,) = report.students
    made, plain = student.artifact("onnx-fp32"), student.artifact("hf")
    assert student.primary == "onnx-fp32" and report.teacher.primary == "hf"
    assert made.parity.agreement == 1 and made.parity.max_abs_diff < 1e-3
    assert made.quality.value == pytest.approx(plain.quality.value, abs=0.01)
    assert made.tokens_per_s > 1 and made.runtime.startswith("onnxruntime")
    path = folder / "out" / made.path
    assert path.stat().st_size == made.size_bytes
    plan = json.loads((folder / "out/students/one/plan/plan.json").read_text())
    assert plan["cost"]["size_bytes"] == pytest.approx(made.size_bytes, rel=0.1)
    for name in ("report.md", "students/one/hf/README.md"):
        assert "onnx-fp32" in (folder / "out" / name).read_text()
