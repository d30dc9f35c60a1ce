"""Tables through the whole pipeline: estimators that only answer, and students of our own."""

import json
import re
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rdata
import skops.io
import torch
import yaml
from sklearn.compose import make_column_transformer
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import limbeck
from limbeck.architecture.cut import build_student, shape_parameters
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.cli import main
from limbeck.errors import DataError, SourceError
from limbeck.export import files
from limbeck.export.onnx import export_onnx
from limbeck.nets import TabularClassifier, TabularConfig
from limbeck.recipe_file import load_recipe
from limbeck.runtime import time_artifact
from limbeck.signals.store import open_store
from limbeck.stages import verify_signals
from limbeck.tasks.columns import Encoding, read_columns
from limbeck.tasks.estimators import save_estimator
from limbeck.tasks.task import open_task, prepare
from limbeck.teaching import signal_origins
from limbeck.types import Shape
from tiny_tables import make_table_world, things, write_csv
from tiny_world import quickly


def draft(model, path, *, inputs, draft):
    export_onnx(model, path, inputs=inputs, draft=True)  # in a tenth of the time


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = make_table_world(
        tmp_path_factory.mktemp("tables"),
        export={"formats": ["hf", "onnx-fp32", "onnx-int8"], "primary": "onnx-int8"},
    )
    with quickly(), patch.object(files, "export_onnx", draft):
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    return folder, report


def test_a_student_of_an_estimator_is_taught_exported_and_compared(done):
    folder, report = done
    (student,) = report.students
    assert report.teacher.name == "extra trees" and report.teacher.params is None
    assert [a.format for a in report.teacher.artifacts] == ["skops"]
    assert report.teacher.main.quality.value > 0.8
    assert student.main.quality.value > 0.8 and student.budget.met
    assert student.fidelity.agreement > 0.85
    for artifact in student.artifacts:
        assert artifact.format == "hf" or artifact.parity.agreement > 0.95
    about = json.loads((folder / "out/teacher/hf/estimator.json").read_text())
    tried = [one["settings"]["min_samples_leaf"] for one in about["tried"]]
    assert tried == [2, 5] and about["chosen"] in about["tried"]
    assert about["chosen"]["accuracy"] == max(one["accuracy"] for one in about["tried"])
    with quickly():
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert all(stage.reused for stage in again.stages)


def test_stored_signals_are_what_the_estimator_says(done):
    folder, _ = done
    run = folder / "out"
    recipe, _ = load_recipe(run)
    task = open_task(recipe, run / "data")
    teacher = run / "teacher/hf"
    saved = teacher / "model.skops"
    model = skops.io.load(saved, trusted=skops.io.get_untrusted_types(file=saved))
    rows = task.rows("train")
    batch = rows.batch(range(20))
    table = np.concatenate([batch.inputs["numbers"], batch.inputs["categories"]], 1)
    store = open_store(run / "signals", made_from=signal_origins(task, teacher, run / "data"))
    said = store.targets(batch.example_ids, 1.0).logits.softmax(-1).numpy()
    assert np.abs(said - model.predict_proba(table)).max() < 2e-3
    assert verify_signals(run, 30).largest_difference < 0.02


def test_the_exported_file_takes_rows_as_the_table_has_them(done):
    """Raw numbers and indices in, with nothing between that only limbeck has."""
    folder, _ = done
    student = folder / "out/students/one"
    about = json.loads((student / "hf/preprocessing.json").read_text())
    row = {"width": 4.2, "weight": 1061.0, "colour": "red"}
    inputs = {
        "numbers": np.float32([[row[one["name"]] for one in about["numbers"]]]),
        "categories": np.int64(
            [[one["values"].index(row[one["name"]]) + 1 for one in about["categories"]]]
        ),
    }
    session = onnxruntime.InferenceSession(student / "onnx/model-fp32.onnx")
    (logits,) = session.run(["logits"], inputs)[0]
    model = TabularClassifier.from_pretrained(student / "hf").eval()
    with torch.inference_mode():
        own = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits[0].numpy()
    assert np.abs(own - logits).max() < 1e-4 and logits.argmax() == 2
    found = limbeck.try_student(student / "onnx/model-fp32.onnx", json.dumps(row))
    probs = np.exp(logits) / np.exp(logits).sum()
    assert found[0] == ("kind 2", pytest.approx(float(probs[2]), abs=1e-5))
    (folder / "row.json").write_text(json.dumps(row))
    assert limbeck.try_student(student, str(folder / "row.json"))[0][0] == "kind 2"


