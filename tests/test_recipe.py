"""A recipe is data; what is wrong with it is said in its own words."""

import pytest
import yaml

from limbeck.errors import LimbeckError, RecipeError, RunFolderError
from limbeck.recipe_file import built_in_recipes, dump_recipe, load_recipe, rebase, validate
from limbeck.run import open_run


def quickstart() -> dict:
    return yaml.safe_load(built_in_recipes()["quickstart"].read_text())


@pytest.mark.parametrize("name", built_in_recipes())
def test_built_in_recipes_round_trip(name):
    recipe, _ = load_recipe(name)
    assert validate(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distill": {"temprature": 2}}, ["recipe.distill.temprature", "mean 'temperature'"]),
        ({"seed": "zero"}, ["recipe.seed", "'zero'"]),
        ({"students": []}, ["recipe.students"]),
        ({"task": {"kind": "text-classification", "max_tokens": 2}}, ["max_tokens", "2"]),
        ({"data": {"train": "a.csv", "test": "b.csv", "test_fraction": 0.1}}, ["no effect"]),
    ],
)
def test_a_wrong_setting_is_named(change, words):
    data = quickstart()
    for key, value in change.items():
        merged = isinstance(value, dict) and isinstance(data[key], dict)
        data[key] = {**data[key], **value} if merged else value
    with pytest.raises(RecipeError) as caught:
        validate(data)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: [*x, *x]",
        "name: !!python/object/apply:os.system ['true']",
        "name: a\nname: b",
        "- 1",
        "a: " + "[" * 40 + "]" * 40,
        "a: [1",
    ],
    ids=["bomb", "tag", "twice", "list", "deep", "torn"],
)
def test_a_hostile_file_is_refused(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_set_changes_one_setting_by_name_and_refuses_unknown():
    recipe, _ = load_recipe("quickstart", ["students.small.budget.size_mb=3", "seed=7"])
    assert recipe.student("small").budget.size_mb == 3
    assert recipe.seed == 7
    with pytest.raises(RecipeError, match="no entry 'tiny'"):
        load_recipe("quickstart", ["students.tiny.budget.size_mb=3"])


def test_hf_is_always_written_and_a_relative_path_starts_at_the_recipe(tmp_path):
    recipe = validate(quickstart() | {"export": {"formats": ["onnx-int8"]}})
    assert recipe.export.formats == ("hf", "onnx-int8")
    (tmp_path / "here.csv").write_text("")
    data = quickstart()
    data["data"] |= {"train": "here.csv", "test": "not/there.csv"}
    data["teacher"]["model"] = "org/name"
    moved = rebase(validate(data), tmp_path)
    assert moved.data.train.uri == str(tmp_path / "here.csv")
    assert moved.data.test.uri == str(tmp_path / "not/there.csv")
    assert moved.teacher.model.uri == "org/name", "may be a hub id"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert rebase(validate(data), tmp_path).teacher.model.uri == str(tmp_path / "org/name")


class Meter:
    def begin(self, name): ...

    def end(self, name):
        from limbeck.run import Energy

        return Energy(None, "not metered")


def test_a_stage_runs_once_and_again_when_its_inputs_change(tmp_path):
    recipe, _ = load_recipe("quickstart")
    made = []

    def make(folder):
        made.append(1)
        (folder / "x").write_text("x")

    for inputs in (1, 1, 2):
        with open_run(tmp_path / "run", recipe, Meter()) as run:
            run.stage("a", inputs, make)
    assert len(made) == 2


def test_a_damaged_file_is_named_and_repaired_only_on_demand(tmp_path):
    recipe, _ = load_recipe("quickstart")
    make = lambda folder: (folder / "x").write_text("x")  # noqa: E731
    with open_run(tmp_path / "run", recipe, Meter()) as run:
        run.stage("a", 1, make)
    (tmp_path / "run" / "a" / "x").write_text("y")
    with pytest.raises(LimbeckError) as caught, open_run(tmp_path / "run", recipe, Meter()) as run:
        run.stage("a", 1, make)
    assert caught.value.exit_code == 4
    assert str(tmp_path / "run" / "a" / "x") in str(caught.value)
    with open_run(tmp_path / "run", recipe, Meter(), repair=True) as run:
        run.stage("a", 1, make)
    assert (tmp_path / "run" / "a" / "x").read_text() == "x"


def test_a_folder_with_another_recipe_or_other_things_is_refused(tmp_path):
    recipe, _ = load_recipe("quickstart")
    with open_run(tmp_path / "run", recipe, Meter()) as run:
        run.stage("a", 1, lambda folder: None)
    other, _ = load_recipe("quickstart", ["seed=1"])
    with pytest.raises(RunFolderError, match="seed is 0 there, 1 here"):
        open_run(tmp_path / "run", other, Meter()).__enter__()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunFolderError, match="not a run folder"):
        open_run(tmp_path / "mine", recipe, Meter()).__enter__()
