"""Whatever is wrong with what was asked: one message in four parts, an exit code, nothing lost."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from transformers import (
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
)
from transformers import ViTForImageClassification as Vit

from conftest import contents
from limbeck import archives
from limbeck.cli import main
from tiny_models import bert_config
from tiny_world import save_bert, save_tokenizer, table

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ("distill.temprature=2", "recipe.distill.temprature", ["did you mean 'temperature'?"]),
        ("colour=red", "recipe.colour", ["no such setting", "base, importance, signals, distill"]),
        ("data.test=rows.csv", "recipe.data", ["test_fraction", "no effect"]),
        ("measure.secondary_rows=5", "recipe", ["secondary_rows", "no effect"]),
        ("task.max_tokens=many", "recipe.task.max_tokens", ["'many'", "integer"]),
        ("task.max_tokens=2", "recipe.task.max_tokens", ["2 is", "greater than or equal to 4"]),
        ("seed=true", "recipe.seed", ["True"]),
        ("data.train=3", "recipe.data.train", ["3 is", "uri, sha256"]),
        ("students=small", "recipe.students", ["'small'", "a list"]),
        ("students.one.name=A B", "recipe.students[0].name", ["'A B'"]),
        ("students.one.budget={}", "recipe.students[0].budget", ["empty", "latency_ms"]),
        ("export.formats=[hf, hf]", "recipe.export.formats", ["twice"]),
        ("export.primary=onnx-int8", "recipe.export", ["'onnx-int8' is not written"]),
        ("task={max_tokens: 8}", "recipe.task.kind", ["missing", "image-", "language-modeling"]),
        ("students.two.name=x", "--set students.two.name", ["'two'", "one of: one"]),
        ("data.train.sha=0", "--set data.train.sha", ["'rows.csv', not settings"]),
        ("seed", "--set seed", ["'='"]),
        ("seed=[1", "--set seed, line 1", ["plain YAML"]),
    ],
)  # fmt: skip
def test_a_wrong_setting_leaves_no_folder(distil, tmp_path, change, where, words):
    message = distil(change)
    assert message.startswith(f"limbeck: {where}: ")
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: [*x, *x, *x]", ["line 1", "anchors"]),
        ("name: !!python/object/apply:os.system ['touch PWNED']", ["line 1", "os.system"]),
        ("name: a\nname: b", ["line 2", "'name' is set twice"]),
        ("a: " + "[" * 4000, ["nested too deeply"]),
        ("a: [1", ["line 1"]),
        ("", ["None"]),
        ("- 1", ["[1]"]),
        ("a: \0", ["unacceptable character"]),
        ("a: \udcff", ["not UTF-8"]),
        ("#" * 1_000_001, ["too many"]),
    ],
    ids=["bomb", "tag", "twice", "deep", "torn", "empty", "list", "nul", "binary", "huge"],
)
@pytest.mark.parametrize("verb", ["distill", "plan"])
def test_a_hostile_recipe_is_refused(refused, tmp_path, monkeypatch, text, words, verb):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refused(verb, path, *(["--out", "out"] if verb == "distill" else []))
    assert str(path) in message
    assert all(word in message for word in words), message
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.yaml"]


def test_a_recipe_or_run_or_student_that_is_not_there(refused, tmp_path):
    assert "did you mean 'quickstart'?" in refused("plan", "quikstart")
    assert "quickstart" in refused("recipes", "show", "nothing")
    assert "no student there" in refused("try", tmp_path, "a text")


ROWS = "w4 w5,class 0\nw40 w41,class 1\n" * 20


@pytest.mark.parametrize(
    ("name", "text", "changes", "words"),
    [
        ("", "", ["data.train=rwos.csv"], ["data.train: there is no", "did you mean", "rows.csv'"]),
        ("", "", ["data.train=~nobody-x/a.csv"], ["'~nobody-x/a.csv'"]),
        ("", "", ["data.train=pypi://tiny/a"], ["data.train", "pypi://NAME==VERSION/"]),
        ("", "", ["data.text=texts"], ["data.train: no column 'texts'", "did you mean 'text'?"]),
        ("a.csv", "text,label\n", [], ["data.train: a.csv has no rows"]),
        ("a.csv", "", [], ["data.train: no column 'text'"]),
        ("a.csv", "text,label\n" + ROWS + ",class 1\n", [], ["data.train, row 41: text is ''"]),
        ("a.csv", "text,label\n" + ROWS + "w4\n", [], ["data.train, row 41: 1 fields"]),
        ("a.csv", "text,label\n" + ROWS + '"w4,a\n', [], ["data.train, behind row 40"]),
        ("a.csv", "text,label\n" + "w4,a\n" * 50, [], ["the only label is 'a'"]),
        ("a.csv", "text,label\nw4,a\nw5,b\n", [], ["recipe.data: ", "rows in"]),
        ("a.xls", "text,label\n" + ROWS, [], ["a.xls is of no known kind", ".parquet"]),
        ("a.parquet", "PAR1" + ROWS, [], ["a.parquet is not readable as Parquet"]),
    ],
)
def test_data_that_is_not_there_or_does_not_fit(distil, tmp_path, name, text, changes, words):
    if name:
        (tmp_path / name).write_text(text)
        changes = [f"data.train={tmp_path / name}"]
    message = distil(*changes)
    assert all(word in message for word in words), message


def test_labels_that_only_the_test_split_has(distil, tmp_path):
    (tmp_path / "test.csv").write_text("text,label\nw4 w5,class 0\nw6,class 9\n")
    message = distil(f"data.test={tmp_path / 'test.csv'}", "data.test_fraction=null")
    assert "recipe.data.test: labels that the training rows lack: class 9;" in message
    assert "class 0, class 1, class 2" in message


def no_config(folder):
    (folder / "config.json").unlink()


def torn_config(folder):
    (folder / "config.json").write_text('{"model_type": "bert"')


def list_for_config(folder):
    (folder / "config.json").write_text("[]")


def strange_model(folder):
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')


def torn_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def torn_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def fewer_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


def torn_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def other_tokenizer(folder):
    save_bert(folder, vocab_size=50, id2label={0: "class 0", 1: "class 1", 2: "class 2"})


def causal(folder):
    shutil.rmtree(folder)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder)


def no_padding(folder):
    shutil.rmtree(folder)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)


def strangers_code(folder):
    """Would write PWNED beside itself if anybody ran it."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'PWNED')!r}, 'w')\nclass Own: ...\n")