def test_means_deviations_and_categories_are_of_the_training_rows_alone(done):
    folder, _ = done
    run = folder / "out"
    recipe, _ = load_recipe(run)
    task = open_task(recipe, run / "data")
    numbers = task.rows("train").arrays["numbers"].astype(np.float64)
    table = [(row["width"], row["weight"]) for row in things()]
    model = task.build(task.read_config(run / "base/hf", where="base"))
    assert np.allclose(model.body.scaled.mean, numbers.mean(0), rtol=1e-6)
    assert np.allclose(model.body.scaled.scale, numbers.std(0), rtol=1e-6)
    assert not np.allclose(np.mean(table, 0), numbers.mean(0), rtol=1e-6)
    saved = TabularClassifier.from_pretrained(run / "students/one/hf")
    assert torch.equal(saved.body.scaled.mean, model.body.scaled.mean)


def test_the_cards_snippets_agree(done, monkeypatch, capsys):
    folder, _ = done
    card = (folder / "out/students/one/hf/README.md").read_text()
    assert "A classifier of table rows of" in card and "library_name: limbeck" in card
    monkeypatch.chdir(folder / "out/students/one/hf")
    for code in re.findall(r"```python\n(.+?)```", card, re.DOTALL):
        exec(compile(code, "card", "exec"), {})
    first, second = (line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert first[0] == second[0] and float(first[1]) == pytest.approx(float(second[1]), abs=0.02)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"width": 1, "weight": 1, "colour": "mauve"}', "colour is 'mauve'.*blue, green, red.*un"),
        ('{"width": 1, "weight": NaN, "colour": "red"}', "weight is missing.*task.missing: fill"),
        ('{"width": 1, "weight": 1}', "colour is missing"),
        ('{"width": "wide", "weight": 1, "colour": "red"}', "width is 'wide'.*a number"),
        ('{"width": 1e39, "weight": 1, "colour": "red"}', "width is 1e[+]39.*float32"),
        ('{"wdith": 1, "weight": 1, "colour": "red"}', "no column 'wdith'.*did you mean 'width'"),
        ("width=1", "not JSON"),
        ("[1, 2]", "not an object"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_refused(done, row, words):
    with pytest.raises(DataError, match=words):
        limbeck.try_student(done[0] / "out/students/one", row)


def test_unknown_and_missing_where_the_recipe_lets_them_pass():
    spec = {"missing": "fill", "unknown": "ignore"}
    encoding = Encoding({"width": 2.5}, {"colour": ("blue", "red")}, **spec)
    found = encoding.one({"width": None, "colour": "mauve"}, "the row")
    assert found["numbers"].tolist() == [[2.5]] and found["categories"].tolist() == [[0]]
    model = TabularClassifier(TabularConfig(num_numbers=1, cardinalities=[3], num_labels=2)).eval()
    table = model.body.tables[0].weight
    assert not table[0].any() and table[1:].any()
    loss = model(**{k: torch.from_numpy(v) for k, v in found.items()}).logits.logsumexp(1).sum()
    loss.backward()
    assert not model.body.tables[0].weight.grad[0].any(), "what is unknown says nothing, ever"


# What a file can hold


def columns(path: Path, **settings):
    recipe = {"kind": "tabular", "categories": ["colour"], **settings}
    return read_columns(path, *_specs(path, recipe), where="recipe.data.train")


def _specs(path, task):
    from limbeck.recipe_data import DataSpec
    from limbeck.recipe_task import TabularTask

    return DataSpec(train=str(path), label="kind", test_fraction=0.2), TabularTask(**task)


def test_the_same_rows_from_csv_parquet_json_and_r(tmp_path):
    rows = things(30)
    plain = columns(write_csv(tmp_path / "a.csv", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    factors = {"colour": "category", "kind": "category"}
    rdata.write_rda(tmp_path / "a.rda", {"things": pandas.DataFrame(rows).astype(factors)})
    for name in ("a.parquet", "a.jsonl", "a.rda"):
        found = columns(tmp_path / name)
        assert found.number_names == ("width", "weight") == plain.number_names
        assert np.array_equal(found.numbers, plain.numbers)
        assert found.categories == plain.categories and found.labels == plain.labels


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"width": "NaN"}, {}, "row 8: width is missing.*mend or remove.*task.missing: fill"),
        ({"width": ""}, {}, "row 8: width is missing"),
        ({"colour": ""}, {}, "row 8: colour is missing"),
        ({"width": "inf"}, {}, "row 8: width is 'inf'.*float32"),
        ({"width": "wide"}, {}, "row 8: width is 'wide'.*task.categories"),
        ({}, {"categories": ["color"]}, "no column 'color'.*did you mean 'colour'"),
        ({}, {"numbers": ["height"], "categories": []}, "no column 'height'"),
    ],
)
def test_a_table_that_cannot_be_learnt_is_refused(tmp_path, change, settings, words):
    rows = things(60)
    rows[7] |= change
    folder = make_table_world(tmp_path)
    write_csv(folder / "things.csv", rows)
    with pytest.raises(DataError, match=words):
        prepared(folder, task=settings)


