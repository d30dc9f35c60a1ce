"""Students that are cut from another architecture than the teacher's."""

import pytest
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

import limbeck
from limbeck.errors import RecipeError
from limbeck.models import make_config
from limbeck.recipe_file import validate
from tiny_models import bert_config, random_model
from tiny_world import make_known_world, quickly, save_tokenizer

SMALL = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2,
         "max_position_embeddings": 16}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Runs the known world's recipe with this base."""
    folder = make_known_world(tmp_path)

    def distil(**base):
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"base": base}
        recipe["students"] = [{"name": "one", "budget": {"params": 3500}}]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with quickly():
            return limbeck.distill(folder / "recipe.yaml", folder / "out")

    distil.folder = folder
    return distil


def test_a_student_of_another_architecture_with_the_teachers_tokenizer(run):
    report = run(config=SMALL)
    (student,) = report.students
    hf = run.folder / "out" / student.artifact("hf").path
    config = AutoConfig.from_pretrained(hf)
    assert config.model_type == "distilbert" and config.vocab_size == bert_config().vocab_size
    assert student.params <= 3500 and student.fidelity is not None
    assert AutoModelForSequenceClassification.from_pretrained(hf).num_parameters() == student.params
    assert (hf / "tokenizer.json").is_file()
    assert report.teacher.params > student.params
    with quickly():
        again = limbeck.distill(run.folder / "recipe.yaml", run.folder / "out")
    assert all(stage.reused for stage in again.stages)


def test_a_pretrained_base_gives_its_own_weights(run):
    folder = run.folder / "other"
    random_model(make_config({**SMALL, "vocab_size": 99}, where="x")).save_pretrained(folder)
    save_tokenizer(folder)
    report = run(model="other")
    assert "base/hf" in {stage.name for stage in report.stages}
    base = AutoModelForSequenceClassification.from_pretrained(run.folder / "out/base/hf")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert base.base_model.embeddings.word_embeddings.weight.equal(
        theirs.base_model.embeddings.word_embeddings.weight
    )


def test_a_base_with_another_tokenizer_is_refused(run):
    folder = run.folder / "other"
    random_model(make_config({**SMALL, "vocab_size": 99}, where="x")).save_pretrained(folder)
    save_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w10"', '"v10"'))
    with pytest.raises(RecipeError, match="the teacher's own tokenizer"):
        run(model="other")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({}, "not one base"),
        ({"config": {"dim": 3}}, "names no architecture"),
        ({"config": SMALL, "model": "x"}, "not one base"),
    ],
)
def test_a_base_that_is_none_is_refused(run, base, said):
    with pytest.raises(RecipeError, match=said):
        validate(yaml.safe_load((run.folder / "recipe.yaml").read_text()) | {"base": base})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "distilbrt"}, "perhaps distilbert"),
        ({"model_type": "distilbert", "hidden_dims": 3}, "hidden_dim"),
    ],
)
def test_a_misspelt_config_names_what_it_may_mean(fields, said):
    with pytest.raises(RecipeError, match=said):
        make_config(fields, where="recipe.base.config")