def strangers_tokenizer(folder):
    strangers_code(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "bert"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()


def no_text(folder):
    shutil.rmtree(folder)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    Vit(config).save_pretrained(folder)


def eight_bits(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def other_labels(folder):
    save_bert(folder, id2label={0: "class 0", 1: "class 1", 2: "spam"})


def no_head(folder):
    BertModel(bert_config()).save_pretrained(folder)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_config, "there is no config.json"),
        (torn_config, "config.json does not load"),
        (list_for_config, "config.json does not load"),
        (strange_model, "unheard-of"),
        (torn_weights, "does not load"),
        (torn_header, "does not load"),
        (only_a_pickle, "does not load"),
        (other_weights, "lacks 9 weights that its config.json asks for: bert.encoder.layer.0"),
        (fewer_weights, "lacks 16 weights that its config.json asks for: bert.encoder.layer.3"),
        (torn_tokenizer, "the tokenizer of "),
        (no_tokenizer, "holds no tokenizer"),
        (other_tokenizer, "its model has 50 embeddings"),
        (causal, "a GPT2LMHeadModel, which continues text"),
        (no_padding, "names no padding token"),
        (strangers_code, "config.json does not load"),
        (strangers_tokenizer, "tokenizer"),
        (no_text, "of type 'vit'"),
        (eight_bits, "holds quantised weights (bitsandbytes)"),
        (other_labels, "has labels class 0, class 1, spam"),
        (no_head, "has no classification head"),
    ],
)
def test_a_teacher_that_does_not_fit(distil, tiny, tmp_path, harm, words):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny / "knows", folder)
    harm(folder)
    message = distil(f"teacher.model={folder}")
    assert message.startswith("limbeck: recipe.teacher.model: ")
    assert words in message
    assert not list((tmp_path / "out").rglob("*.safetensors")), "nothing was trained"
    assert not (folder / "PWNED").exists()


