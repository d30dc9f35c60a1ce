"""Images through the whole pipeline: a teacher from a config, views, int8, an elastic family."""

import contextlib
import re
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig

import limbeck
from limbeck import train
from limbeck.architecture.axes import Axis
from limbeck.architecture.cut import build_student, shape_parameters
from limbeck.architecture.plan import CostModel, plan_student, score
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.architecture.space import candidates, shape_of
from limbeck.errors import AxisError
from limbeck.export import files
from limbeck.export.onnx import export_onnx
from limbeck.export.static import quantize_static_int8
from limbeck.family import Family
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.recipe import BudgetSpec, StudentSpec
from limbeck.recipe_file import load_recipe
from limbeck.recipe_teaching import TrainingSpec
from limbeck.runtime import load_predictor
from limbeck.signals.store import open_store
from limbeck.stages import live_teacher, verify_signals
from limbeck.statistics import forget, measure_statistics, norms_of
from limbeck.step import Training
from limbeck.tasks.image_classification import Rows, open_task
from limbeck.tasks.task import AllViews
from limbeck.teachers.stored import NoTeacher
from limbeck.teaching import signal_origins
from limbeck.types import Input, Need, Shape
from test_images import rows
from tiny_images import RESNET, make_image_world
from tiny_world import quickly


def build(config):
    return AutoModelForImageClassification.from_config(config)


def resnet(seed: int = 0, **changes):
    torch.manual_seed(seed)
    settings = {k: v for k, v in RESNET.items() if k != "model_type"} | changes
    return build(ResNetConfig(num_labels=3, **settings))


@cache
def axes() -> tuple[Axis, ...]:
    model = resnet().eval()
    inputs = rows().batch(range(4)).inputs
    found = find_axes(model.config, build)
    return tuple(prove_axes(model, model.config, build, found, inputs, seed=0))


# The whole of it


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = make_image_world(
        tmp_path_factory.mktemp("images"),
        export={"formats": ["hf", "onnx-fp32", "onnx-int8"], "primary": "onnx-int8"},
    )
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["task"] |= {"unreadable": "skip"}
    recipe["task"]["augment"]["mixup"] = 0.2
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "pictures/kind 0/001.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")

    def draft(model, path, *, inputs, draft):
        export_onnx(model, path, inputs=inputs, draft=True)  # in a tenth of the time

    with quickly(), patch.object(files, "export_onnx", draft):
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    return folder, report


def test_a_family_of_images_is_taught_exported_and_compared(done):
    folder, report = done
    (student,) = report.students
    assert report.teacher.name == "resnet" and report.teacher.main.quality.value > 0.9
    assert student.main.quality.value > 0.8 and student.budget.met
    assert report.linear is None
    for artifact in student.artifacts:
        assert artifact.format == "hf" or artifact.parity.agreement > 0.9
    sizes = {a.format: a.size_bytes for a in student.artifacts}
    assert sizes["onnx-int8"] < 0.75 * sizes["onnx-fp32"]
    with quickly():
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert all(stage.reused for stage in again.stages)


def test_what_was_stored_of_each_view_is_what_the_teacher_says_of_it(done):
    folder, _ = done
    run = folder / "out"
    recipe, _ = load_recipe(run)
    task = open_task(recipe, run / "data")
    live = live_teacher(run / "teacher/hf", task, "fp32")
    store = open_store(
        run / "signals", made_from=signal_origins(task, run / "teacher/hf", run / "data")
    )
    one = task.rows("train")
    training = Training(
        rows=one, teacher=NoTeacher(), objective=Objective(hard_weight=1.0), seed=0, title="",
        spec=TrainingSpec(epochs=3, batch_size=32, learning_rate=0.1),
    )  # fmt: skip
    seen = set()
    for step in range(training.steps):
        batch = one.batch(training.positions(step))
        said = live.signal(batch, frozenset({Need.LOGITS})).logits
        stored = store.targets(batch.example_ids, 1.0).logits
        assert torch.allclose(said, stored, atol=0.02)
        seen |= {*batch.example_ids.tolist()}
    assert len(seen) == 32 * training.steps, "each epoch has another view of all rows"
    assert verify_signals(run, 50).largest_difference < 0.02
    plain = live.signal(one.batch(range(20)), frozenset({Need.LOGITS})).logits
    other = store.targets(one.batch(range(20)).example_ids + 1, 1.0).logits
    assert (plain - other).abs().max() > 0.1, "views differ, so keys matter"


