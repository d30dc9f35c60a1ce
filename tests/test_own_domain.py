"""The example of docs/own_domain.md is run as it stands there; what a task of one's own may be."""

import json
import re
import wave
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import pytest

import limbeck
from limbeck import recipe_task, tasks
from limbeck.cli import main
from limbeck.errors import DataError, RecipeError, SourceError
from limbeck.recipe_file import load_recipe, validate
from tiny_world import quickly

DOC = (Path(__file__).parents[1] / "docs/own_domain.md").read_text()
(CODE,) = re.findall(r"```python\n(.+?)```", DOC, re.DOTALL)


@pytest.fixture(autouse=True)
def registered():
    """Each test registers for itself."""
    with patch.dict(recipe_task._registered, clear=True):
        yield


def write_words(folder: Path) -> None:
    """Made up: `up` rises, `down` falls, `hum` stays, for a quarter of a second in noise."""
    random = np.random.default_rng(0)
    time = np.arange(2000) / 8000  # s
    for word, slope in {"up": 4000, "down": -4000, "hum": 0}.items():
        (folder / word).mkdir(parents=True)
        for i in range(50):
            start = random.uniform(1200, 1500) + (700 if slope < 0 else 0)
            tone = np.sin(2 * np.pi * (start * time + slope * time**2 / 2))
            samples = 0.3 * tone + random.normal(0, 0.05, len(time))
            with wave.open(str(folder / word / f"{i:02}.wav"), "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(8000)
                sound.writeframes((samples * 32767).astype(np.int16).tobytes())


def test_the_example_is_short():
    body = CODE[CODE.index("@tasks.register") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 40
    assert "limbeck." not in CODE.replace("limbeck.distill", ""), "public names only"


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    write_words(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    code = CODE.replace('"students"', '"export": {"formats": ["hf"], "primary": "hf"},\n'
                        '    "evidence": {"baselines": "none"}, "students"')  # fmt: skip
    scope: dict = {}
    with quickly():
        exec(compile(code, "own_domain.md", "exec"), scope)
        again = limbeck.distill(scope["recipe"], "runs/keywords")
        resolved = limbeck.distill("runs/keywords", "runs/keywords")
    (student,) = scope["report"].students
    assert scope["report"].teacher.main.quality.value > 0.9
    assert student.main.quality.value > 0.8 and student.budget.met
    for report in (again, resolved):
        assert all(stage.reused for stage in report.stages)
    recipe, _ = load_recipe("runs/keywords")
    assert recipe.task == scope["Keywords"](kind="keywords", bands=12)
    pocket = Path("runs/keywords/students/pocket")
    assert limbeck.try_student(pocket, "words/up/03.wav")[0][0] == "up"
    recipe_task._registered.clear()
    with pytest.raises(SourceError, match=r"'keywords', which nobody registered.*import the mod"):
        limbeck.try_student(pocket, "words/up/03.wav")


# What a kind may be


class Plain(tasks.ArrayTask):
    kind: Literal["plain"]
    width: int = 2

    def read(self, path, data):
        rows = np.arange(12.0).reshape(6, self.width)
        return tasks.Examples({"numbers": rows}, labels=["a", "b"] * 3)

    def one(self, what):
        return {"numbers": np.zeros((1, self.width), np.float32)}


def recipe(**task):
    training = {"epochs": 1, "batch_size": 2, "learning_rate": 0.01}
    return {
        "name": "own", "task": {"kind": "plain", **task},
        "data": {"train": ".", "test_fraction": 0.3},
        "teacher": {"config": {"model_type": "limbeck-tabular"}, "tune": training},
        "distill": {"training": training},
        "students": [{"name": "one", "budget": {"params": 100_000}}],
    }  # fmt: skip


def test_settings_of_its_own_are_checked_and_kept():
    tasks.register(Plain)
    loaded = validate(recipe(width=3))
    assert loaded.task == Plain(kind="plain", width=3)
    assert loaded.model_dump(mode="json")["task"] == {"kind": "plain", "width": 3}
    with pytest.raises(RecipeError, match=r"recipe\.task: `widht` is no setting of plain; .*width"):
        validate(recipe(widht=3))
    with pytest.raises(RecipeError, match=r"recipe\.task: `width` of plain is 'wide'; .*integer"):
        validate(recipe(width="wide"))


def test_a_kind_that_nobody_registered_is_refused(capsys, tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.task\.kind: 'plain' is not allowed.*tabular"):
        validate(recipe())
    tasks.register(Plain)
    with pytest.raises(RecipeError, match=r"'plane' is not allowed.*time-series, plain"):
        validate(recipe(kind="plane"))


def test_an_installed_packages_kind_is_found_by_its_entry_point():
    entry = EntryPoint("plain", f"{__name__}:Plain", "limbeck.tasks")
    found = [entry]
    with patch.object(recipe_task, "entry_points", lambda group, name: found[: name == "plain"]):
        assert validate(recipe()).task == Plain(kind="plain")


class NoKind(Plain):
    kind: str


class BuiltIn(Plain):
    kind: Literal["tabular"]


class Twice(Plain):
    kind: Literal["plain"]


class Half(tasks.ArrayTask):
    kind: Literal["half"]

    def read(self, path, data):
        return tasks.Examples({}, [])


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (NoKind, "NoKind.kind is not one text"),
        (BuiltIn, "'tabular' is there already"),
        (Twice, "'plain' is there already"),
        (Half, "Half has no `one`"),
    ],
)
def test_a_class_that_is_no_task_is_not_registered(task, words):
    tasks.register(Plain)
    assert tasks.register(Plain) is Plain, "an import twice does no harm"
    with pytest.raises(ValueError, match=words):
        tasks.register(task)


@pytest.mark.parametrize(
    ("arrays", "labels", "words"),
    [
        ({"numbers": np.zeros((5, 2))}, ["a", "b"] * 3, "5 numbers for 6 labels"),
        ({"numbers": np.full((6, 2), np.inf)}, ["a", "b"] * 3, "example 1: numbers has NaN, or no"),
        ({"numbers": np.zeros(6)}, ["a", "b"] * 3, r"of shape \(6,\)"),
        ({"numbers": np.full((6, 2), "x")}, ["a", "b"] * 3, "numbers are <U1"),
        ({"numbers": np.zeros((6, 2))}, ["a"] * 6, "only label is 'a'"),
        ({}, [], "no examples"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, labels, words):
    tasks.register(Plain)
    read = lambda self, path, data: tasks.Examples(arrays, labels)  # noqa: E731
    with patch.object(Plain, "read", read), quickly(), pytest.raises(DataError, match=words):
        limbeck.distill(recipe(), tmp_path / "out")


def test_arrays_that_no_network_takes_are_refused(tmp_path):
    tasks.register(Plain)
    pictures = tasks.Examples({"pictures": np.zeros((20, 2, 2))}, ["a", "b"] * 10)
    with (
        patch.object(Plain, "read", lambda *_: pictures), quickly(),
        pytest.raises(RecipeError, match="takes numbers and categories, not pictures"),
    ):  # fmt: skip
        limbeck.distill(recipe(), tmp_path / "out")


def test_a_kind_of_ones_own_is_planned(tmp_path, monkeypatch, capsys):
    tasks.register(Plain)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps(recipe()))  # which YAML is too
    with quickly():
        assert main(["plan", "recipe.yaml"]) == 0
    assert "one" in capsys.readouterr().out
