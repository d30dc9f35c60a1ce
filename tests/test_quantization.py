"""Students that learn on weights as a GGUF file holds them, to the bit."""

import numpy as np
import pytest
import torch
import yaml

import limbeck
import tiny_language
from limbeck.errors import RecipeError
from limbeck.export.gguf import write_gguf
from limbeck.gguf_source import read_gguf_model
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.quantization import Rounding, block_kind, rounded
from limbeck.recipe_file import validate
from limbeck.recipe_teaching import QuantizationAwareSpec, TrainingSpec
from limbeck.step import Training
from limbeck.teachers.stored import NoTeacher
from limbeck.train import train
from tiny_world import quickly, trained

SPEC = QuantizationAwareSpec(format="gguf-q4_0", share=0.5)


def lesson(spec: QuantizationAwareSpec | None = SPEC, validate=None) -> Training:
    return Training(
        rows=tiny_language.rows(24), teacher=NoTeacher(), objective=Objective(hard_weight=1.0),
        spec=TrainingSpec(epochs=2, batch_size=6, learning_rate=1e-2), seed=5, title="one",
        quantization=spec, validate=validate,
    )  # fmt: skip


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 1.0, 300.0])
def test_as_llama_cpps_own_writer_rounds_to_the_bit(kind, scale):
    gguf = pytest.importorskip("gguf")
    stored = gguf.GGMLQuantizationType[kind.upper()]
    weight = scale * torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    weight[3, :32] = 0.0
    weight[4, :32] = torch.linspace(-1, 1, 32) * scale  # halves between steps
    theirs = gguf.dequantize(gguf.quantize(weight.numpy(), stored), stored)
    assert np.array_equal(rounded(weight, kind).numpy(), theirs)
    assert scale == 0 or not np.array_equal(theirs, weight.numpy())


def test_a_models_weights_are_those_of_its_file(tmp_path):
    """All of them: which are rounded, in which way, and which are not."""
    folder = tiny_language.save(tmp_path / "hf", hidden_size=64, intermediate_size=80)
    write_gguf(folder, tmp_path / "model.gguf", "q4_0", name="x", where="x")
    read = read_gguf_model(tmp_path / "model.gguf", where="x").state_dict()
    model = tiny_language.model(hidden_size=64, intermediate_size=80)
    plain = state(model)
    with Rounding(model, SPEC, 10).at(5):
        here = state(model)
    blocked = {n for n in plain if plain[n].dim() > 1 and plain[n].shape[-1] % 32 == 0}
    for name, value in here.items():
        if name in blocked:
            assert torch.equal(value, read[name]) and not torch.equal(value, plain[name])
        else:
            assert torch.equal(value, plain[name]), "fp16 in the file, and left alone here"
    assert len(blocked) < sum(v.dim() > 1 for v in plain.values()), "80 is no multiple of 32"
    assert all(torch.equal(v, plain[n]) for n, v in state(model).items()), "and back again"


def test_tables_of_tokens_have_eight_bits():
    assert block_kind((99, 64), "q4_0", of_tokens=True) == "q8_0"
    assert block_kind((99, 64), "q4_0", of_tokens=False) == "q4_0"
    assert block_kind((99, 60), "q8_0", of_tokens=False) is None
    assert block_kind((64,), "q8_0", of_tokens=False) is None


@pytest.mark.parametrize(("share", "first"), [(1.0, 0), (0.5, 5), (0.25, 7), (0.01, 9)])
def test_the_last_steps_are_on_rounded_weights(share, first):
    model = tiny_language.model()
    plain, spec = state(model), QuantizationAwareSpec(format="gguf-q8_0", share=share)
    rounding, seen = Rounding(model, spec, 10), []
    for step in range(10):
        with rounding.at(step):
            seen.append(any(not torch.equal(v, plain[n]) for n, v in state(model).items()))
    assert seen == [step >= first for step in range(10)]


def test_the_gradient_at_the_rounded_weights_moves_the_plain_ones(tmp_path):
    """Straight through: one step by hand."""
    whole = lesson(QuantizationAwareSpec(format="gguf-q4_0", share=1.0))
    model, by_hand, seen = tiny_language.model(), tiny_language.model(), []

    def loss_of(of):
        batch = whole.rows.batch(whole.positions(0))
        logits = of(**batch.inputs).logits[batch.mask]
        return torch.nn.functional.cross_entropy(logits, batch.labels[batch.mask])

    with Rounding(by_hand, whole.quantization, 1).at(0):
        gradients = torch.autograd.grad(loss_of(by_hand), [*by_hand.parameters()])
    original = limbeck.train.SharedAdamW.step

    def keep(self, pieces, **settings):
        seen.append({piece.name: piece.values.to_dense().clone() for piece in pieces})
        return original(self, pieces, **settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(limbeck.train, "clip", lambda pieces, _: None)
        patched.setattr(limbeck.train.SharedAdamW, "step", keep)
        train(model, whole, tmp_path, Silent())
    names = [name for name, _ in by_hand.named_parameters()]
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.allclose(seen[0][name], gradient, atol=1e-5), name
    end = state(model)
    assert any(
        not torch.equal(rounded(v, "q4_0"), v) for n, v in end.items() if "gate_proj" in n
    ), "what is saved is not rounded: the file's writer does that"


def test_validation_sees_what_the_file_will_hold(tmp_path):
    seen = []

    def look(model):
        weight = model.state_dict()["model.layers.0.mlp.gate_proj.weight"]
        seen.append(torch.equal(rounded(weight, "q4_0"), weight))
        return 0.0

    train(tiny_language.model(), lesson(validate=look), tmp_path, Silent())
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("kills", [(3,), (6, 1)])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, kills):
    whole = trained(tmp_path / "a", tiny_language.model, lesson)
    killed = trained(tmp_path / "b", tiny_language.model, lesson, *kills)
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    plain = trained(tmp_path / "c", tiny_language.model, lambda: lesson(None))
    assert not all(torch.equal(value, whole[name]) for name, value in plain.items())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_language.make_language_world(tmp_path_factory.mktemp("rounded"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["distill"]["quantization_aware"] = {"format": "gguf-q4_0"}
    recipe["export"] = {"formats": ["hf", "gguf-f16", "gguf-q4_0"], "primary": "gguf-q4_0"}
    recipe["evidence"] = {"baselines": "all", "random_init": False}
    return folder, recipe


def test_a_runs_students_learn_so_and_their_rivals_too(tiny):
    folder, recipe = tiny
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
        before = [a.quality for s in report.students for a in s.artifacts]
        recipe["distill"]["quantization_aware"]["share"] = 1.0
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
    after = [a.quality for s in again.students for a in s.artifacts]
    assert before != after
    assert report.students[0].baselines.hard_labels != again.students[0].baselines.hard_labels


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill": {"run": "elastic"}}, "`distill.quantization_aware` is for students in runs"),
        ({"export": {"formats": ["hf", "gguf-f16"], "primary": "hf"}}, "is no file of this run"),
        ({"distill": {"training": {"epochs": 1, "learning_rate": 0.1, "lora": {}}}}, "one of them"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(tiny, changes, said):
    _, recipe = tiny
    changed = {**recipe, **{k: {**recipe[k], **v} for k, v in changes.items()}}
    with pytest.raises(RecipeError, match=said):
        validate(changed)
