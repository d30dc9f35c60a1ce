"""Importance: Taylor against slow finite differences, planted units, layers, and its file."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from limbeck.architecture.axes import find_axis
from limbeck.architecture.cut import build_student, full_shape, keep_layers, sort_units
from limbeck.architecture.importance import importance, load_importance
from limbeck.architecture.proof_layers import skipped
from limbeck.architecture.resuming import Layers
from limbeck.errors import RecipeError
from limbeck.progress import Silent
from limbeck.recipe import ImportanceSpec
from limbeck.types import Batch, Shape
from tiny_models import bert_axes, bert_config, build, logits, random_model


@pytest.fixture(scope="module")
def teacher():
    return random_model(bert_config())


def axes():
    return [axis for axis in bert_axes() if axis.proved and not axis.labels]


def batches(count=2, size=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        Batch(
            inputs={"input_ids": torch.randint(5, 99, (size, 7), generator=random)},
            labels=torch.randint(0, 5, (size,), generator=random),
            mask=torch.ones(size, dtype=torch.bool),
            example_ids=torch.arange(size) + size * i,
        )
        for i in range(count)
    ]


def loss_of(model, batch):
    return cross_entropy(model(**batch.inputs).logits, batch.labels)


def gate_derivative(model, group, unit, batch, step=1e-5):
    """d loss / d gate, by central differences, of a gate on all weights of one unit."""
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def loss(gate):
        values = dict(state)
        for member in group.members:
            keep = torch.ones(values[member.parameter].shape[member.dim], dtype=torch.float64)
            keep[unit * member.block : (unit + 1) * member.block] = gate
            shape = [1] * values[member.parameter].dim()
            shape[member.dim] = -1
            values[member.parameter] = values[member.parameter] * keep.view(shape)
        with torch.no_grad():
            out = torch.func.functional_call(model, values, (), dict(batch.inputs)).logits
            return cross_entropy(out, batch.labels).item()

    return (loss(1 + step) - loss(1 - step)) / (2 * step)


def test_units_against_finite_differences():
    model = random_model(bert_config()).double()
    given = batches()
    found = importance(model, axes(), given, Silent())
    for axis in axes():
        for group in axis.groups:
            for unit in (0, group.units // 2, group.units - 1):
                slopes = [gate_derivative(model, group, unit, batch) for batch in given]
                expected = sum(slope**2 for slope in slopes) / len(slopes)
                assert found.units[group.name][unit].item() == pytest.approx(
                    expected, rel=1e-3, abs=1e-10
                )


def test_scores_are_means_over_batches_never_running_sums(teacher):
    one = importance(teacher, axes(), batches(1), Silent())
    thrice = importance(teacher, axes(), batches(1) * 3, Silent())
    for name, score in one.units.items():
        torch.testing.assert_close(thrice.units[name], score)
    torch.testing.assert_close(thrice.layers, one.layers, rtol=1e-4, atol=1e-6)


def test_every_unit_has_a_score_that_is_never_negative(teacher):
    found = importance(teacher, axes(), batches(), Silent())
    expected = {group.name: group.units for axis in axes() for group in axis.groups}
    assert {name: len(score) for name, score in found.units.items()} == expected
    assert all((score >= 0).all() and score.max() > 0 for score in found.units.values())


def planted(change):
    model = random_model(bert_config())
    with torch.no_grad():
        change(model.bert.encoder.layer[1])
    found = importance(model, axes(), batches(), Silent())
    return model, found, sort_units(model.state_dict(), axes(), found.units)


def test_a_unit_that_nobody_hears_scores_zero_and_ends_last():
    def silence(layer):
        layer.output.dense.weight[:, 11] = 0
        layer.attention.output.dense.weight[:, 8:16] = 0  # head 1

    model, found, state = planted(silence)
    assert found.units["ffn.1"][11] == 0
    assert (found.units["ffn.1"] == 0).sum() == 1
    assert found.units["heads.1"].argmin() == 1
    assert found.units["heads.1"][1] == 0
    at = "bert.encoder.layer.1."
    plain = model.state_dict()[at + "intermediate.dense.weight"][11]
    residual = torch.argsort(found.units["hidden"], descending=True, stable=True)
    assert torch.equal(state[at + "intermediate.dense.weight"][-1], plain[residual])
    assert (state[at + "attention.output.dense.weight"][:, -8:] == 0).all()
    # so one unit and one head fewer is the same function
    shape = Shape({"ffn": 47}, (0, 1, 2))
    others = {name: t for name, t in found.units.items() if not name.startswith("ffn")}
    others |= {f"ffn.{i}": found.units["ffn.1"] for i in range(3)}
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, 11] = 0
    state = sort_units(model.state_dict(), axes(), others)
    student = build_student(bert_config(), build, axes(), shape, state)
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=1e-5)


def test_a_unit_that_carries_the_layer_comes_first():
    def quieten(layer):
        layer.output.dense.weight[:, torch.arange(48) != 7] *= 0.01
        layer.intermediate.dense.bias[7] = 3  # it is awake on every input

    model, found, state = planted(quieten)
    assert found.units["ffn.1"].argmax() == 7
    name = "bert.encoder.layer.1.intermediate.dense.bias"
    assert state[name][0] == model.state_dict()[name][7] == 3


def test_layers_are_scored_by_the_loss_without_them(teacher):
    given = batches()
    found = importance(teacher, axes(), given, Silent())
    shape = full_shape(axes())
    with torch.no_grad():
        plain = sum(loss_of(teacher, batch) for batch in given) / len(given)
        for dropped in range(3):
            kept = tuple(i for i in range(3) if i != dropped)
            state = teacher.state_dict()
            student = build_student(bert_config(), build, axes(), Shape(shape.sizes, kept), state)
            without = sum(loss_of(student, batch) for batch in given) / len(given)
            rise = (without - plain).item()
            assert found.layers[dropped].item() == pytest.approx(rise, rel=1e-3, abs=1e-5)


class _Layer(nn.Module):
    """Adds to what it is given; `beside` is told too, where there is one."""

    def __init__(self, beside: list | None) -> None:
        super().__init__()
        self.linear, self.beside, self.runs = nn.Linear(4, 4), beside, 0

    def forward(self, x):
        self.runs += 1
        found = self.linear(x).tanh()
        if self.beside is not None:
            self.beside.append(found)
            found = sum(self.beside)
        return x + found


class _Stack(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.beside = [] if shared else None
        self.layers = nn.ModuleList(_Layer(self.beside) for _ in range(5))

    def forward(self, x):
        if self.beside is not None:
            self.beside.clear()
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("shared", "runs"), [(False, 5 + 3 + (5 + 4 + 3 + 2 + 1)), (True, 5 + 3 + 25)]
)
def test_layers_before_a_skipped_one_are_not_run_again_unless_they_do_more(shared, runs):
    model = _Stack(shared)
    x = torch.randn(6, 4)
    batch = Batch(inputs={"x": x}, labels=torch.zeros(6), mask=torch.ones(6), example_ids=x)

    def loss(batch):
        return model(**batch.inputs).square().mean()

    layers = Layers(model, [f"layers.{i}" for i in range(5)])
    with layers.open():
        found = layers.rises(loss, batch)
    assert sum(layer.runs for layer in model.layers) == runs
    with torch.no_grad():
        plain = loss(batch)
        for at in range(5):
            with skipped(model, f"layers.{at}"):
                assert found[at] == pytest.approx(float(loss(batch) - plain), abs=1e-6)


def test_a_layer_that_does_nothing_is_dropped_first():
    model = random_model(bert_config())
    block = model.bert.encoder.layer[1]
    with torch.no_grad():
        for part in (block.attention.output, block.output):
            part.dense.weight.zero_()
            part.dense.bias.zero_()
        # what comes in is normed already, so that norming it again is the identity
        for norm in (model.bert.encoder.layer[0].output.LayerNorm, block.output.LayerNorm,
                     block.attention.output.LayerNorm):  # fmt: skip
            norm.weight.fill_(1)
            norm.bias.zero_()
    found = importance(model, axes(), batches(), Silent())
    assert found.layers[1].abs() < 1e-4
    labelled = [
        Batch(inputs=b.inputs, labels=model(**b.inputs).logits.argmax(-1), mask=b.mask,
              example_ids=b.example_ids)
        for b in batches()
    ]  # fmt: skip
    found = importance(model, axes(), labelled, Silent())  # on its own labels others cannot help
    assert keep_layers(found.layers, 2) == (0, 2)


def test_the_model_is_left_as_it_was_but_for_its_mode(teacher):
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    importance(teacher, axes(), batches(1), Silent())
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_without_layers_there_are_no_layer_scores(teacher):
    found = importance(teacher, [find_axis(axes(), "ffn")], batches(1), Silent())
    assert len(found.layers) == 0
    assert {*found.units} == {"ffn.0", "ffn.1", "ffn.2"}


def test_saved_and_loaded_is_the_same(teacher, tmp_path):
    found = importance(teacher, axes(), batches(1), Silent())
    found.save(tmp_path / "importance.safetensors")
    again = load_importance(tmp_path / "importance.safetensors")
    assert found.units.keys() == again.units.keys()
    assert all(torch.equal(found.units[name], again.units[name]) for name in found.units)
    assert torch.equal(found.layers, again.layers)


def test_magnitude_is_the_square_of_a_units_weights(teacher):
    found = importance(teacher, axes(), batches(1), Silent(), ImportanceSpec(units="magnitude"))
    layer = teacher.bert.encoder.layer[1]
    fed = [layer.intermediate.dense.weight, layer.intermediate.dense.bias[:, None]]
    expected = sum(w.square().sum(1) for w in [*fed, layer.output.dense.weight.T])
    torch.testing.assert_close(found.units["ffn.1"], expected.detach())


def test_activation_is_what_a_unit_hands_on(teacher):
    found = importance(teacher, axes(), batches(2), Silent(), ImportanceSpec(units="activation"))
    layer, seen = teacher.bert.encoder.layer[1], {"ffn": [], "heads": []}
    hooks = [
        layer.output.dense.register_forward_pre_hook(lambda _, a: seen["ffn"].append(a[0])),
        layer.attention.output.dense.register_forward_pre_hook(
            lambda _, a: seen["heads"].append(a[0])
        ),
    ]
    with torch.no_grad():
        for batch in batches(2):
            teacher(**batch.inputs)
    for hook in hooks:
        hook.remove()
    ffn = torch.stack(seen["ffn"]).abs().mean((0, 1, 2))
    torch.testing.assert_close(found.units["ffn.1"], ffn)
    heads = torch.stack(seen["heads"]).abs().mean((0, 1, 2)).view(4, 8).sum(1)
    torch.testing.assert_close(found.units["heads.1"], heads)
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_activation_of_what_no_matrix_reads_is_refused(teacher):
    bias = find_axis(axes(), "ffn")
    groups = tuple(
        replace(g, members=tuple(m for m in g.members if m.dim == 0)) for g in bias.groups
    )
    spec = ImportanceSpec(units="activation")
    with pytest.raises(RecipeError, match="no matrix reads the units of axis ffn"):
        importance(teacher, [replace(bias, groups=groups)], batches(1), Silent(), spec)


def test_block_influence_is_how_far_a_layer_turns_what_it_takes(teacher):
    spec = ImportanceSpec(layers="block-influence")
    given = batches(2)
    found = importance(teacher, axes(), given, Silent(), spec)
    with torch.no_grad():
        each = []
        for batch in given:
            states = teacher(**batch.inputs, output_hidden_states=True).hidden_states
            each.append([
                1 - torch.cosine_similarity(a, b, dim=-1).mean()
                for a, b in itertools.pairwise(states)
            ])  # fmt: skip
    torch.testing.assert_close(found.layers, torch.tensor(each).mean(0))
