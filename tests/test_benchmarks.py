"""Public benchmarks by lm-eval: scores are what a slow loop finds, and a folder runs nothing."""

import json
from importlib import util

import numpy as np
import pytest
import torch
import yaml

import limbeck
import tiny_language
from limbeck import benchmark_worker, benchmarks
from limbeck.causal import load_causal
from limbeck.errors import MissingExtraError, RecipeError, SourceError
from limbeck.recipe_file import load_recipe
from limbeck.recipe_measure import BenchmarkSpec
from tiny_world import quickly

CHOICE = {
    "task": "sea", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "q.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "choices", "doc_to_target": "answer", "metadata": {"version": 2.5},
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}  # fmt: skip


def write_tasks(folder, **changes):
    """A folder with one task; `changes` of its settings."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    words = ["the", "old", "man", "and", "sea", "cafe", "gods"]
    rows = [
        {
            "question": " ".join(draw.choice(words, 4)),
            "choices": [" ".join(draw.choice(words, n)) for n in (1, 2, 3)],
            "answer": i % 3,
        }
        for i in range(24)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sea.yaml").write_text(yaml.safe_dump({**CHOICE, **changes}))
    return rows


@torch.no_grad()
def accuracies(model, rows) -> tuple[list[bool], list[bool]]:
    """Whether the right choice is the likeliest, and whether it is by character."""
    tokenizer, plain, by_length = tiny_language.tokenizer(), [], []
    for row in rows:
        found = []
        for choice in row["choices"]:
            asked = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            found.append(float(tiny_language.log_probs(model, whole)[len(asked) - 1 :].sum()))
        lengths = [len(choice) for choice in row["choices"]]
        plain.append(int(np.argmax(found)) == row["answer"])
        by_length.append(int(np.argmax(np.divide(found, lengths))) == row["answer"])
    return plain, by_length


@pytest.mark.slow
def test_scores_are_what_a_slow_loop_finds_and_stand_in_the_report(tmp_path):
    pytest.importorskip("lm_eval")
    folder = tiny_language.make_language_world(
        tmp_path, export={"formats": ["hf"], "primary": "hf"},
        measure={"latency_runs": 10, "benchmarks": {"tasks": ["sea"], "folder": "tasks"}},
    )  # fmt: skip
    rows = write_tasks(folder / "tasks")
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert all(stage.reused for stage in again.stages)
    plain, by_length = report.benchmarks.results
    assert (plain.task, plain.metric, plain.version) == ("sea", "acc", "2.5")
    assert by_length.metric == "acc_norm" and report.benchmarks.limit is None
    for name, hf in (("teacher", "teacher/hf"), ("one", "students/one/hf")):
        model = load_causal(folder / "out" / hf, where="x")
        for right, found in zip(accuracies(model, rows), (plain, by_length), strict=True):
            score = found.scores[name]
            assert score.value == pytest.approx(np.mean(right)) and score.n == len(rows)
            assert score.stderr == pytest.approx(np.std(right, ddof=1) / len(rows) ** 0.5)
    shown = (folder / "out/report.md").read_text()
    assert f"By lm-eval {benchmarks.version()}" in shown and "| sea | acc |" in shown
    assert "Public benchmarks" in (folder / "out/report.html").read_text()


@pytest.mark.slow
def test_an_unknown_task_and_one_without_data_are_said_before_training(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = tiny_language.make_language_world(tmp_path)
    for name, kind, said in (
        ("arc_easyy", RecipeError, r"benchmarks\.tasks: lm-eval .* knows no 'arc_easyy'.*arc_easy"),
        ("arc_easy", SourceError, r"benchmarks\.tasks: arc_easy cannot be made ready: .*Hub"),
    ):
        with pytest.raises(kind, match=said):
            limbeck.distill(
                folder / "recipe.yaml", folder / "out",
                overrides=[f"measure.benchmarks.tasks=[{name}]"],
            )  # fmt: skip
        assert not (folder / "out/teacher").exists()


@pytest.mark.slow
def test_a_template_reaches_nothing_but_the_example(tmp_path):
    pytest.importorskip("lm_eval")
    escape = "{{ question.__class__.__mro__[1].__subclasses__() }}"
    write_tasks(tmp_path / "tasks", doc_to_text=escape)
    with pytest.raises(SourceError, match=r"sea cannot be made ready: SecurityError"):
        benchmarks.check(tmp_path, BenchmarkSpec(tasks=("sea",)), tmp_path / "tasks", None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": "os.system"}, r"the setting 'class' is not for tasks of your own"),
        ({"include": "/etc/passwd"}, r"the setting 'include'"),
        ({"process_docs": "utils.f"}, r"the setting 'process_docs'"),
        ({"custom_dataset": "x"}, r"the setting 'custom_dataset'"),
        ({"dataset_path": "evil/loader"}, r"dataset_path is 'evil/loader'; allowed: json, csv"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, r"in dataset_kwargs 'trust_remote_code'"),
        ({"dataset_kwargs": {"data_files": "../secret.jsonl"}}, r"data_files has '\.\./secret"),
        ({"dataset_kwargs": {"data_files": "http://x/y.jsonl"}}, r"data_files has 'http"),
        ({"dataset_kwargs": {"data_files": ["*.jsonl"]}}, r"data_files has '\*\.jsonl'"),
        ({"dataset_kwargs": {}}, r"data_files has None"),
        ({"metric_list": [{"metric": "./evil"}]}, r"metric is '\./evil'; allowed: acc"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, r"in metric_list 'hf_eval"),
        ({"generation_kwargs": {"custom_generate": "./evil"}}, r"in generation_kwargs 'custom_gen"),
        ({"metric_list": "acc"}, r"metric_list is 'acc'; allowed: a list"),
        ({"filter_list": [{"filter": [{"function": "custom"}]}]}, r"filter function is 'custom'"),
        ({"task": ["a", "b"]}, r"it names no task"),
    ],
)  # fmt: skip
def test_settings_that_could_run_or_read_something_else_are_refused(tmp_path, changes, said):
    write_tasks(tmp_path / "tasks", **changes)
    (tmp_path / "secret.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match=rf"benchmarks\.folder: sea\.yaml: {said}"):
        benchmarks.own_tasks(tmp_path / "tasks", cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("f.yaml", "task: f\nprocess_docs: !function utils.f\n", r"f\.yaml: it has !function"),
        ("f.yml", "task: !!python/object/apply:os.system [ls]\n", r"f\.yml: it has tag:yaml"),
        ("utils.py", "open('/tmp/pwned', 'w')\n", r"utils\.py: it is Python"),
        ("f.yaml", "task: sea\ndataset_path: json\n"
         "dataset_kwargs: {data_files: q.jsonl}\n", r"task 'sea' stands in another file too"),
        ("f.yaml", "a: [", r"f\.yaml: no YAML"),
    ],
)  # fmt: skip
def test_files_that_could_run_something_are_refused(tmp_path, name, text, said):
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / name).write_text(text)
    with pytest.raises(SourceError, match=said):
        benchmarks.own_tasks(tmp_path / "tasks", cache=tmp_path)


def test_own_tasks_are_data_alone(tmp_path):
    write_tasks(tmp_path / "tasks")
    found = benchmarks.own_tasks(tmp_path / "tasks", cache=tmp_path / "c")
    (file,) = found["sea"]["dataset_kwargs"]["data_files"].values()
    assert file == str(tmp_path / "tasks/q.jsonl")
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(SourceError, match="holds no tasks"):
        benchmarks.own_tasks(tmp_path / "tasks" / "none", cache=tmp_path)
    with pytest.raises(RecipeError, match=r"folder: it has no effect.*allowed: sea"):
        benchmarks.check(tmp_path, BenchmarkSpec(tasks=("arc_easy",)), tmp_path / "tasks", None)


def test_of_a_group_without_a_score_what_is_in_it_is_shown():
    found = {
        "results": {name: {"acc,none": 0.5} for name in ("a", "b", "c", "inner", "tagged")}
        | {"outer": {"alias": "outer"}},
        "group_subtasks": {"outer": ["inner", "c"], "inner": ["a", "b"]},
        "n-samples": {name: {"effective": n} for name, n in zip("abc", (1, 2, 4), strict=True)},
    }
    shown = benchmark_worker._shown
    assert [*shown(found, ["outer", "tag"])] == ["inner", "c", "tagged"]
    assert [*shown(found, ["c", "inner"])][:2] == ["c", "inner"]
    assert benchmark_worker._examples(found, "outer") == 7
    assert benchmark_worker._examples(found, "a") == 1


def test_a_missing_extra_is_said_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "lm_eval" else name)
    folder = tiny_language.make_language_world(tmp_path, measure={"benchmarks": {"tasks": ["x"]}})
    with pytest.raises(MissingExtraError, match=r"recipe\.measure\.benchmarks.*\[benchmark\]"):
        limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert not (folder / "out").exists()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="models that write, not for text-classification"):
        load_recipe("quickstart", ["measure.benchmarks.tasks=[arc_easy]"])
    with pytest.raises(RecipeError, match="a task twice"):
        load_recipe("smol", ["measure.benchmarks.tasks=[arc_easy, arc_easy]"])
