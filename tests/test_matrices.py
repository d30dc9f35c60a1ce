"""Matrices that are rounded once a step give what autocast gives in every thread."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig

from limbeck import cores, step
from limbeck.matrices import Matrices, matrices_of
from limbeck.objective import Objective
from limbeck.observe import Observer
from limbeck.recipe_teaching import TrainingSpec
from limbeck.teachers.live import LiveTeacher
from limbeck.temperature import Fixed
from limbeck.types import Need
from test_heads import CONFIGS, Rows, Teacher, causal
from tiny_models import bert_config, random_model

BOTH = {"temperature": Fixed(2.0), "soft_weight": 0.7, "hard_weight": 0.4}
LOGITS = frozenset({Need.LOGITS})


def stepped(model, *, once, backend="dense", precision="bf16"):
    """Two steps' findings, with matrices that are rounded once a step or by autocast."""
    training = step.Training(
        rows=Rows(), teacher=Teacher(), objective=Objective(**BOTH), seed=0, title="t",
        spec=TrainingSpec(
            epochs=1, batch_size=24, learning_rate=1e-3, precision=precision, backend=backend
        ),
    )  # fmt: skip
    step_of = step.Step(model, training, [p for p in model.parameters() if p.requires_grad])
    step.start_head(step_of)
    if once:
        step.start_matrices(step_of)
    found = step_of(0, look=False), step_of(0, look=True)
    step_of.observe.close()
    return *found, step_of.matrices.layers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", ["dense", "fused"])
def test_a_step_is_autocasts_to_the_bit(name, backend, monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 2)
    model = causal(CONFIGS[name])
    *plain, none = stepped(model, once=False, backend=backend)
    *once, layers = stepped(model, once=True, backend=backend)
    assert not none
    if name != "gpt2":  # whose layers are no nn.Linear: autocast goes on with them
        assert len(layers) == 2 * 7, "all but the head"
    for mine, autocasts in zip(once, plain, strict=True):
        assert all(g.dtype == torch.float32 for g in mine.gradient if g is not None)
        for a, b in zip(mine.gradient, autocasts.gradient, strict=True):
            assert torch.equal(a, b)
        assert mine.terms == autocasts.terms
        assert mine.norms == autocasts.norms


def test_fp32_has_none():
    *_, layers = stepped(causal(CONFIGS["llama"]), once=True, precision="fp32")
    assert layers == []


def test_after_a_step_the_model_has_its_own_weights_even_where_it_failed():
    model = causal(CONFIGS["llama"])
    before = dict(model.named_parameters())
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(ValueError, match="here"), Matrices(layers).in_place():
        assert layers[0].weight.dtype == torch.bfloat16
        raise ValueError("here")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_step_sees_what_the_last_one_changed():
    layer = nn.Linear(8, 8)
    matrices = Matrices([layer])
    for _ in range(2):
        with torch.no_grad():
            layer.weight.normal_()
        with matrices.in_place():
            assert torch.equal(layer.weight, next(iter(matrices.copies)))
            copy = layer.weight.detach().clone()
        assert torch.equal(copy, layer.weight.to(torch.bfloat16))


def test_what_is_shared_rests_or_runs_outside_of_autocast_is_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.tied, self.also, self.exact, self.idle = (
                nn.Linear(4, 4) for _ in range(5)
            )
            self.also.weight = self.tied.weight

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                x = self.exact(x.float())
            return self.also(self.tied(self.plain(x)))

    model = Odd()
    with torch.autocast("cpu", torch.bfloat16):
        found = matrices_of(model, lambda: model(torch.randn(2, 4)))
    assert found == [model.plain]
    model.plain.requires_grad_(False)
    assert Matrices(found).layers == []


def pictures():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(24, 3, 8, 8)}


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_a_live_teacher_answers_as_autocast_would(kind):
    if kind == "llama":
        model = causal(CONFIGS["llama"])
    elif kind == "bert":
        model = random_model(bert_config())
    else:
        from transformers import ViTForImageClassification

        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                image_size=8, patch_size=4,
            )
        )  # fmt: skip
    batch = Rows().batch(range(24))
    if kind == "vit":
        batch = type(batch)(
            inputs=pictures(), labels=torch.zeros(24, dtype=torch.int64),
            mask=torch.ones(24, dtype=torch.bool), example_ids=batch.example_ids,
        )  # fmt: skip
    model.eval()
    with torch.no_grad():
        wanted = Observer(model, precision="bf16")(batch, LOGITS).logits
    head = model.get_output_embeddings() if kind == "llama" else None
    teacher = LiveTeacher(model, "t", precision="bf16")
    for _ in range(2):
        assert torch.equal(teacher.signal(batch, LOGITS).logits, wanted)
    kinds = {m.weight.dtype for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    assert kinds == {torch.bfloat16}
    if head is not None:
        assert head.weight.dtype == torch.float32
        teacher.leave_head(batch)  # behind the rounding
        said = teacher.signal(batch, LOGITS)
        assert said.logits is None
        product = said.head.logits(said.head_input)
        assert float((product - wanted).norm() / wanted.norm()) < 1e-2
