"""A language model through the whole pipeline: from a recipe to GGUF files and their report."""

import json
from importlib import util

import numpy as np
import pytest
import torch
import yaml

import limbeck
import llama_cpp_runner
import tiny_language
from limbeck import runtime
from limbeck.causal import load_causal
from limbeck.cli import main
from limbeck.errors import RecipeError
from limbeck.gguf_source import read_gguf
from limbeck.measure_language import score_documents
from limbeck.models import load_tokenizer
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.stages import Planner, places_of
from limbeck.tasks.language_recipe import open_task
from limbeck.teaching import loss_and_accuracy
from tiny_world import quickly


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Dedicated students of a GGUF file whose vocabulary is cut to the text's."""
    from limbeck.export.gguf import write_gguf

    folder = tiny_language.make_language_world(
        tmp_path_factory.mktemp("language"), evidence={"baselines": "all"},
        export={"formats": ["hf", "gguf-q8_0", "gguf-q4_0"]},
    )  # fmt: skip
    write_gguf(folder / "teacher", folder / "teacher.gguf", "f32", name="tiny", where="x")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teacher"] |= {"model": "teacher.gguf", "trim_vocabulary": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    return folder, report


def test_a_language_model_is_trimmed_taught_exported_and_measured(done):
    folder, report = done
    (student,) = report.students
    theirs, mine = report.teacher.main.quality, student.main.quality
    assert theirs.metric == "next-token_accuracy" and theirs.value > 0.8, "its tuning worked"
    assert mine.value > 0.6 and mine.low < mine.value < mine.high
    assert mine.n == theirs.n == 12, "intervals are over documents"
    assert theirs.perplexity < 3 and mine.perplexity < 5
    assert student.fidelity.agreement > 0.6 and student.fidelity.mean_kl < 1
    assert 0.6 < student.retention.value == pytest.approx(mine.value / theirs.value)
    assert student.baselines.untaught.value < student.baselines.hard_labels.value
    assert student.primary == "gguf-q8_0" and student.budget.met and not student.capabilities
    assert any("of 400 tokens are left" in warning for warning in report.warnings)
    assert report.labels == () and report.linear is None
    with quickly():
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert all(stage.reused for stage in again.stages)
    for name in ("report.md", "report.html", "students/one/hf/README.md"):
        text = (folder / "out" / name).read_text()
        assert "erplexity" in text and "next-token accuracy" in text.replace("_", " ")


def test_the_files_say_what_the_report_says_of_them(done):
    folder, report = done
    (student,) = report.students
    run = folder / "out"
    rows = open_task(load_recipe(run)[0], run / "data").rows("test")
    plain = load_causal(run / "students/one/hf", where="x")
    sizes = {}
    for artifact in student.artifacts:
        path = run / artifact.path
        sizes[artifact.format] = artifact.size_bytes
        model = plain
        if artifact.format != "hf":
            assert path.stat().st_size == artifact.size_bytes
            model = read_gguf(path, where="x")[0].eval()
            model.config.use_cache = False
        found = score_documents(model, rows)
        assert found.right.sum() / found.num_tokens.sum() == artifact.quality.value
        perplexity = np.exp(found.nll.sum() / found.num_tokens.sum())
        assert perplexity == pytest.approx(artifact.quality.perplexity)
    assert sizes["gguf-q4_0"] < sizes["gguf-q8_0"] < sizes["hf"]


def test_a_files_size_is_predicted(done):
    folder, report = done
    recipe, _ = load_recipe(folder / "out")
    for primary in ("hf", "gguf-q8_0", "gguf-q4_0"):
        export = recipe.export.model_copy(update={"primary": primary})
        changed = recipe.model_copy(update={"export": export})
        planner = Planner(changed, places_of(folder / "out"), Silent())
        cost = planner.plan(recipe.students[0], planner.space).cost
        written = report.students[0].artifact(primary)
        assert cost.params == report.students[0].params
        assert cost.size_bytes == pytest.approx(written.size_bytes, rel=0.1), primary


@pytest.mark.slow
def test_a_plan_says_beforehand_what_the_run_then_does(done):
    folder, report = done
    plan = limbeck.plan(folder / "out/recipe.yaml")
    assert plan.students[0].cost.params == report.students[0].params
    chosen = next(signals for signals in plan.signals if signals.chosen)
    assert chosen.name == "every logit in fp16"
    size = sum(f.stat().st_size for f in (folder / "out/signals").glob("*.safetensors"))
    assert chosen.size_bytes == pytest.approx(size, rel=0.3)


