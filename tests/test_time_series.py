"""Time series through the whole pipeline, with networks of our own."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import limbeck
from limbeck.architecture.cut import build_student, shape_parameters
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.cli import main
from limbeck.errors import DataError, RecipeError
from limbeck.export import files
from limbeck.nets import (
    SeriesConvClassifier,
    SeriesConvConfig,
    SeriesTransformerClassifier,
    SeriesTransformerConfig,
)
from limbeck.recipe_file import load_recipe
from limbeck.tasks.task import prepare
from limbeck.types import Shape
from test_tabular import draft
from tiny_world import quickly, write_recipe

CONV = {
    "model_type": "limbeck-conv1d", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "kernel_size": 5,
}  # fmt: skip


def waves(num_rows: int = 240, length: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2, T) float64 and names: two channels far from zero, told apart by their frequencies."""
    random = np.random.default_rng(0)
    label = np.arange(num_rows) % 3
    time = np.arange(length) / length
    phase = random.uniform(0, 1, (num_rows, 2, 1))
    clean = np.sin(2 * np.pi * ((label[:, None, None] * 2 + 2) * time + phase))
    noise = random.normal(0, 0.5, clean.shape)
    return 40 + 5 * (clean + noise), np.array(["slow", "middle", "fast"])[label]


def make_world(folder, **changes):
    series, label = waves()
    np.savez(folder / "waves.npz", series=series, label=label)
    training = {"epochs": 5, "batch_size": 32, "learning_rate": 1e-2}
    recipe = {
        "name": "waves",
        "task": {"kind": "time-series"},
        "data": {"train": "waves.npz", "test_fraction": 0.25},
        "teacher": {"config": CONV, "tune": {**training, "epochs": 8}},
        "distill": {"training": training},
        "students": [{"name": "one", "budget": {"params": 1500}}],
    }  # fmt: skip
    return write_recipe(folder, {**recipe, **changes})