def test_an_image_is_tried_by_its_path_and_the_cards_snippets_agree(done, monkeypatch, capsys):
    folder, _ = done
    student = folder / "out/students/one"
    image = folder / "pictures/kind 2/003.png"
    (name, probability), *_ = limbeck.try_student(student, str(image))
    assert name == "kind 2" and probability > 0.5
    with pytest.raises(limbeck.LimbeckError, match=r"nothing\.png: no such file"):
        limbeck.try_student(student, str(folder / "nothing.png"))
    card = (student / "hf/README.md").read_text()
    assert "An image classifier of" in card and "pipeline_tag: image-classification" in card
    monkeypatch.chdir(student / "hf")
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code.replace('"image.png"', repr(str(image))), {"__name__": "card"})
        said, sure = capsys.readouterr().out.strip().rsplit(" ", 1)
        assert said == name and float(sure) == pytest.approx(probability, abs=0.05)


def test_a_changed_transform_or_augmentation_makes_the_signals_anew(done):
    folder, _ = done
    recipe, _ = load_recipe(folder / "out")
    before = open_task(recipe, folder / "out/data").preprocessing(folder)
    for change in ({"mean": (0.1,)}, {"augment": None}, {"fit": "stretch"}):
        other = recipe.model_copy(update={"task": recipe.task.model_copy(update=change)})
        assert open_task(other, folder / "out/data").preprocessing(folder) != before


def test_damaged_images_stand_in_the_report(done):
    _, report = done
    assert any("1 damaged images were left out: kind 0/001.png" in w for w in report.warnings)


