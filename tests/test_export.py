"""What is exported equals the model it came from, and loads where Limbeck is not."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from limbeck import measure, runtime
from limbeck.errors import MissingExtraError
from limbeck.export.card import model_card
from limbeck.export.onnx import export_onnx, quantize_int8
from limbeck.export.static import quantize_static_int8
from limbeck.tasks.text_classification import TextClassification
from report_samples import EVIL, make_report
from tiny_world import rows_of

MAX_TOKENS, VOCAB, LABELS = 16, 64, ["alt", "comp: |x|", "sci"]
TASK = TextClassification(tuple(LABELS), MAX_TOKENS)
INPUTS = TASK.inputs(BertConfig(vocab_size=VOCAB))


def draw(rng: np.random.Generator, n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of tokens of which some speak for the row's class."""
    labels = rng.integers(0, len(LABELS), n)
    rows = []
    for label in labels:
        row = rng.integers(2, VOCAB, rng.integers(3, MAX_TOKENS + 1))
        row[rng.random(len(row)) < 0.3] = 2 + label
        rows.append(row)
    return rows, labels


@pytest.fixture(scope="module")
def model() -> BertForSequenceClassification:
    """A tiny BERT that was taught something, so that its logits have the spread of real ones."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        num_hidden_layers=2, max_position_embeddings=MAX_TOKENS, num_labels=len(LABELS),
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows, labels = draw(rng, 64)
        logits = model(**padded(rows)).logits
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    paths = {name: folder / f"{name}.onnx" for name in ("onnx-fp32", "onnx-int8", "draft")}
    model.train()
    export_onnx(model, paths["onnx-fp32"], inputs=INPUTS)
    export_onnx(model, paths["draft"], inputs=INPUTS, draft=True)
    assert all(module.training for module in model.modules())  # as it was before
    model.eval()
    quantize_int8(paths["onnx-fp32"], paths["onnx-int8"])
    assert sorted(folder.iterdir()) == sorted(paths.values())  # whole files, nothing beside them
    return paths


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """Saved with leftovers of another use: padding, truncation, a length."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="w2 $A w3", special_tokens=[("w2", 2), ("w3", 3)]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(model, files, tokenizer_folder, tmp_path_factory) -> SimpleNamespace:
    """Folder, card and ONNX files as a run lays them out."""
    run = tmp_path_factory.mktemp("run")
    report = make_report(("small",), LABELS)
    entry, onnx_path = report.students[0], "students/small/onnx/model-int8.onnx"
    artifacts = [
        a.model_copy(update={"path": "students/small/hf" if a.format == "hf" else onnx_path})
        for a in entry.artifacts
    ]
    entry = entry.model_copy(update={"artifacts": tuple(artifacts)})
    recipe = {**report.recipe, "task": {"max_tokens": MAX_TOKENS}}
    report = report.model_copy(update={"students": (entry,), "recipe": recipe})
    card = model_card(report, entry, teacher=origin("hub", "org/teacher"), data=origin("local"))
    folder = run / "students/small/hf"
    TASK.save(model, tokenizer_folder, folder)
    (folder / "README.md").write_text(card)
    (run / onnx_path).parent.mkdir()
    (run / onnx_path).write_bytes(files["onnx-int8"].read_bytes())
    return SimpleNamespace(folder=folder, card=card, report=report, entry=entry)


def origin(kind: str, uri: str = "data.csv", licence: str | None = "Apache-2.0") -> SimpleNamespace:
    return SimpleNamespace(uri=uri, origin=kind, licence=licence)


def padded(rows: list[np.ndarray]) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
    return {"input_ids": ids, "attention_mask": mask}


# ---- ONNX


