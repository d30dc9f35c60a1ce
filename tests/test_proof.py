"""Proof: true axes pass, wrong ones are refused, and the model is left as it was."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from limbeck.architecture.axes import Axis, Group, Member, find_axis
from limbeck.architecture.cut import check_shape
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.architecture.proof_layers import skipped
from limbeck.errors import AxisError
from limbeck.types import Shape
from tiny_models import bert_axes, bert_config, build, logits, proved, random_model


def test_bert_is_proved_and_left_bitwise_as_it_was():
    model = random_model(bert_config()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    axes = proved(model, bert_axes())
    assert {name for name, axis in axes.items() if axis.proved} == {
        "hidden", "heads", "ffn", "layers", "vocab"
    }  # fmt: skip
    assert "cut to hidden=16, heads=2 equals zeroed" in axes["hidden"].reason
    assert "cut together with hidden" in axes["heads"].reason
    assert "cut to ffn=24 equals zeroed" in axes["ffn"].reason
    assert "dropped equals skipped" in axes["layers"].reason
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def broken(name, change):
    """The axes of BERT, one of them with its first group changed."""
    axes = []
    for axis in bert_axes():
        if axis.name == name:
            axis = replace(axis, groups=(change(axis.groups[0]), *axis.groups[1:]))
        axes.append(axis)
    return tuple(axes)


@pytest.mark.parametrize("axis", ["hidden", "heads", "ffn"])
@pytest.mark.parametrize("at", [0, -1])
def test_an_axis_with_a_missing_member_is_refused(axis, at):
    def without(group):
        return replace(group, members=tuple(m for m in group.members if m != group.members[at]))

    found = proved(random_model(bert_config()), broken(axis, without))[axis]
    assert not found.proved
    assert "changes the outputs" in found.reason


def test_a_member_that_no_output_shows_is_missed_when_cut():
    """A key's bias does not change the softmax, so no permutation can tell; its size does."""

    def without_key_bias(group):
        rest = tuple(m for m in group.members if not m.parameter.endswith("key.bias"))
        return replace(group, members=rest)

    axes = proved(random_model(bert_config()), broken("heads", without_key_bias))
    assert not axes["hidden"].proved
    assert not axes["heads"].proved
    assert "key.bias" in axes["hidden"].reason + axes["heads"].reason


def test_an_axis_with_a_stranger_is_refused():
    def with_labels(group):
        return replace(group, units=5, members=(*group.members, Member("classifier.weight", 0)))

    found = proved(random_model(bert_config()), broken("ffn", with_labels))["ffn"]
    assert not found.proved
    assert "units" in found.reason


@pytest.mark.parametrize("block", [4, 16])
def test_a_wrong_block_size_is_refused(block):
    """Half a head is no unit. Two heads are one only as long as nobody asks for the finer one."""

    def reblocked(group):
        rows = tuple(replace(m, block=block) for m in group.members)
        return replace(group, units=32 // block, members=rows)

    axes = [
        replace(a, size=32 // block, groups=tuple(map(reblocked, a.groups)))
        if a.name == "heads"
        else replace(a, coupled={"heads": block}, granularity=block) if a.coupled else a
        for a in bert_axes()
    ]  # fmt: skip
    found = proved(random_model(bert_config()), tuple(axes))
    assert not found["heads"].proved
    assert not found["hidden"].proved  # what is coupled to it falls with it
    assert ("smaller units" if block == 16 else "changes the outputs") in found["heads"].reason
    assert found["ffn"].proved


def test_a_count_that_regroups_the_same_tensors_is_refused():
    """hidden=16 with 4 heads loads strictly, its units can be permuted, and computes something
    else than the two heads that were cut."""
    hidden, heads, *_ = bert_axes()
    false = replace(hidden, coupled={}, groups=hidden.groups + heads.groups)
    found = proved(random_model(bert_config()), (false,))["hidden"]
    assert not found.proved
    assert "hidden=16 differs from zeroing the same units" in found.reason


class Toy(nn.Module):
    """One row of units, and what else depends on how many there are."""

    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.one, self.two = nn.Linear(6, width), nn.Linear(width, 3)
        if config.kind == "layer norm":
            self.norm = nn.LayerNorm(width)
        elif config.kind == "group norm":
            self.norm = nn.GroupNorm(2, width)
        self.scale = width**-0.5 if config.kind == "scale" else 1.0
        self.faint = 1e-6 if config.kind == "faint" else 1.0

    def forward(self, pixel_values):
        x = torch.relu(self.one(pixel_values.flatten(1)))
        if hasattr(self, "norm"):
            x = self.norm(x)
        if self.config.kind == "mean":
            x = x - x.mean(1, keepdim=True)
        return self.two(x * self.scale) * self.faint + pixel_values.flatten(1)[:, :3]


class Stubborn(PretrainedConfig):
    """Its width is always twice another number."""

    half: int = 4

    def __init__(self, half=4, **kwargs):
        super().__init__(half=half, **kwargs)
        self.hidden_size = 2 * half


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("plain", "cut to width=4 equals zeroed"),
        ("layer norm", "norms over what is left"),
        ("scale", "with scale computed from the smaller size"),
        ("mean", "differs from zeroing"),
        ("group norm", "norm takes other statistics"),
        ("stubborn", "is 4 in the smaller model, and 8 once its config is read"),
    ],
)
def test_a_cut_is_the_full_model_with_these_units_zeroed(kind, reason):
    """Halves of the channels are units under a norm of two groups, until one half is cut."""
    make = Stubborn if kind == "stubborn" else PretrainedConfig
    config = make(hidden_size=8, kind=kind)
    torch.manual_seed(0)
    model = Toy(config).eval()
    names = [("one.weight", 0), ("one.bias", 0), ("two.weight", 1)]
    names += [("norm.weight", 0), ("norm.bias", 0)] if "norm" in kind else []
    block, units = (4, 2) if kind == "group norm" else (1, 8)
    group = Group("width", units, tuple(Member(n, d, block) for n, d in names))
    axis = Axis(name="width", fields={"hidden_size": 1}, size=8, granularity=block,
                groups=(group,))  # fmt: skip
    inputs = {"pixel_values": torch.randn(5, 6)}
    (found,) = prove_axes(model, config, Toy, [axis], inputs, seed=0)
    assert reason in found.reason
    assert found.proved == (kind in ("plain", "layer norm", "scale"))