def test_an_elastic_family_with_statistics_and_a_student_between(tmp_path):
    folder = make_image_world(tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["distill"] |= {"run": "elastic"}
    recipe["teacher"]["tune"]["epochs"] = 6
    recipe["students"] = [
        {"name": "large", "budget": {"params": 7000}},
        {"name": "small", "budget": {"params": 2000}},
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
        found = {s.name: s.main.quality.value for s in report.students}
        assert found["large"] > 0.8, found
        params = {s.name: s.params for s in report.students}
        between = [
            p for p in report.frontier if not p.trained and params["small"] < p.params
        ]  # fmt: skip
        assert between, "depths lie between"
        scaled = limbeck.scale(
            folder / "out", name="cut", budget={"params": max(p.params for p in between)}
        )
    cut = next(s for s in scaled.students if s.name == "cut")
    assert not cut.trained and cut.params < params["large"]
    folder = folder / "out/students/cut/hf"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert all(norm.num_batches_tracked > 0 for norm in norms_of(model))


def test_a_net_of_another_family_learns_projected_features_that_were_stored(tmp_path):
    vit = {"model_type": "vit", "image_size": 16, "patch_size": 4, "num_channels": 1,
           "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32}  # fmt: skip
    training = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-2}
    folder = make_image_world(
        tmp_path, teacher={"config": vit, "tune": {**training, "learning_rate": 3e-3}},
        base={"config": RESNET},
        distill={"training": training, "embedding": {"loss": "mse"},
                 "hidden": {"loss": "cosine", "layers": "last"}},
    )  # fmt: skip
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    (student,), run = report.students, folder / "out"
    assert "student's layer from teacher's: 2 from 2" in student.reason
    points = report.training["one"]
    for term in ("hidden", "embedding"):
        assert points[-1].terms[term] < 0.9 * points[0].terms[term]
    recipe, _ = load_recipe(run)
    task = open_task(recipe, run / "data")
    made_from = signal_origins(task, run / "teacher/hf", run / "data")
    every = AllViews(task.rows("train"))
    batch = every.batch(range(len(every) - 40, len(every)))  # of the last view
    model = task.load(run / "teacher/hf", where="x").eval()
    with torch.inference_mode():
        last = model(**batch.inputs, output_hidden_states=True).hidden_states[-1]  # (B, 17, D)
    corner = last[:, 1:].unflatten(1, (4, 4))[:, :2, 2:].mean((1, 2))  # above, right
    found, _ = open_store(run / "features/hidden", made_from=made_from).vectors(batch.example_ids)
    assert torch.allclose(found["2"].unflatten(0, (40, 4))[:, 1], corner, atol=5e-3)
    means = open_store(run / "features/embedding", made_from=made_from)
    found, _ = means.vectors(batch.example_ids)
    assert torch.allclose(found["embedding"], last[:, 1:].mean(1), atol=5e-3)


# Statistics


def taught(model, folder: Path, progress=None, *, epochs: float = 4, one: Rows | None = None):
    training = Training(
        rows=one or rows(n=48), teacher=NoTeacher(), objective=Objective(hard_weight=1.0), seed=3,
        title="x", spec=TrainingSpec(epochs=epochs, batch_size=40, learning_rate=1e-2),
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    train.train(model, training, folder, progress or Silent())
    return model


def same(a, b) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_after_training_the_statistics_are_those_of_the_training_rows(tmp_path):
    one = rows(n=48)
    model = taught(resnet(), tmp_path / "a", one=one)
    stem = model.resnet.embedder.embedder
    with torch.no_grad():
        every = stem.convolution(AllViews(one).batch(range(192)).inputs["pixel_values"])
    assert not model.training and stem.normalization.track_running_stats
    assert torch.allclose(stem.normalization.running_mean, every.mean((0, 2, 3)), atol=1e-5)
    spread = every.var((0, 2, 3))
    assert torch.allclose(stem.normalization.running_var, spread, rtol=0.05)


def test_statistics_of_other_weights_leave_no_trace():
    one, model, fresh = rows(n=48), resnet(), resnet(seed=1)
    measure_statistics(model, one, seed=0)
    forget(model)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            mine.copy_(theirs)
    for each in (model, fresh):
        measure_statistics(each, one, seed=0)
    assert same(model, fresh)


def test_a_killed_training_ends_with_the_same_bytes_statistics_included(tmp_path):
    class Killed(Silent):
        @contextlib.contextmanager
        def bar(self, title, total, unit, done=0):
            with super().bar(title, total, unit):
                self.left = 3

                def advance(n: int) -> None:
                    self.left -= n
                    if not self.left:
                        raise KeyboardInterrupt

                yield type("Bar", (), {"advance": staticmethod(advance)})()

    whole = taught(resnet(), tmp_path / "whole")
    with patch.object(train, "_SAVE_EVERY", -1.0):
        with pytest.raises(KeyboardInterrupt):
            taught(half := resnet(), tmp_path / "killed", Killed())
        assert not norms_of(half)[0].running_mean.any(), "shares side by side remember nothing"
        assert (tmp_path / "killed/checkpoint.json").is_file()
        resumed = taught(resnet(), tmp_path / "killed")
    assert same(whole, resumed)


@pytest.mark.parametrize("cores", [1, 4])
def test_what_is_learnt_does_not_hang_on_the_number_of_cores(tmp_path, cores):
    here = taught(resnet(), tmp_path / "here")
    with patch("limbeck.cores.cores", lambda: cores):
        there = taught(resnet(), tmp_path / "there")
    assert same(here, there)


def test_a_size_that_was_not_trained_gets_statistics_of_its_own():
    model, one = resnet(), rows(n=48)
    full = Shape({}, (), {})
    family = Family(model.config, build, axes(), {"all": full}, model.state_dict())
    narrow = Shape({"hidden_sizes[1]": 8}, (), {})
    with pytest.raises(AxisError, match="statistics"):
        family.cut(narrow)
    cut = family.cut(narrow, settle=lambda m: measure_statistics(m, one, seed=0))
    first, whole = norms_of(cut)[0], norms_of(family.extract("all"))[0]
    assert first.running_mean.abs().sum() > 0 and whole.running_mean.abs().sum() == 0


# Shapes


def space(format: str = "hf"):
    shapes = {name: tuple(p.shape) for name, p in resnet().named_parameters()}
    return candidates(shapes, axes(), format)


def test_widths_of_stages_scale_together_and_depths_too_and_costs_are_real():
    config, found = resnet().config, space()
    full = sum(p.numel() for p in resnet().parameters())
    assert max(c.params for c in found) == full and len(found) < 100
    assert {tuple(c.stacks.values()) for c in found} == {(1, 1), (2, 2)}
    for candidate in found:
        shape = shape_of(candidate, axes(), lambda n: ())
        assert candidate.params == shape_parameters(config, build, axes(), shape)
        a, b = candidate.sizes["hidden"] / 8, candidate.sizes["hidden_sizes[1]"] / 12
        assert abs(a - b) <= 0.13
    shape = shape_of(min(found, key=lambda c: c.params), axes(), lambda n: ())
    student = build_student(config, build, axes(), shape, resnet().state_dict())
    assert student(rows().batch([0]).inputs["pixel_values"]).logits.shape == (1, 3)


def test_stages_of_one_layer_count_by_their_widths_and_in_a_files_overhead():
    config = ResNetConfig(num_labels=3, num_channels=1, layer_type="basic", embedding_size=16,
                          hidden_sizes=[16, 32, 64], depths=[1, 1, 1])  # fmt: skip
    torch.manual_seed(0)
    model = build(config).eval()
    inputs = rows().batch(range(4)).inputs
    found = prove_axes(model, config, build, find_axes(config, build), inputs, seed=0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plain, more = (candidates(shapes, found, "onnx-int8", o) for o in ((0, 0), (1000, 100)))
    pairs = zip(plain, more, strict=True)
    assert {b.size_bytes - a.size_bytes for a, b in pairs} == {1000 + 3 * 100}
    assert not plain[0].stacks, "depths of one layer are no axes"
    full = max(c.params for c in plain)
    for params in (full - 1, full // 2, full // 4):
        planned = plan_student(
            StudentSpec(name="s", budget=BudgetSpec(params=params)), "budget", plain, found,
            lambda n: (), CostModel(lambda c: pytest.fail("nothing is to be timed")),
        )  # fmt: skip
        assert planned.cost.params == max(c.params for c in plain if c.params <= params)


def test_no_two_stages_become_equal_where_a_projection_hangs_on_it():
    config = ResNetConfig(num_labels=3, num_channels=1, layer_type="basic", embedding_size=8,
                          hidden_sizes=[9, 12], depths=[1, 1])  # fmt: skip
    torch.manual_seed(0)
    model = build(config).eval()
    inputs = rows().batch(range(4)).inputs
    found = prove_axes(model, config, build, find_axes(config, build), inputs, seed=0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for candidate in candidates(shapes, found, "hf"):
        shape = shape_of(candidate, found, lambda n: ())
        build_student(config, build, found, shape, model.state_dict())


def test_more_room_is_never_a_worse_shape_and_latencies_are_fitted():
    from limbeck.architecture.plan import CostModel, Sample

    def latency(c) -> float:
        return 0.1 + c.num_layers * (0.02 + c.matrix_params_per_layer / 1e5)

    def cost(c) -> Sample:
        return Sample(latency_ms=latency(c), memory_mb=50)

    scores = []
    for params in (1500, 3000, 5000, 7000):
        student = StudentSpec(name="s", budget=BudgetSpec(params=params, latency_ms=0.3))
        planned = plan_student(
            student, "budget", space(), axes(), lambda n: (), CostModel(cost)
        )
        chosen = next(
            c for c in space() if shape_of(c, axes(), lambda n: ()) == planned.shape
        )  # fmt: skip
        assert chosen.params <= params and latency(chosen) <= 0.3
        scores.append(score(chosen, axes()))
    assert scores == sorted(scores)


# int8


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_static_int8_keeps_the_answers_and_takes_its_ranges_from_the_rows(tmp_path, kind):
    if kind == "resnet":
        model = taught(resnet(hidden_sizes=[16, 24], embedding_size=16), tmp_path / "a")
    else:
        config = ViTConfig(num_channels=1, image_size=16, patch_size=4, hidden_size=32,
                           num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                           num_labels=3)  # fmt: skip
        torch.manual_seed(0)
        model = build(config).eval()
    one = (Input(name="pixel_values", dims=(1, 16, 16), free=(None,) * 3),)
    fp32, int8 = tmp_path / "model-fp32.onnx", tmp_path / "model-int8.onnx"
    export_onnx(model, fp32, inputs=one, draft=True)
    batch = {"pixel_values": AllViews(rows(48)).batch(range(192)).inputs["pixel_values"].numpy()}
    quantize_static_int8(fp32, int8, [batch])
    plain, small = (load_predictor(p, f, threads=1)(batch) for p, f in
                    ((fp32, "onnx-fp32"), (int8, "onnx-int8")))  # fmt: skip
    assert np.abs(small - plain).max() < 0.25 * np.ptp(plain)
    alone = load_predictor(int8, "onnx-int8", threads=1)
    each = np.concatenate([alone({"pixel_values": row[None]}) for row in batch["pixel_values"][:9]])
    assert np.allclose(each, small[:9], atol=1e-5), "an answer does not hang on its batch"
    other = tmp_path / "other.onnx"
    quantize_static_int8(fp32, other, [{"pixel_values": batch["pixel_values"] * 0.02}])
    narrow = load_predictor(other, "onnx-int8", threads=1)(batch)
    assert np.abs(narrow - plain).max() > 2 * np.abs(small - plain).max()
    assert str(tmp_path).encode() not in int8.read_bytes()
