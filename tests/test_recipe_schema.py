"""The published JSON Schema is the code's, and says of a recipe what the code says of it."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from limbeck.errors import RecipeError
from limbeck.recipe import Recipe
from limbeck.recipe_file import built_in_recipes, dump_recipe, load_recipe, validate

SCHEMA = Path(__file__).parent.parent / "docs" / "recipe.schema.json"
REWRITE = (
    'python -c "from limbeck.recipe import Recipe; print(Recipe.schema_json())"'
    " > docs/recipe.schema.json"
)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def quickstart() -> dict:
    return yaml.safe_load(built_in_recipes()["quickstart"].read_text())


def test_published_schema_is_the_codes():
    same = SCHEMA.read_text() == Recipe.schema_json() + "\n"
    assert same, f"docs/recipe.schema.json is old; rewrite it with: {REWRITE}"


@pytest.mark.parametrize("name", built_in_recipes())
def test_built_in_recipes_fit_short_and_written_out(name, validator):
    validator.validate(yaml.safe_load(built_in_recipes()[name].read_text()))
    validator.validate(yaml.safe_load(dump_recipe(load_recipe(name)[0])))


def put(data: dict, where: str, value: object) -> dict:
    data = copy.deepcopy(data)
    here, steps = data, [int(s) if s.isdigit() else s for s in where.split(".")]
    for step in steps[:-1]:
        here = here[step]
    here[steps[-1]] = value
    return data


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("colour", "red"),
        ("distill.temprature", 2),
        ("students.0.budget.parms", 2),
        ("teacher.tune.epoch", 1),
        ("data.train", {"uri": "a", "sha": "b"}),
        ("data.train", {"sha256": "0a" * 32}),
        ("data.train", {"uri": "a", "sha256": "short"}),
        ("data.train", ""),
        ("data.train", 3),
        ("seed", -1),
        ("seed", True),
        ("task.kind", "poetry"),
        ("task.max_tokens", 3),
        ("students", []),
        ("students.0.name", "A B"),
        ("distill.temperature", 0),
        ("export", {"formats": ["gguf"]}),
    ],
)
def test_what_the_code_refuses_the_schema_refuses(where, value, validator, quickstart):
    changed = put(quickstart, where, value)
    assert not validator.is_valid(changed)
    with pytest.raises(RecipeError):
        validate(changed)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("data.train", "rows.csv"),
        ("data.train", {"uri": "rows.csv"}),
        ("data.train", {"uri": "rows.csv", "sha256": "0a" * 32}),
        ("data.columns", None),
        ("teacher.tune", None),
        ("students.0.budget", {"params": 5, "latency_ms": 0.5}),
        ("evidence", {"baselines": "all", "linear": False}),
    ],
)
def test_what_the_code_takes_the_schema_takes(where, value, validator, quickstart):
    changed = put(quickstart, where, value)
    validate(changed)
    validator.validate(changed)


def test_every_setting_is_explained_where_an_editor_shows_it():
    schema = json.loads(SCHEMA.read_text())
    models = [schema, *schema["$defs"].values()]
    models += [form for model in models for form in model.get("anyOf", [])]
    settings = [item for model in models for item in model.get("properties", {}).items()]
    assert len(settings) > 45
    assert not [name for name, setting in settings if not setting.get("description")]