def test_a_student_writes_on_and_the_cards_snippet_too(done, capsys, monkeypatch):
    folder, _ = done
    student = folder / "out/students/one"
    assert main(["try", str(student), "the old"]) == 0
    said = capsys.readouterr().out.strip()
    assert said.startswith("the old") and len(said) > len("the old ")
    card = (student / "hf/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(student / "hf")
    exec(code.replace('"Your text"', "'the old'").replace("=40", "=60"), {"__name__": "card"})
    assert capsys.readouterr().out.strip() == said


@pytest.mark.slow
def test_the_cards_snippet_for_llama_cpp_writes_on(done, capsys, monkeypatch):
    folder, _ = done
    hf = folder / "out/students/one/hf"
    code = (hf / "README.md").read_text().split("```python\n")[2].split("```")[0]
    monkeypatch.chdir(hf)
    with llama_cpp_runner.without_amx():
        exec(code.replace('"Your text"', "'the old'").replace("40", "8"), {"__name__": "card"})
    said = capsys.readouterr().out.strip()
    model, tokenizer = load_causal(hf, where="x"), load_tokenizer(hf, where="x")
    written = model.generate(
        **tokenizer("the old", return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=8, do_sample=False,
    )  # fmt: skip
    assert said and tokenizer.decode(written[0, 2:], skip_special_tokens=True).split()[0] in said


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "gguf-q8_0"])
def test_files_are_timed_in_writing(done, format):
    folder, _ = done
    run = folder / "out"
    recipe, _ = load_recipe(run)
    task, hf = open_task(recipe, run / "data"), run / "students/one/hf"
    config = task.read_config(hf, where="x")
    timing = runtime.time_file(recipe, task, config, hf, run / "students/one/gguf", format)
    by_llama = format != "hf" and util.find_spec("llama_cpp") is not None
    assert timing.runtime.startswith("llama.cpp" if by_llama else "torch")
    assert timing.tokens_per_s > 1 and timing.latency_ms > 0 and timing.throughput_per_s is None
    assert timing.peak_memory_bytes > 20e6 and timing.runs == 10


def test_losses_are_of_what_counts(done):
    folder, _ = done
    task = open_task(load_recipe(folder / "out")[0], folder / "out/data")
    model, rows = load_causal(folder / "out/teacher/hf", where="x"), task.rows("validation")
    loss, right = loss_and_accuracy(rows, model)
    found = score_documents(model, rows)
    assert loss == pytest.approx(found.nll.sum() / found.num_tokens.sum(), rel=1e-5)
    assert right == pytest.approx(found.right.sum() / found.num_tokens.sum())
    assert rows.num_positions == found.num_tokens.sum()


def test_an_elastic_family_of_conversations_with_a_student_between(tmp_path):
    folder = tiny_language.make_language_world(tmp_path)
    rows = [{"ask": text[:12], "say": text[12:]} for text in tiny_language.texts()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["task"] |= {"layout": "pad"}
    recipe["data"] |= {"prompt": "ask", "completion": "say"}
    recipe["distill"] |= {"run": "elastic"}
    recipe["students"] = [
        {"name": "large", "budget": {"params": 80000}},
        {"name": "small", "budget": {"params": 50000}},
        {"name": "between", "budget": {"params": 70000}, "trained": False},
    ]
    recipe["export"] = {"formats": ["hf"], "primary": "hf"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    found = {s.name: s for s in report.students}
    assert found["large"].main.quality.value > 0.5, found["large"].main.quality
    assert found["between"].params <= 70000 and not found["between"].trained
    assert any(not point.trained for point in report.frontier)
    assert all(0 < point.quality <= 1 and point.loss > 0 for point in report.frontier)
    for name in found:
        model = load_causal(folder / f"out/students/{name}/hf", where="x")
        assert sum(p.numel() for p in model.parameters()) == found[name].params
        assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_settings_that_do_not_fit_are_refused(tmp_path):
    folder = tiny_language.make_language_world(tmp_path)
    for override, said in (
        ("export.formats=[onnx-int8, gguf-q8_0]", "not for language-modeling"),
        ("evidence.linear=true", "a model for labels"),
        ("data.label=kind", "no effect for language-modeling"),
        ("data.prompt=ask", "a pair"),
    ):
        with pytest.raises(RecipeError, match=said):
            load_recipe(folder / "recipe.yaml", [override])
    classify = ["task.kind=text-classification", "task.layout=null"]
    with pytest.raises(RecipeError):
        load_recipe(folder / "recipe.yaml", classify)