@pytest.mark.parametrize("name", ["onnx-fp32", "draft"])
def test_fp32_equals_the_model_at_any_batch_length_and_padding(model, files, name):
    predict = runtime.load_predictor(files[name], "onnx-fp32", threads=1)
    rows, _ = draw(np.random.default_rng(1), 32)
    for size in (1, 5, 26):
        inputs = padded(rows[:size])
        with torch.inference_mode():
            expected = model(**inputs).logits.numpy()
        found = predict({name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(found, expected, atol=1e-4)
        rows = rows[size:]


def test_int8_gives_the_models_answers(model, files):
    rows, labels = draw(np.random.default_rng(2), 400)
    logits = {
        name: runtime.predict(files[name], name, rows_of(rows))
        for name in ("onnx-fp32", "onnx-int8")
    }
    assert measure.accuracy(logits["onnx-fp32"], labels, seed=0).value > 0.8  # it knows something
    found = measure.parity(logits["onnx-fp32"], logits["onnx-int8"])
    assert found.agreement >= 0.98
    spread = np.abs(logits["onnx-fp32"]).max()
    assert 0 < found.max_abs_diff < 0.1 * spread


def test_inputs_output_and_free_sizes(files):
    for path in files.values():
        graph = onnx.load(path).graph
        assert [i.name for i in graph.input] == ["input_ids", "attention_mask"]
        assert [o.name for o in graph.output] == ["logits"]
        for value in graph.input:
            shape = value.type.tensor_type.shape.dim
            assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64
            assert len(shape) == 2 and all(d.dim_param and not d.dim_value for d in shape)


def test_every_matrix_of_the_int8_file_is_int8(files):
    graph = onnx.load(files["onnx-int8"]).graph
    big = [t for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 1]
    weights = [t for t in big if t.data_type == onnx.TensorProto.INT8]
    assert not [t.name for t in big if t.data_type == onnx.TensorProto.FLOAT]
    assert len(weights) == 3 + 2 * 6 + 2  # embeddings, layers, pooler and classifier
    ranges = [abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in weights]
    assert sorted(ranges)[-3:] == [127, 127, 127]  # embeddings are looked up, never multiplied
    assert max(sorted(ranges)[:-3]) <= 64  # 7 bits: u8 x s8 cannot saturate on AVX2


def test_same_model_same_bytes_and_no_trace_of_this_machine(model, files, tmp_path):
    again, int8 = tmp_path / "again.onnx", tmp_path / "int8.onnx"
    export_onnx(model, again, inputs=INPUTS)
    quantize_int8(again, int8)
    assert again.read_bytes() == files["onnx-fp32"].read_bytes()
    assert int8.read_bytes() == files["onnx-int8"].read_bytes()
    for trace in (b"site-packages", b".py", str(Path.home()).encode()):
        assert trace not in again.read_bytes()


def test_a_table_with_another_use_stays(tmp_path):
    """Tied embeddings: looked up and multiplied with."""
    table = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Transpose", ["table"], ["turned"]),
            helper.make_node("MatMul", ["rows", "turned"], ["scores"]),
        ],
        "tied",
        [helper.make_tensor_value_info("ids", kind.INT64, ["n"])],
        [helper.make_tensor_value_info("scores", kind.FLOAT, ["n", 6])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    tied = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(tied, tmp_path / "tied.onnx")
    quantize_int8(tmp_path / "tied.onnx", tmp_path / "int8.onnx")
    names = {t.name for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert "table" in names and "table_int8" not in names


def test_a_failed_export_leaves_what_was_there(tmp_path):
    class Broken(torch.nn.Linear):
        def forward(self, input_ids, attention_mask):
            raise RuntimeError("no such thing")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="no such thing"):
        export_onnx(Broken(2, 2), path, inputs=INPUTS, draft=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]


def test_what_does_not_fit_into_one_file_is_refused(tmp_path):
    huge = torch.nn.Linear(30_000, 30_000, device="meta")
    with pytest.raises(ValueError, match="2 GB"):
        export_onnx(huge, tmp_path / "model.onnx", inputs=INPUTS)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(model, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"limbeck\[export\]"):
        export_onnx(model, tmp_path / "model.onnx", inputs=INPUTS)
    with pytest.raises(MissingExtraError, match=r"limbeck\[export\]"):
        quantize_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")


# ---- the folder


def test_the_folder_is_the_model_and_nothing_else(model, student):
    names = {path.name for path in student.folder.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        student.folder, output_loading_info=True
    )
    assert not any(info.values())  # no key missing, unexpected or of another size
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {label: i for i, label in enumerate(LABELS)}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert model.config.id2label[0] != LABELS[0]  # the model at hand is left alone


def test_the_tokenizer_cuts_where_the_model_was_taught_to(student):
    tokenizer = AutoTokenizer.from_pretrained(student.folder)
    assert tokenizer.model_max_length == MAX_TOKENS
    assert len(tokenizer("w9 " * 100, truncation=True)["input_ids"]) == MAX_TOKENS
    assert tokenizer("w9")["input_ids"] == [2, 9, 3]  # neither padded nor cut at 5


def test_the_folder_has_the_same_bytes_each_time(model, student, tokenizer_folder, tmp_path):
    TASK.save(model, tokenizer_folder, tmp_path / "b")
    for path in student.folder.glob("[!R]*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    text = "".join(p.read_text("utf-8") for p in student.folder.glob("*.json"))
    assert str(tokenizer_folder) not in text


def test_a_projector_does_not_get_in(student, tokenizer_folder, tmp_path):
    taught = AutoModelForSequenceClassification.from_pretrained(student.folder)
    taught.projector = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"projector\.bias"):
        TASK.save(taught, tokenizer_folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- the card


def test_the_cards_snippets_work_as_written(student, monkeypatch, capsys):
    """ONNX Runtime's in a process without Limbeck and torch; both find the same label."""
    code = student.card.replace("Your text", "w2 w2 w9 " * 30)
    for_transformers, for_onnx = re.findall(r"```python\n(.*?)```", code, re.DOTALL)
    monkeypatch.chdir(student.folder)
    exec(for_transformers, {})
    label, _, share = capsys.readouterr().out.strip().rpartition(" ")
    absent = "import sys\nsys.modules.update(dict.fromkeys(['limbeck', 'torch', 'transformers']))\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", absent + for_onnx], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    int8_label, _, int8_share = done.stdout.strip().rpartition(" ")
    assert label == int8_label and label in LABELS
    assert float(share) == pytest.approx(float(int8_share), abs=0.05)


def front_matter(card: str) -> dict:
    opening, matter, _ = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(matter)


def test_the_card_says_what_the_hub_reads(student):
    found = front_matter(student.card)
    assert found["license"] == "apache-2.0"
    assert found["base_model"] == "org/teacher"
    assert found["pipeline_tag"] == "text-classification"
    assert found["metrics"] == ["accuracy"]
    for text in ("95 % bootstrap", "Where it lost most", "estimated: codecarbon", "Limbeck 0.1.0"):
        assert text in student.card


def test_a_card_before_any_measurement(student):
    report = make_report(("small",), LABELS, bare=True)
    entry = report.students[0]
    bare = [a.model_copy(update={"quality": None, "parity": None}) for a in entry.artifacts]
    budget = {"asked": {"latency_ms": 2}, "measured": {"latency_ms": None}, "met": False}
    entry = entry.model_copy(
        update={"artifacts": tuple(bare), "budget": type(entry.budget)(**budget), "fidelity": None}
    )
    card = model_card(report, entry, teacher=origin("local", licence=None), data=origin("local"))
    assert front_matter(card)["license"] == "unknown" and "base_model" not in front_matter(card)
    for text in ("Not measured yet", "not measured yet", "Not metered", "not stated"):
        assert text in card
    assert "None" not in card


def test_nothing_from_elsewhere_becomes_markup():
    report = make_report(("small",), [EVIL, "plain"])
    evil = origin("local", f"---\n# x\n```\n{EVIL}", licence="MIT\n---\nlicense: gpl")
    card = model_card(report, report.students[0], teacher=evil, data=evil)
    assert front_matter(card)["license"] == "other"
    outside = re.sub(r"```python\n.*?```", "", card.split("---\n", 2)[2], flags=re.DOTALL)
    for markup in ("<script", "\n# x", "\n---", "```", "[a](b)"):
        assert markup not in outside


def test_a_pooling_larger_than_the_image_is_right_in_int8(tmp_path):
    """As EfficientNet has one: all of the map, whatever its size."""
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.normal(size=(16, 3, 3, 3)), "low": np.array(0), "high": np.array(6),
        "head": random.normal(size=(16, 4)),
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("Conv", ["x", "kernel"], ["map"], kernel_shape=[3, 3]),
        onnx.helper.make_node("Clip", ["map", "low", "high"], ["clipped"]),
        onnx.helper.make_node(
            "AveragePool", ["clipped"], ["mean"], kernel_shape=[1280] * 2, strides=[1280] * 2,
            ceil_mode=1, count_include_pad=1,
        ),
        onnx.helper.make_node("Flatten", ["mean"], ["flat"]),
        onnx.helper.make_node("Gemm", ["flat", "head"], ["logits"]),
    ]  # fmt: skip
    of = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        nodes, "g", [of("x", shape=["batch", 3, 12, 12])], [of("logits", shape=["batch", 4])],
        [onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "fp32.onnx")
    x = random.normal(size=(64, 3, 12, 12)).astype(np.float32)
    quantize_static_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [{"x": x}])
    asked = [
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx").run(None, {"x": x})[0]
        for name in ("fp32", "int8")
    ]
    assert np.corrcoef(*(a.ravel() for a in asked))[0, 1] > 0.99
    assert (asked[0].argmax(1) == asked[1].argmax(1)).mean() > 0.9
