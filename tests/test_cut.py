"""Cutting: every student is a prefix of the sorted teacher, and is exactly what it should be."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
)

from limbeck.architecture.axes import Axis, Group, Member, find_axis
from limbeck.architecture.blank import NothingDrawn
from limbeck.architecture.cut import (
    build_student,
    check_shape,
    cut,
    full_shape,
    keep_layers,
    shape_parameters,
    sort_units,
    student_config,
    usable,
)
from limbeck.architecture.fields import ratio_of
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof_layers import skipped
from limbeck.errors import AxisError
from limbeck.types import Shape
from tiny_models import bert_axes, bert_config, build, logits, random_model

SMALL = Shape({"hidden": 16, "heads": 2, "ffn": 20}, (0, 2))


@pytest.fixture
def teacher():
    return random_model(bert_config())


def scores(seed=0):
    torch.manual_seed(seed)
    return {g.name: torch.rand(g.units) for axis in bert_axes() for g in axis.groups}


def student(state, shape, config=None):
    return build_student(config or bert_config(), build, bert_axes(), shape, state)


def test_the_teachers_shape_is_the_teacher_bitwise(teacher):
    shape = full_shape(bert_axes())
    assert shape == Shape({"hidden": 32, "heads": 4, "ffn": 48, "vocab": 99}, (0, 1, 2))
    same = student(teacher.state_dict(), shape)
    assert torch.equal(logits(same), logits(teacher))
    assert not same.training


def test_sorting_changes_no_output(teacher):
    state = sort_units(teacher.state_dict(), bert_axes(), scores())
    other = student(state, full_shape(bert_axes()))
    name = "classifier.weight"
    assert not torch.equal(state[name], teacher.state_dict()[name])
    assert torch.equal(state["classifier.bias"], teacher.classifier.bias)
    torch.testing.assert_close(logits(other), logits(teacher), rtol=1e-4, atol=1e-5)


def test_sorting_puts_the_largest_scores_first_and_keeps_the_order_of_ties(teacher):
    given = scores()
    given["ffn.0"] = torch.tensor([1.0, 3.0, 1.0, 2.0]).repeat(12)
    state = sort_units(teacher.state_dict(), bert_axes(), given)
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    plain = teacher.state_dict()[name]
    first = plain.view(12, 4)[:, 1]
    last = plain.view(12, 4)[:, [0, 2]].flatten()
    assert torch.equal(state[name][:12], first)
    assert torch.equal(state[name][24:], last)


def test_sorting_needs_a_score_for_every_unit(teacher):
    for change in ({"ffn.1": torch.rand(3)}, {"ffn.1": None}):
        given = {k: v for k, v in {**scores(), **change}.items() if v is not None}
        with pytest.raises(AxisError, match=r"ffn\.1.*48"):
            sort_units(teacher.state_dict(), bert_axes(), given)


def test_cut_ffn_equals_zeroed(teacher):
    kept = 20
    cut_model = student(teacher.state_dict(), Shape({"ffn": kept}, (0, 1, 2)))
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            layer.output.dense.weight[:, kept:] = 0  # what these units say is not heard
    torch.testing.assert_close(logits(cut_model), logits(teacher), rtol=1e-5, atol=1e-6)


def test_cut_layers_equal_skipped(teacher):
    plain = logits(teacher)
    for kept in ((1, 2), (0, 1), (0, 2), (1,)):
        with skipped(teacher, *(f"bert.encoder.layer.{i}" for i in {0, 1, 2} - {*kept})):
            expected = logits(teacher)
        assert torch.equal(logits(student(teacher.state_dict(), Shape({}, kept))), expected)
        assert not torch.allclose(expected, plain, rtol=1e-3)


def test_cut_heads_are_the_first_heads(teacher):
    """Heads move only with the width; the parameters themselves are checked, by hand."""
    small = student(teacher.state_dict(), SMALL).state_dict()
    big = teacher.state_dict()
    for new, old in enumerate(SMALL.layers):
        at = "bert.encoder.layer.{}.attention."
        query = big[at.format(old) + "self.query.weight"]
        assert torch.equal(small[at.format(new) + "self.query.weight"], query[:16, :16])
        out = big[at.format(old) + "output.dense.weight"]
        assert torch.equal(small[at.format(new) + "output.dense.weight"], out[:16, :16])
    assert torch.equal(small["classifier.weight"], big["classifier.weight"][:, :16])
    assert torch.equal(small["classifier.bias"], big["classifier.bias"])


def test_saved_and_loaded_student_is_the_same(teacher, tmp_path):
    state = sort_units(teacher.state_dict(), bert_axes(), scores())
    small = student(state, SMALL)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.hidden_size == 16
    assert torch.equal(logits(loaded), logits(small))


def test_cut_gives_views_and_gradients_flow_into_the_whole(teacher):
    state = {name: t.detach().requires_grad_() for name, t in teacher.state_dict().items()}
    views = cut(state, bert_axes(), SMALL)
    for name, view in views.items():
        origin = name.replace("layer.1.", "layer.2.")  # layer 2 is the second one kept
        assert view.untyped_storage().data_ptr() == state[origin].untyped_storage().data_ptr()
    skeleton = build(student_config(bert_config(), bert_axes(), SMALL)).eval()
    inputs = example_inputs(skeleton, skeleton.config)
    functional_call(skeleton, views, (), inputs).logits.square().sum().backward()
    grad = state["bert.encoder.layer.2.output.dense.weight"].grad
    assert grad[:16, :20].abs().sum() > 0
    assert grad[16:].abs().sum() == 0
    assert grad[:, 20:].abs().sum() == 0
    assert state["bert.encoder.layer.1.output.dense.weight"].grad is None


def test_the_count_is_exact_and_no_weight_is_made(teacher):
    for shape in (SMALL, full_shape(bert_axes()), Shape({"ffn": 1}, (1,))):
        count = shape_parameters(bert_config(), build, bert_axes(), shape)
        assert count == sum(p.numel() for p in student(teacher.state_dict(), shape).parameters())


def test_student_config_changes_only_its_fields():
    config = bert_config()
    before = config.to_dict()
    new = student_config(config, bert_axes(), SMALL).to_dict()
    assert config.to_dict() == before
    differ = {name: new[name] for name in new if new[name] != before[name]}
    assert differ == {
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20,
        "num_hidden_layers": 2,
    }  # fmt: skip


def test_per_layer_lists_follow_the_layers():
    config = LlamaConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    layers = Axis(name="layers", fields={"num_hidden_layers": 1}, size=3, pattern="l.{}",
                  proved=True)  # fmt: skip
    new = student_config(config, [layers], Shape({}, (1, 2)))
    assert new.layer_types == ["sliding_attention", "full_attention"]
    assert len(config.layer_types) == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape({"hidden": 20, "heads": 2}, (0, 1, 2)), "multiples of 8"),
        (Shape({"hidden": 16}, (0, 1, 2)), r"hidden = 8 \* heads"),
        (Shape({"heads": 2}, (0, 1, 2)), r"hidden = 8 \* heads"),
        (Shape({"hidden": 40, "heads": 5}, (0, 1, 2)), "40 cannot be"),
        (Shape({"ffn": 0}, (0, 1, 2)), "0 cannot be"),
        (Shape({"fnn": 8}, (0, 1, 2)), "no such axis"),
        (Shape({"type_vocab_size": 1}, (0, 1, 2)), "lookup table"),
        (Shape({}, ()), "layers"),
        (Shape({}, (1, 0)), "ascending"),
        (Shape({}, (0, 0, 1)), "each once"),
        (Shape({}, (0, 3)), "0 to 2"),
    ],
)
def test_impossible_shapes_are_refused(teacher, shape, message):
    for use in (
        lambda: check_shape(bert_axes(), shape),
        lambda: cut(teacher.state_dict(), bert_axes(), shape),
        lambda: student_config(bert_config(), bert_axes(), shape),
    ):
        with pytest.raises(AxisError, match=message):
            use()


@pytest.mark.parametrize("name", ["hidden", "heads", "ffn", "layers"])
def test_nothing_is_cut_on_faith(name):
    axes = [replace(a, proved=a.proved and a.name != name, reason="why not") for a in bert_axes()]
    with pytest.raises(AxisError, match="why not"):
        check_shape(axes, SMALL)
    left = {axis.name for axis in usable(axes)}
    lost = {"hidden", "heads"} if name in ("hidden", "heads") else {name}
    assert left == {"hidden", "heads", "ffn", "layers", "vocab"} - lost
    check_shape(axes, full_shape(axes))


def test_the_most_important_layers_in_their_order():
    assert keep_layers(torch.tensor([0.5, 0.1, 0.9, 0.2]), 2) == (0, 2)
    assert keep_layers(torch.tensor([0.5, 0.1, 0.9, 0.2]), 3) == (0, 2, 3)
    assert keep_layers(torch.tensor([1.0, 1.0, 1.0]), 2) == (0, 1)
    for n in (0, 4):
        with pytest.raises(AxisError, match="1 to 3"):
            keep_layers(torch.ones(3), n)


def test_a_weight_that_was_never_set_is_caught(teacher):
    state = dict(teacher.state_dict())
    missing = {name: t for name, t in state.items() if name != "bert.pooler.dense.bias"}
    with pytest.raises(AxisError, match=r"bert\.pooler\.dense\.bias was never initialised"):
        student(missing, SMALL)
    holed = {**state, "classifier.bias": torch.full((5,), torch.nan)}
    with pytest.raises(AxisError, match=r"classifier\.bias was never initialised: it holds NaN"):
        student(holed, SMALL)
    with pytest.raises(AxisError, match=r"extra\.weight has no place"):
        student({**state, "extra.weight": torch.ones(2)}, SMALL)
    with pytest.raises(AxisError, match="do not fit"):
        student({**state, "classifier.bias": torch.ones(7)}, SMALL)


def test_building_a_student_leaves_the_random_state_alone(teacher):
    before = torch.get_rng_state()
    student(teacher.state_dict(), SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_overwritten_are_not_drawn():
    before = torch.get_rng_state()
    with NothingDrawn():
        model = build(bert_config())
        drawn = torch.empty(8).normal_()  # no parameter
    assert not torch.equal(torch.get_rng_state(), before)
    assert len(drawn.unique()) == 8
    position_ids = model.bert.embeddings.position_ids
    assert torch.equal(position_ids, torch.arange(position_ids.numel()).view(1, -1))
    torch.set_rng_state(before)
    with NothingDrawn():
        build(bert_config())
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights_stay_tied():
    make = AutoModelForMaskedLM.from_config
    config = bert_config()
    axes = [replace(a, proved=a.name in ("hidden", "heads", "ffn", "layers"))
            for a in find_axes(config, make)]  # fmt: skip
    torch.manual_seed(0)
    model = make(config).eval()
    groups = [g for axis in usable(axes) for g in axis.groups]
    state = sort_units(model.state_dict(), axes, {g.name: torch.rand(g.units) for g in groups})
    table, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    assert state[table] is state[head]
    views = cut(state, axes, SMALL)
    assert views[table] is views[head]
    small = build_student(config, make, axes, SMALL, state)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    without_alias = {name: tensor for name, tensor in state.items() if name != head}
    again = build_student(config, make, axes, SMALL, without_alias)
    assert torch.equal(logits(again), logits(small))


def test_packed_segments_are_cut_one_by_one():
    """Three heads of two channels in [q | k | v], and one channel that stays."""
    packed = Member("qkv", 0, block=2, segments=(1, 1, 1), tail=1)
    axis = Axis(name="heads", fields={"n": 1}, size=3, groups=(Group("heads", 3, (packed,)),),
                proved=True)  # fmt: skip
    state = {"qkv": torch.arange(19)}
    (small,) = cut(state, [axis], Shape({"heads": 2}, ())).values()
    assert small.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18]
    (ordered,) = sort_units(state, [axis], {"heads": torch.tensor([0.0, 1, 2])}).values()
    assert ordered.tolist() == [4, 5, 2, 3, 0, 1, 10, 11, 8, 9, 6, 7, 16, 17, 14, 15, 12, 13, 18]


def test_a_model_without_layers_has_none_to_choose():
    axis = Axis(name="ffn", fields={"n": 1}, size=4, proved=True,
                groups=(Group("ffn", 4, (Member("weight", 0),)),))  # fmt: skip
    assert full_shape([axis]) == Shape({"ffn": 4}, ())
    views = cut(nn.Linear(3, 4, bias=False).state_dict(), [axis], Shape({"ffn": 2}, ()))
    assert views["weight"].shape == (2, 3)
    with pytest.raises(AxisError, match="no layers"):
        cut({}, [axis], Shape({}, (0,)))
    assert find_axis([axis], "layers") is None


def test_a_ratio_gives_the_width_it_was_made_from():
    """Code takes int(ratio * width): 29 of 100 would be 28."""
    assert int(29 / 100 * 100) == 28
    for width in (24, 96, 100, 384):
        for kept in range(1, width):
            assert int(ratio_of(kept / width) * width) == kept
