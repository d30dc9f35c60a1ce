"""Adapters learn beside weights that rest, and nothing of them is left in the model."""

import sys
from unittest.mock import patch

import pytest
import torch
import yaml

import limbeck
import tiny_language
from limbeck.causal import load_causal
from limbeck.errors import MissingExtraError, RecipeError
from limbeck.lora import adapted
from limbeck.objective import Objective
from limbeck.recipe_file import validate
from limbeck.recipe_teaching import LoraSpec, TrainingSpec
from limbeck.step import Training
from limbeck.teachers.stored import NoTeacher
from tiny_images import make_image_world
from tiny_models import bert_config, random_model
from tiny_world import Said, quickly, trained

LORA = LoraSpec(rank=4, alpha=8)


def lesson() -> Training:
    spec = TrainingSpec(epochs=2, batch_size=6, learning_rate=1e-2, lora=LORA)
    return Training(
        rows=tiny_language.rows(24), teacher=NoTeacher(), objective=Objective(hard_weight=1.0),
        spec=spec, seed=5, title="one",
    )  # fmt: skip


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_merged_it_is_a_plain_model_that_says_what_the_adapted_one_said():
    model, ids = tiny_language.model(), torch.tensor([[1, 7, 9, 30]])
    before = state(model)
    with adapted(model, LORA, seed=0) as said:
        learning = {n for n, p in model.named_parameters() if p.requires_grad}
        assert learning and all("lora_" in name for name in learning)
        count = sum(model.get_parameter(name).numel() for name in learning)
        assert said.startswith(f"{count:,} of ") and "rank 4" in said
        assert torch.equal(model(ids).logits, tiny_language.model()(ids).logits), "nothing yet"
        with torch.no_grad():
            for name in learning:
                model.get_parameter(name).normal_(std=0.1)
            adapted_says = model(ids).logits
    after = state(model)
    assert after.keys() == before.keys() and all(p.requires_grad for p in model.parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {n for n in after if "_proj" in n}, "all matrices of the layers, no others"
    rank = torch.linalg.matrix_rank(after[n := min(changed)] - before[n], rtol=1e-4)
    assert rank == LORA.rank
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, adapted_says, atol=1e-4)


def test_a_classifiers_head_learns_whole():
    model = random_model(bert_config())
    with adapted(model, LORA, seed=0):
        whole = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    heads = {"bert.pooler.dense", "classifier"}
    assert whole == {f"{head}.{part}" for head in heads for part in ("weight", "bias")}


def test_what_has_no_layers_of_matrices_is_refused():
    with pytest.raises(RecipeError, match="Sequential has no layers"), adapted(
        torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1)), LORA, seed=0
    ):
        pass


def test_without_peft_the_error_names_the_extra():
    with (
        patch.dict(sys.modules, {"peft": None}),
        pytest.raises(MissingExtraError, match=r"lora"),
        adapted(tiny_language.model(), LORA, seed=0),
    ):
        pass


@pytest.mark.parametrize("kills", [(3,), (2, 4)])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, kills):
    whole = trained(tmp_path / "a", tiny_language.model, lesson)
    killed = trained(tmp_path / "b", tiny_language.model, lesson, *kills)
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    assert any(not torch.equal(v, whole[n]) for n, v in tiny_language.model().named_parameters())


def test_teacher_and_students_of_a_run(tmp_path):
    folder = tiny_language.make_language_world(tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teacher"]["tune"] = {**recipe["distill"]["training"], "lora": {"rank": 8, "alpha": 16}}
    recipe["distill"]["training"]["lora"] = {}
    recipe["evidence"] = {"baselines": "all", "random_init": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = Said()
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out", progress=said)
    adapted_ones = {line.partition(": ")[0] for line in said.lines if "in adapters" in line}
    name = report.students[0].name
    assert adapted_ones >= {"teacher", name, f"{name}, hard labels, prefix start"}
    assert f"{name}, hard labels, random start" not in adapted_ones, "it would be no rival"
    before = load_causal(folder / "teacher", where="x").state_dict()
    after = load_causal(folder / "out/teacher/hf", where="x").state_dict()
    assert after.keys() == before.keys()
    kept = [name for name in before if torch.equal(after[name], before[name])]
    assert kept and not any("_proj" in name for name in kept), "embeddings and norms rested"
    student = report.students[0]
    assert student.fidelity.mean_kl < student.baselines.untaught.mean_kl


@pytest.mark.parametrize(
    ("distill", "base", "said"),
    [
        ({"run": "elastic"}, None, "`distill.training.lora` is for students in runs of their own"),
        ({}, {"config": {"model_type": "llama"}}, "random weights of `base.config` rest"),
    ],
)
def test_weights_that_cannot_rest_are_refused(tmp_path, distill, base, said):
    folder = tiny_language.make_language_world(tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["distill"]["training"]["lora"] = {}
    recipe["distill"] |= distill
    with pytest.raises(RecipeError, match=said):
        validate(recipe | {"base": base})


def test_a_teacher_of_random_weights_cannot_rest(tmp_path):
    recipe = yaml.safe_load((make_image_world(tmp_path) / "recipe.yaml").read_text())
    tune = {"epochs": 1, "learning_rate": 0.1, "lora": {}}
    recipe["teacher"] = {"config": {"model_type": "resnet"}, "tune": tune}
    with pytest.raises(RecipeError, match=r"`teacher\.tune\.lora` lets random weights rest"):
        validate(recipe)
