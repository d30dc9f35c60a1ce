"""Axes: found exactly, proved by permutation, and refused where they are wrong."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
)

from limbeck.architecture.axes import (
    Axis,
    Group,
    Member,
    axes_from_json,
    axes_to_json,
    find_axis,
    layer_of,
    permuted,
)
from limbeck.architecture.probe import find_axes
from limbeck.architecture.twins import Bench, find_groups
from limbeck.errors import AxisError
from tiny_models import bert_axes, bert_config, build, logits, random_model

LAYERS = range(3)
WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
TEXT = {"vocab_size": 99, "max_position_embeddings": 40, "num_labels": 5, "intermediate_size": 48}


def members(group):
    return {(m.parameter, m.dim, m.block) for m in group.members}


def expected_groups():
    """BERT by hand: what moves with what, as (parameter, dimension, block)."""
    top, residual, groups = "bert.embeddings", set(), {}
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        residual.add((f"{top}.{table}.weight", 1, 1))
    residual |= {(f"{top}.LayerNorm.{kind}", 0, 1) for kind in ("weight", "bias")}
    for i in LAYERS:
        at = f"bert.encoder.layer.{i}"
        for into in ("attention.self.query", "attention.self.key", "attention.self.value"):
            residual.add((f"{at}.{into}.weight", 1, 1))
        residual.add((f"{at}.intermediate.dense.weight", 1, 1))
        for out in ("attention.output", "output"):
            residual.add((f"{at}.{out}.dense.weight", 0, 1))
            residual.add((f"{at}.{out}.dense.bias", 0, 1))
            residual |= {(f"{at}.{out}.LayerNorm.{kind}", 0, 1) for kind in ("weight", "bias")}
        groups[f"ffn.{i}"] = {
            (f"{at}.intermediate.dense.weight", 0, 1),
            (f"{at}.intermediate.dense.bias", 0, 1),
            (f"{at}.output.dense.weight", 1, 1),
        }
        groups[f"heads.{i}"] = {
            (f"{at}.attention.self.{part}.{kind}", 0, 8)
            for part in ("query", "key", "value")
            for kind in ("weight", "bias")
        } | {(f"{at}.attention.output.dense.weight", 1, 8)}
    residual.add(("bert.pooler.dense.weight", 1, 1))
    groups["hidden"] = residual
    groups["hidden.bert.pooler.dense"] = {
        ("bert.pooler.dense.weight", 0, 1),
        ("bert.pooler.dense.bias", 0, 1),
        ("classifier.weight", 1, 1),
    }
    return groups


def test_bert_is_found_exactly():
    axes = find_axes(bert_config(), build)
    found = {g.name: members(g) for axis in axes if not axis.labels for g in axis.groups}
    assert found == expected_groups()
    by_name = {axis.name: axis for axis in axes}
    assert [a.name for a in axes[:4]] == ["hidden", "heads", "ffn", "layers"]
    hidden, heads, ffn, layers = axes[:4]
    assert (hidden.size, hidden.granularity, hidden.fields) == (32, 8, {"hidden_size": 1})
    assert hidden.coupled == {"heads": 8}
    assert (heads.size, heads.fields) == (4, {"num_attention_heads": 1})
    assert (ffn.size, ffn.fields) == (48, {"intermediate_size": 1})
    assert (layers.size, layers.pattern) == (3, "bert.encoder.layer.{}")
    assert not any(axis.proved for axis in axes)
    vocab = by_name["vocab"]
    assert (vocab.size, vocab.fields, vocab.labels) == (99, {"vocab_size": 1}, True)
    assert members(vocab.groups[0]) == {("bert.embeddings.word_embeddings.weight", 0, 1)}
    tables = {"max_position_embeddings", "type_vocab_size"}
    assert {*by_name} == {"hidden", "heads", "ffn", "layers", "vocab"} | tables
    assert all("lookup table" in by_name[name].reason for name in tables)


def test_finding_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    find_axes(bert_config(), build)
    assert torch.equal(torch.get_rng_state(), before)


def test_permuted_weights_are_other_weights_with_the_same_outputs():
    model = random_model(bert_config())
    groups = [g for axis in bert_axes() if not axis.labels for g in axis.groups]
    orders = {group.name: torch.randperm(group.units) for group in groups}
    moved = permuted(model.state_dict(), groups, orders)
    other = random_model(bert_config(), seed=1)
    other.load_state_dict(moved)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(moved[name], model.state_dict()[name])
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_tied_weights_move_together():
    """The masked-language head reads the embedding table: both its dimensions lie on `hidden`."""
    config = bert_config()
    auto = AutoModelForMaskedLM
    hidden = find_axis(find_axes(config, auto.from_config), "hidden")
    assert [group.name for group in hidden.groups] == ["hidden"]
    names = {m.parameter for m in hidden.groups[0].members}
    assert {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"} <= names
    transform = [m.dim for m in hidden.groups[0].members if "transform.dense.weight" in m.parameter]
    assert sorted(transform) == [0, 1]


def test_wide_models_are_probed_on_a_narrow_copy():
    config = bert_config()
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 768, 12, 3072
    config.num_hidden_layers, config.vocab_size = 6, 30522
    axes = find_axes(config, build)
    assert [(a.name, a.size) for a in axes[:4]] == [
        ("hidden", 768), ("heads", 12), ("ffn", 3072), ("layers", 6)
    ]  # fmt: skip
    assert {m.block for group in axes[1].groups for m in group.members} == {64}
    assert len(axes[0].groups[0].members) == 3 + 2 + 6 * 12 + 1


def test_a_model_that_cannot_be_fed_is_an_error():
    class Ears(nn.Module):
        main_input_name = "input_values"

        def __init__(self, config):
            super().__init__()
            self.inner = nn.Linear(config.hidden_size, 2)

    with pytest.raises(AxisError, match="input_values"):
        find_axes(bert_config(), Ears)
    with pytest.raises(AxisError, match="does not build"):
        find_axes(bert_config(), lambda config: 1 / 0)


def test_json_round_trip():
    packed = Member("x.weight", 0, 4, (3, 1, 1), 2)
    odd = Axis(name="odd", fields={"a": 1, "b": 4}, size=3, groups=(Group("g", 3, (packed,)),))
    axes = (*bert_axes(), odd)
    assert axes_from_json(axes_to_json(axes)) == axes
    for text in ("", "{}", '[{"name": 1}]', "[3]"):
        with pytest.raises(AxisError):
            axes_from_json(text)


def test_members_with_segments_and_a_tail():
    """[q | k | v] with two query heads a key/value head, then three channels that never move."""
    member = Member("qkv", 0, block=2, segments=(2, 1, 1), tail=3)
    assert member.width(2) == 2 * 2 * 4 + 3
    q, k, v, tail = [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18]
    swapped = member.channels(torch.tensor([1, 0])).tolist()
    assert swapped == [*q[4:], *q[:4], *k[2:], *k[:2], *v[2:], *v[:2], *tail]
    kept = [c for start, length in member.pieces(2, 1) for c in range(start, start + length)]
    assert kept == [*q[:4], *k[:2], *v[:2], *tail]


def test_layer_names():
    assert layer_of("encoder.layer.{}", "encoder.layer.12.x.weight") == (12, "x.weight")
    assert layer_of("encoder.layer.{}", "encoder.layers.1.x") is None
    assert layer_of("encoder.layer.{}", "pooler.weight") is None
    assert layer_of("", "encoder.layer.1.x") is None


class Plain(nn.Module):
    """Two layers with a ReLU between, and a constant that is added to nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(8, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.two(torch.relu(self.one(x)) * self.scale)


def test_twins_find_a_buffer_and_tell_what_is_silent():
    bench = Bench(Plain(), {"x": torch.randn(5, 6)})
    dims = [("one.weight", 0), ("one.bias", 0), ("two.weight", 1), ("scale", 0), ("unused", 0)]
    before = {name: tensor.clone() for name, tensor in bench.tensors.items()}
    found = find_groups(bench, {dim: Member(*dim) for dim in dims}, 8)
    assert found.groups == [frozenset(dims[:4])]
    assert (found.bound, found.silent) == (set(), {("unused", 0)})
    assert all(torch.equal(before[name], bench.tensors[name]) for name in before)


def test_twins_refuse_what_the_input_tells_apart():
    bench = Bench(Plain(), {"x": torch.randn(5, 6)})
    found = find_groups(bench, {("one.weight", 1): Member("one.weight", 1)}, 6)
    assert found.groups == []
    assert found.bound == {("one.weight", 1)}