def test_a_family_of_series_is_taught_exported_and_tried(tmp_path, monkeypatch, capsys):
    folder = make_world(
        tmp_path, export={"formats": ["hf", "onnx-fp32", "onnx-int8"], "primary": "onnx-int8"}
    )
    with quickly(), patch.object(files, "export_onnx", draft):
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert all(stage.reused for stage in again.stages)
    (student,) = report.students
    assert report.teacher.main.quality.value > 0.9 and student.main.quality.value > 0.8
    for artifact in student.artifacts:
        assert artifact.format == "hf" or artifact.parity.agreement > 0.95
    saved = SeriesConvClassifier.from_pretrained(folder / "out/students/one/hf")
    assert saved.body.scaled.mean.tolist() == pytest.approx([40, 40], abs=0.5)

    series, label = waves()
    np.save(folder / "one.npy", series[4])
    found = limbeck.try_student(folder / "out/students/one", str(folder / "one.npy"))
    assert found[0][0] == label[4]
    np.save(folder / "short.npy", series[4, :, :20])
    with pytest.raises(DataError, match=r"short.npy: .*\(2, 20\).*\(2, 32\)"):
        limbeck.try_student(folder / "out/students/one", str(folder / "short.npy"))

    monkeypatch.chdir(folder / "out/students/one/hf")
    card = (folder / "out/students/one/hf/README.md").read_text()
    for code in re.findall(r"```python\n(.+?)```", card, re.DOTALL):
        exec(compile(code, "card", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


CASES = {
    "conv": (
        SeriesConvClassifier,
        SeriesConvConfig(
            num_channels=3, length=40, hidden_size=16, intermediate_size=32, num_labels=4
        ),
        Shape({"hidden": 8, "ffn": 20}, (0, 2)),
    ),
    "transformer": (
        SeriesTransformerClassifier,
        SeriesTransformerConfig(
            num_channels=3, length=40, hidden_size=16, intermediate_size=32, num_labels=4
        ),
        Shape({"hidden": 8, "ffn": 20, "heads": 2}, (0, 2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_axes_of_a_series_network_are_proved_and_its_prefixes_are_models(name):
    build, config, shape = CASES[name]
    torch.manual_seed(0)
    model = build(config).eval()
    inputs = model.dummy_inputs
    axes = prove_axes(model, config, build, find_axes(config, build), inputs, seed=0)
    proved = {axis.name for axis in axes if axis.proved}
    assert proved == {*shape.sizes, "layers"}
    student = build_student(config, build, axes, shape, model.state_dict()).eval()
    assert student(**inputs).logits.shape == (4, 4)
    counted = sum(p.numel() for p in student.parameters())
    assert counted == shape_parameters(config, build, axes, shape)


def test_a_transformer_of_patches_is_taught_by_convolutions(tmp_path):
    base = {
        "config": {
            "model_type": "limbeck-series-transformer", "hidden_size": 16, "patch_size": 4,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        }
    }  # fmt: skip
    training = {"epochs": 25, "batch_size": 32, "learning_rate": 1e-2}
    folder = make_world(tmp_path, base=base, distill={"training": training})
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    config = json.loads((folder / "out/students/one/hf/config.json").read_text())
    assert config["model_type"] == "limbeck-series-transformer" and config["length"] == 32
    assert report.students[0].main.quality.value > 0.5


def test_the_recipe_of_the_docs_is_planned(tmp_path, monkeypatch, capsys):
    doc = (Path(__file__).parents[1] / "docs/time_series.md").read_text()
    (code,), (text,) = (re.findall(rf"```{kind}\n(.+?)```", doc, re.DOTALL)
                        for kind in ("python", "yaml"))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "time_series.md", "exec"), {})
    Path("signals.yaml").write_text(text)
    assert main(["plan", "signals.yaml"]) == 0
    assert re.search(r"pocket +[\d,]+ +0\.0[345]", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "limbeck-series-transformer", "patch_size": 33}, "patch_size 33 is longer"),
        ({**CONV, "kernel_size": 4}, "kernel_size 4 has no middle"),
        ({"model_type": "limbeck-tabular"}, "takes numbers and categories, not series.*conv1d"),
    ],
)
def test_a_network_that_does_not_fit_the_series_is_refused(tmp_path, config, words):
    folder = make_world(tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teacher"]["config"] = config
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly(), pytest.raises(RecipeError, match=words):
        limbeck.distill(folder / "recipe.yaml", folder / "out")


# What a file can hold


def prepared(folder, path, **data):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"] |= {"train": path.name, **data}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "data").mkdir(exist_ok=True)
    prepare(load_recipe(folder / "recipe.yaml")[0], path, None, folder, folder / "data")
    return json.loads((folder / "data/data.json").read_text())


def test_the_same_series_from_npz_and_parquet(tmp_path):
    folder = make_world(tmp_path)
    series, label = waves()
    table = pa.table({"series": [one.tolist() for one in series], "label": label.tolist()})
    pq.write_table(table, folder / "waves.parquet")
    first = prepared(folder, folder / "waves.npz")
    stored = pq.read_table(folder / "data/train.parquet")
    assert prepared(folder, folder / "waves.parquet") == first
    assert pq.read_table(folder / "data/train.parquet").equals(stored)
    assert first["inputs"][0]["dims"] == [2, 32]
    flat = pa.table({"series": series[:, 0].tolist(), "label": label.tolist()})
    pq.write_table(flat, folder / "flat.parquet")
    assert prepared(folder, folder / "flat.parquet")["inputs"][0]["dims"] == [1, 32]


def test_one_speaker_stays_on_one_side(tmp_path):
    folder = make_world(tmp_path)
    series, label = waves()
    who = np.arange(len(label)) // 12
    np.savez(folder / "waves.npz", series=series, label=label, who=who)
    prepared(folder, folder / "waves.npz", group="who")
    sides = [
        {who[i] for i in pq.read_table(folder / f"data/{split}.parquet")["id"].to_pylist()}
        for split in ("train", "validation", "test")
    ]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def damaged(kind: str, series: np.ndarray, label: np.ndarray) -> dict:
    if kind == "nan":
        series[7, 1, 3] = np.nan
    return {
        "nan": {"series": series, "label": label},
        "no labels": {"series": series, "lable": label},
        "too few labels": {"series": series, "label": label[:-1]},
        "four dimensions": {"series": series[..., None], "label": label},
        "text": {"series": series.astype(str), "label": label},
        "objects": {"series": series, "label": label.astype(object)},
        "empty": {"series": series[:0], "label": label[:0]},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nan", "example 8: series has NaN.*mend or remove"),
        ("no labels", "no column 'label'.*did you mean 'lable'"),
        ("too few labels", r"label has shape \(239,\).*one for each series"),
        ("four dimensions", r"shape \(240, 2, 32, 1\).*\(N, C, T\)"),
        ("text", "series are <U"),
        ("objects", "never pickled objects"),
        ("empty", "no examples"),
    ],
)
def test_an_archive_that_cannot_be_learnt_is_refused(tmp_path, kind, words):
    folder = make_world(tmp_path)
    np.savez(folder / "bad.npz", **damaged(kind, *waves()))
    with pytest.raises(DataError, match=words):
        prepared(folder, folder / "bad.npz")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1.0, 2.0]], r"row 2: series has shape \(1, 2\).*\(1, 3\)"),
        ([[1.0, 2.0, 3.0], [1.0]], "row 2: series is"),
    ],
)
def test_series_of_unlike_lengths_are_refused(tmp_path, value, words):
    folder = make_world(tmp_path)
    table = pa.table({"series": [[[1.0, 2.0, 3.0]], value], "label": ["a", "b"]})
    pq.write_table(table, folder / "bad.parquet")
    with pytest.raises(DataError, match=words):
        prepared(folder, folder / "bad.parquet")


def test_a_file_of_another_kind_is_refused(tmp_path):
    folder = make_world(tmp_path)
    (folder / "waves.csv").write_text("series,label\n1,2\n")
    with pytest.raises(DataError, match=r"no known kind.*\.npz or \.parquet"):
        prepared(folder, folder / "waves.csv")
    (folder / "half.npz").write_bytes((folder / "waves.npz").read_bytes()[:400])
    with pytest.raises(DataError, match=r"half\.npz is not readable"):
        prepared(folder, folder / "half.npz")