def test_a_teacher_that_is_no_folder_or_too_short_for_the_texts(distil):
    assert "rows.csv is a file" in distil("teacher.model=rows.csv")
    assert "did you mean" in distil("teacher.model=knowz")
    message = distil("task.max_tokens=41")
    assert "recipe.task.max_tokens: 41; allowed: up to 40" in message


def test_a_mistake_in_the_data_can_be_mended_in_the_same_folder(distil):
    distil("data.text=texts")
    assert "no column 'words'" in distil("data.text=words")  # not: holds another recipe's run


def test_a_teacher_whose_head_has_the_datas_labels_needs_no_tuning(finished):
    """In whatever order they are: they are the head's, and the answers are told by them."""
    assert json.loads((finished / "data/data.json").read_text())["labels"] == [
        "class 2", "class 0", "class 1",
    ]  # fmt: skip
    assert (finished / "report.html").exists()


def test_a_budget_no_shape_can_meet_names_the_smallest(distil, run):
    message = distil("students.one.budget={params: 10}", out=run)
    where = "recipe.students.one.budget: no shape meets 10 parameters; allowed: "
    smallest = int(
        re.search(re.escape(where) + r"([\d,]+) parameters", message)[1].replace(",", "")
    )
    message = distil("students.one.budget={params: 12000, size_mb: 0.01}", out=run)
    assert "12,000 parameters and 0.01 MB" in message
    distil(f"students.one.budget={{params: {smallest - 1}}}", out=run)
    assert main(["plan", str(run), "--set", f"students.one.budget={{params: {smallest}}}"]) == 0


def test_a_budget_no_shape_can_meet_is_refused_before_the_teacher_is_taught(distil, tmp_path):
    distil("students.one.budget={params: 10}", out=tmp_path / "run")
    assert (tmp_path / "run/data/stage.json").exists()
    assert not (tmp_path / "run/teacher").exists()


def test_a_latency_no_shape_can_meet_names_the_fastest(distil, run):
    message = distil("students.one.budget={latency_ms: 0.5}", out=run)
    assert "recipe.students.one.budget.latency_ms: no shape meets 0.5 ms; allowed: about" in message
    assert "1.09 ms or more" in message  # 1 ms, and what machines need for their noise


def test_a_run_folder_with_something_else_in_it(distil, tiny, run, tmp_path):
    before = contents(run)
    message = distil("seed=5", out=run)
    assert f"--out {run}: holds another recipe's run: seed is 0 there, 5 here" in message
    assert contents(run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.yaml").write_text("# mine, with comments\n")
    for out in (tmp_path / "mine", tiny, tiny / "rows.csv"):
        assert "is not a run folder" in distil(out=out)
    assert (tmp_path / "mine/recipe.yaml").read_text() == "# mine, with comments\n"
    assert "cannot be written: Not a directory" in distil(out=tiny / "rows.csv" / "run")


def test_a_download_that_is_damaged_or_not_what_was_pinned(distil, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/rows.csv", table(num_rows=90))

    def download(package, folder, *, where, tell):
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(archives, "download_wheel", download)
    source = "data.train={{uri: 'pypi://tiny==1.0/tiny/rows.csv', sha256: {}}}"
    message = distil(source.format("1a" * 32))
    assert "recipe.data.train.sha256: the source's sha256 is " in message
    assert "1a" * 32 + ", as pinned" in message
    whole = wheel.read_bytes()
    flipped = whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]
    for content in (whole[: len(whole) // 2], flipped, b"<html>not found</html>"):
        wheel.write_bytes(content)
        message = distil("data.train=pypi://tiny==1.0/tiny/rows.csv")
        assert "recipe.data.train: tiny-1.0-py3-none-any.whl is damaged" in message
    assert not [*(tmp_path / "cache").rglob("*.whl")], "nothing damaged is kept"
