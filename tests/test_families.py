"""What every family must pass: axes found and proved, and students that are what they should be."""

import copy
from functools import cache

import pytest
import torch
import transformers

from families import FAMILIES, build
from limbeck.architecture.axes import stacks
from limbeck.architecture.cut import build_student, full_shape, kept_layers, sort_units, usable
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.architecture.proof_layers import skipped
from limbeck.architecture.twins import logits_of
from limbeck.types import Shape

COMMON = ("BERT", "RoBERTa", "DistilBERT", "Llama", "Qwen2", "GPT-2", "T5", "BART", "ViT",
          "ConvNeXt", "ResNet-basic")  # fmt: skip
ALL = [
    pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow) for name in FAMILIES
]
pytestmark = pytest.mark.filterwarnings("ignore:.*encoder-decoder:UserWarning")


@cache
def known(name):
    """(model with weights and statistics of every kind random, its axes proved)."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = build(family)(family.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(std=(parameter.numel() / parameter.shape[0]) ** -0.5)
            elif parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
        for path, buffer in model.named_buffers():
            if path.endswith("running_mean"):
                buffer.normal_()
            if path.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    axes = find_axes(family.config, build(family))
    inputs = example_inputs(model, family.config)
    return model, prove_axes(model, family.config, build(family), axes, inputs, seed=0)


def logits(name, model):
    with torch.no_grad():
        return logits_of(model(**example_inputs(known(name)[0], FAMILIES[name].config)))


def student(name, shape, state=None):
    family, (model, axes) = FAMILIES[name], known(name)
    return build_student(family.config, build(family), axes, shape, state or model.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_these_axes_are_proved_and_no_others(name):
    family, (_, axes) = FAMILIES[name], known(name)
    found = {axis.name: axis for axis in axes}
    assert len(found) == len(axes)
    assert {n for n, axis in found.items() if axis.proved} == set(family.proved.split())
    assert all(axis.reason for axis in axes)
    for refused, word in family.refused.items():
        assert not found[refused].proved
        assert word in found[refused].reason


def zeroed(model, axis, size):
    """The model without what a smaller size has not, unit by unit: slow, and no code of the cut."""
    other = copy.deepcopy(model)
    tensors = dict(other.named_parameters(remove_duplicate=False)) | dict(other.named_buffers())
    for group in axis.groups:
        for member in group.members:
            rows = tensors[member.parameter].data.movedim(member.dim, 0)
            start = 0
            for times in member.segments:
                width = member.block * times
                for unit in range(group.units):
                    if unit * axis.size >= size * group.units:
                        rows[start + unit * width : start + (unit + 1) * width] = 0
                start += width * group.units
    return other


@pytest.mark.parametrize("name", ALL)
def test_a_cut_is_the_zeroed_model_where_no_norm_sees_it(name):
    """Of axes that nothing else is coupled to, at a small size: few steps are left."""
    model, axes = known(name)
    partners = {other for axis in axes for other in (axis.name, *axis.coupled) if axis.coupled}
    tested = 0
    for axis in usable(axes):
        free = axis.groups and not axis.labels and axis.name not in partners
        if not free or "norms over" in axis.reason:
            continue
        shape = full_shape(axes)
        size = axis.granularity
        if axis.name == "expand_ratios[1]":  # at a ratio of one EfficientNet has no expansion
            size *= 2
        small = student(name, Shape({**shape.sizes, axis.name: size}, shape.layers))
        expected = logits(name, zeroed(model, axis, size))
        assert (logits(name, small) - expected).abs().max() < 1e-5 * expected.abs().max()
        tested += 1
    assert bool(tested) == (name not in ("ConvNeXt", "Mamba2"))  # norms see all; no width at all


@pytest.mark.parametrize("name", ALL)
def test_the_teachers_shape_is_the_teacher_and_sorting_changes_nothing(name):
    model, axes = known(name)
    whole, plain = full_shape(axes), logits(name, model)
    assert torch.equal(logits(name, student(name, whole)), plain)
    torch.manual_seed(1)
    scores = {g.name: torch.rand(g.units) for a in usable(axes) for g in a.groups}
    ordered = sort_units(model.state_dict(), axes, scores)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, ordered[k])]
    assert bool(moved) == (name != "Mamba2")  # none of its widths can be cut
    error = (logits(name, student(name, whole, ordered)) - plain).abs().max()
    assert error < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_cut_layers_are_skipped_layers_and_survive_a_disk(name, tmp_path):
    model, axes = known(name)
    layers = [axis for axis in stacks(usable(axes)) if axis.size > 1]
    for axis in layers:
        gone = max(set(range(axis.size)) - set(axis.pinned))
        kept = tuple(i for i in range(axis.size) if i != gone)
        shape = full_shape(axes)
        shape = (Shape(shape.sizes, kept) if axis.name == "layers"
                 else Shape(shape.sizes, shape.layers, {axis.name: kept}))  # fmt: skip
        assert kept_layers(axis, shape) == kept
        small = student(name, shape)
        with skipped(model, axis.pattern.format(gone)):
            expected = logits(name, model)
        error = (logits(name, small) - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()
    small = small if layers else student(name, full_shape(axes))
    small.save_pretrained(tmp_path)
    loaded = getattr(transformers, FAMILIES[name].model).from_pretrained(tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[k], v) for k, v in small.state_dict().items())
    # A convolution's last bits depend on where its weights lie in memory.
    torch.testing.assert_close(logits(name, loaded), logits(name, small), rtol=1e-5, atol=1e-6)