def prepared(folder: Path, task=(), **data) -> dict:
    """What the data stage says, with these settings."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["task"] |= dict(task)
    recipe["data"] = data or recipe["data"]
    loaded, _ = load_recipe(recipe_in(folder, recipe))
    test = folder / data["test"] if data else None
    (folder / "data").mkdir()
    prepare(loaded, folder / "things.csv", test, folder, folder / "data")
    return json.loads((folder / "data/data.json").read_text())


def recipe_in(folder: Path, recipe: dict) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_a_quantity_is_no_label(tmp_path):
    about = {"train": "things.csv", "label": "weight", "test_fraction": 0.25}
    folder = make_table_world(tmp_path, data=about)
    with pytest.raises(DataError, match=r"data\.label: 2\d\d labels in 243 .*make ranges first"):
        prepared(folder, task={"categories": ["colour", "kind"]})


def test_a_category_that_only_test_rows_have(tmp_path):
    folder = make_table_world(tmp_path)
    rows = things(30, seed=1)
    rows[4]["colour"] = "mauve"
    write_csv(folder / "test.csv", rows)
    data = {"train": "things.csv", "test": "test.csv", "label": "kind"}
    with pytest.raises(DataError, match=r"data.test, row 5: colour is 'mauve'"):
        prepared(folder, **data)
    (folder / "data").rmdir()
    assert prepared(folder, {"unknown": "ignore"}, **data)["rows"]["test"] == 30
    table = pq.read_table(folder / "data/test.parquet")
    assert [ids[0] for ids in table["categories"].to_pylist()].index(0) == 4


def test_rows_in_both_splits_and_coarse_numbers_are_told(tmp_path):
    folder = make_table_world(tmp_path)
    rows = [row | {"weight": 1e9 + row["weight"]} for row in things(60)]
    write_csv(folder / "things.csv", rows + rows)
    said = " ".join(prepared(folder)["warnings"])
    assert re.search(r"\d+ different test rows stand value for value in the training rows", said)
    assert "float32 is coarse for weight" in said and "width" not in said.split("coarse for")[1]


# Estimators that somebody brings


def fitted(rows: list[dict], *, frame: bool = True, model=None):
    table = pandas.DataFrame(rows)
    if not frame:
        return ExtraTreesClassifier(8, random_state=0).fit(table[["width", "weight"]].to_numpy(),
                                                           table["kind"])  # fmt: skip
    names = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["colour"]), remainder="passthrough"
    )
    model = model or RandomForestClassifier(12, min_samples_leaf=3, random_state=0)
    return make_pipeline(names, model).fit(table[["colour", "weight", "width"]], table["kind"])


@pytest.mark.usefixtures("own_cache")
def test_an_estimator_in_memory_teaches_and_is_asked_by_column_names(tmp_path):
    folder = make_table_world(tmp_path)
    model = fitted(things())
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out", teacher=model)
        again = limbeck.distill(folder / "recipe.yaml", folder / "out", teacher=fitted(things()))
    assert all(stage.reused for stage in again.stages), "the same estimator has the same bytes"
    recipe, _ = load_recipe(folder / "out")
    rows = open_task(recipe, folder / "out/data").rows("test")
    frame = pandas.DataFrame(things()).iloc[rows.ids]
    right = model.predict(frame[["colour", "weight", "width"]]) == frame["kind"]
    assert report.teacher.main.quality.value == pytest.approx(right.mean())
    said = np.load(folder / "out/teacher/measure/logits.npy")
    probs = model.predict_proba(frame[["colour", "weight", "width"]])
    assert np.abs(np.exp(said) - np.maximum(probs, 1e-6)).max() < 1e-5


def test_boosting_is_searched_saved_and_teaches(tmp_path):
    estimator = {
        "kind": "hist_gradient_boosting", "settings": {"max_iter": 10},
        "search": {"max_leaf_nodes": [3, 7]},
    }  # fmt: skip
    folder = make_table_world(tmp_path, teacher={"estimator": estimator})
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    saved = folder / "out/teacher/hf/model.skops"
    about = json.loads((saved.parent / "estimator.json").read_text())
    assert [one["settings"]["max_leaf_nodes"] for one in about["tried"]] == [3, 7]
    model = skops.io.load(saved, trusted=about["trusted"])
    assert model.get_params()["categorical_features"] == [2], "colour, behind two numbers"
    assert report.teacher.main.quality.value > 0.8
    assert report.students[0].main.quality.value > 0.8


@pytest.mark.parametrize(
    ("make", "trusted", "words"),
    [
        (lambda: b"\x80\x04K\x01.", None, r"t\.pkl is a pickle.*run anybody's code.*skops.io.dump"),
        (lambda: b"PK and no more", (), "not readable by skops"),
        (lambda: fitted(things()), (), "types that are not allowed.*_tree.Tree.*trusted"),
        (lambda: fitted(things(), model=RidgeClassifier()), None, "gives no probabilities"),
        (lambda: fitted([r | {"kind": r["kind"] + "s"} for r in things()]), None, "knows kind 0s"),
        (lambda: fitted(things(), frame=False), None, "fitted on 2 columns.*the task's 3"),
        (lambda: LogisticRegression(), None, "it is not fitted"),
    ],
)  # fmt: skip
def test_an_estimator_that_cannot_teach_is_refused(tmp_path, make, trusted, words):
    folder, model = make_table_world(tmp_path), make()
    path = folder / ("t.pkl" if "pickle" in words else "t.skops")
    if isinstance(model, bytes):
        path.write_bytes(model)
    else:
        save_estimator(model, path)
    if trusted is None:
        trusted = ()
        with suppress(Exception):
            trusted = skops.io.get_untrusted_types(file=path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teacher"] = {"estimator": {"model": path.name, "trusted": [*trusted]}}
    with quickly(), pytest.raises(SourceError, match=words):
        limbeck.distill(recipe_in(folder, recipe), folder / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("teacher.estimator.kind=svm", "'hist_gradient_boosting', 'random_forest'"),
        ("teacher.estimator.settings.max_iter=3", "no setting of ExtraTreesClassifier"),
        ("teacher.estimator.settings.random_state=3", "is set by seed"),
        ("teacher.estimator.settings.max_depth=deep", "max_depth"),
        ("teacher.estimator.search.max_depth=[3]", "leaves no choice"),
        ("teacher.estimator.settings.min_samples_leaf=3", "in `settings` and `search`"),
        ("teacher.estimator={model: a.skops, trusted: [os.system]}", "names os.system"),
        ("teacher.estimator={model: a.skops, settings: {a: 1}}", "`settings` has no effect"),
        ("teacher.estimator={trusted: [a.B]}", "either `model` or `kind`"),
        ("teacher.tune={epochs: 1, batch_size: 2, learning_rate: 0.1}", "`tune` has no effect"),
        ("base=null", "`base: {config: {model_type: limbeck-tabular"),
        ("base.config.model_type=bert", "limbeck-tabular"),
        ("base.config.hiden_size=3", "hidden_size"),
        ("task.numbers=[colour]", "named twice"),
        ("task.numbers=[]", "no such column|is missing|no column"),
        ("data.text=story", "`data.text` has no effect for tabular"),
        ("export.formats=[hf, gguf-f16]", "not for tabular"),
        ("distill.hidden={}", "tabular has none"),
    ],
)
def test_a_setting_without_sense_is_refused(tmp_path, capsys, change, words):
    folder = make_table_world(tmp_path)
    if change == "task.numbers=[]":
        change, words = "task={kind: tabular, numbers: []}", "no column is left"
    out = ["--out", str(folder / "out")]
    with quickly():
        assert main(["distill", str(folder / "recipe.yaml"), *out, "--set", change]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_the_recipe_of_the_docs_is_planned(tmp_path, monkeypatch, capsys):
    doc = (Path(__file__).parents[1] / "docs/tabular.md").read_text()
    (text,) = re.findall(r"```yaml\n(.+?)```", doc, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"plan": "ab"[i % 2], "country": "NZ", "age": i, "left": "yn"[i % 3 // 2]}
        for i in range(90)
    ]
    write_csv(Path("customers.csv"), rows)
    Path("mine.yaml").write_text(text)
    assert main(["plan", "mine.yaml"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"pocket +[\d,]+ +0\.\d+", said) and re.search(r"chosen +4 +0\.00 +–", said)


def test_an_estimator_is_no_teacher_of_texts(tiny, capsys):
    change = "teacher={estimator: {kind: extra_trees}}"
    assert main(["plan", str(tiny / "recipe.yaml"), "--set", change]) == 2
    assert "`teacher.estimator` is for tabular" in capsys.readouterr().err


@pytest.mark.slow
def test_an_estimator_is_timed_in_a_process_without_torch(done):
    """One call a row, as it is deployed; rows as they are, because trees care."""
    folder, _ = done
    recipe, _ = load_recipe(folder / "out")
    task = open_task(recipe, folder / "out/data")
    rows = task.rows("test").sample(8, seed=0)
    found = time_artifact(
        folder / "out/teacher/hf/model.skops", "skops", inputs=task.takes, threads=1, runs=10,
        examples=rows.arrays,
    )  # fmt: skip
    assert found.runtime.startswith("scikit-learn") and found.latency_ms > 0


# The network


def test_axes_of_a_table_network_are_proved_and_its_prefixes_are_models():
    config = TabularConfig(
        num_numbers=3, cardinalities=[4, 5], hidden_size=16, intermediate_size=32,
        num_hidden_layers=3, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TabularClassifier(config).eval()
    inputs = model.dummy_inputs
    axes = prove_axes(
        model, config, TabularClassifier, find_axes(config, TabularClassifier), inputs, seed=0
    )
    assert {axis.name for axis in axes if axis.proved} == {"hidden", "ffn", "layers"}
    shape = Shape({"hidden": 8, "ffn": 20}, (0, 2))
    student = build_student(config, TabularClassifier, axes, shape, model.state_dict()).eval()
    assert student(**inputs).logits.shape == (4, 4)
    counted = sum(p.numel() for p in student.parameters())
    assert counted == shape_parameters(config, TabularClassifier, axes, shape)
    assert torch.equal(student.body.tables[1].weight, model.body.tables[1].weight[:, :8])


def test_a_family_of_tables_in_one_elastic_run(tmp_path):
    folder = make_table_world(
        tmp_path, students=[{"name": "large", "budget": {"params": 5000}},
                            {"name": "small", "budget": {"params": 2000}}],
    )  # fmt: skip
    with quickly():
        report = limbeck.distill(
            folder / "recipe.yaml", folder / "out",
            overrides=["distill.run=elastic", "distill.training.epochs=6"],
        )
    large, small = report.students
    assert small.params <= 2000 < large.params
    assert min(s.main.quality.value for s in report.students) > 0.75