@pytest.mark.parametrize("whole", [True, False])
def test_an_effect_that_single_precision_hides_is_looked_at_in_double(whole):
    """A wrong permutation of these units changes the outputs by a millionth."""
    config = PretrainedConfig(hidden_size=8, kind="faint")
    torch.manual_seed(0)
    model = Toy(config).eval()
    names = [("one.weight", 0), ("two.weight", 1)] + [("one.bias", 0)] * whole
    group = Group("width", 8, tuple(Member(n, d) for n, d in names))
    axis = Axis(name="width", fields={"hidden_size": 1}, size=8, groups=(group,))
    inputs = {"pixel_values": torch.randn(5, 6)}
    (found,) = prove_axes(model, config, Toy, [axis], inputs, seed=0)
    assert found.proved == whole
    assert whole or "not all of their dimensions are known" in found.reason


def test_layers_that_differ_from_skipped_are_pinned():
    class Counting(nn.Module):
        """Scales by the layer's own number, which renumbering changes."""

        def __init__(self, inner, number):
            super().__init__()
            self.inner, self.number = inner, number

        def forward(self, hidden, *args, **kwargs):
            return self.inner(hidden * (1 + self.number), *args, **kwargs)

    def numbered(config):
        model = build(config)
        for i, layer in enumerate(model.bert.encoder.layer):
            model.bert.encoder.layer[i] = Counting(layer, i)
        return model.eval()

    torch.manual_seed(0)
    model = numbered(bert_config())
    layers = replace(find_axis(bert_axes(), "layers"), proved=False)
    inputs = example_inputs(model, model.config)
    (found,) = prove_axes(model, model.config, numbered, [layers], inputs, seed=0)
    assert (found.proved, found.pinned) == (True, (0, 1))  # nothing comes after the last one
    assert "dropping layer 0 differs from skipping it" in found.reason
    with pytest.raises(AxisError, match="layer 0 cannot go"):
        check_shape([found], Shape({}, (1, 2)))


def test_one_layer_cannot_be_dropped():
    config = bert_config()
    config.num_hidden_layers = 1
    axes = proved(random_model(config), find_axes(config, build))
    assert axes["hidden"].proved
    assert axes["layers"].reason == "one layer only: nothing to drop"


def test_skipping_hands_the_input_through():
    model = random_model(bert_config())
    plain = logits(model)
    with skipped(model, "bert.encoder.layer.1"):
        without = logits(model)
    assert not torch.allclose(without, plain)
    assert torch.equal(logits(model), plain)
    del model.bert.encoder.layer[1]
    model.config.num_hidden_layers = 2
    assert torch.equal(logits(model), without)
