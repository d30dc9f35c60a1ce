"""The example that brings EfficientNet-Lite0: the same logits, by a forward written down here."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.recipe_file import load_recipe
from limbeck.recipe_task import ImageTask
from limbeck.tasks.image_classification import ImageClassification

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from efficientnet_lite import _URI, converted

# of each stage: blocks, kernel, stride, expansion, channels in and out (Lite's own table)
STAGES = ((1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80),
          (3, 5, 1, 6, 80, 112), (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320))  # fmt: skip


def blocks():
    number = 0
    for count, kernel, stride, expansion, wide, out in STAGES:
        for i in range(count):
            yield f"_blocks.{number}.", kernel, stride if i == 0 else 1, expansion, wide, out
            number, wide = number + 1, out


def random_state(classes: int) -> dict:
    random, state = torch.Generator().manual_seed(0), {}

    def conv(name, *shape):
        fan = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=random) * (2 / fan) ** 0.5

    def norm(name, wide):
        state[f"{name}.weight"] = 1 + torch.randn(wide, generator=random) * 0.1
        state[f"{name}.bias"] = torch.randn(wide, generator=random) * 0.1
        state[f"{name}.running_mean"] = torch.randn(wide, generator=random) * 0.1
        state[f"{name}.running_var"] = 1 + torch.rand(wide, generator=random)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    for name, kernel, _, expansion, wide, out in blocks():
        if expansion > 1:
            conv(f"{name}_expand_conv", wide * expansion, wide, 1, 1)
            norm(f"{name}_bn0", wide * expansion)
        conv(f"{name}_depthwise_conv", wide * expansion, 1, kernel, kernel)
        norm(f"{name}_bn1", wide * expansion)
        conv(f"{name}_project_conv", out, wide * expansion, 1, 1)
        norm(f"{name}_bn2", out)
    conv("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    conv("_fc", classes, 1280)
    state["_fc.bias"] = torch.randn(classes, generator=random)
    return state


def by_hand(state: dict, x: torch.Tensor) -> torch.Tensor:
    def conv(name, x, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)  # as TensorFlow does
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(name, x):
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{kind}"] for kind in kinds), eps=1e-3)

    x = F.relu6(norm("_bn0", conv("_conv_stem", x, 2)))
    for name, _, stride, expansion, wide, out in blocks():
        start = x
        if expansion > 1:
            x = F.relu6(norm(f"{name}_bn0", conv(f"{name}_expand_conv", x)))
        x = conv(f"{name}_depthwise_conv", x, stride, groups=wide * expansion)
        x = norm(f"{name}_bn2", conv(f"{name}_project_conv", F.relu6(norm(f"{name}_bn1", x))))
        x = x + start if stride == 1 and wide == out else x
    x = F.relu6(norm("_bn1", conv("_conv_head", x))).mean((2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"])


def compare(state: dict, size: int) -> torch.Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = converted(state)
    with torch.no_grad():
        found, wanted = model(pixel_values=images).logits, by_hand(state, images)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    return wanted


def test_the_converted_weights_give_the_same_logits():
    logits = compare(random_state(7), 64)
    assert logits.std() > 0.1
    with pytest.raises(RuntimeError, match="_surplus"):
        converted({**random_state(7), "_surplus.weight": torch.zeros(1)})


def test_the_gates_stand_open_and_learn_nothing():
    model = converted(random_state(3)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    nn.functional.cross_entropy(
        model(pixel_values=torch.randn(2, 3, 64, 64)).logits, torch.tensor([0, 1])
    ).backward()
    gates = {n: p for n, p in model.named_parameters() if ".squeeze_excite." in n}
    assert len(gates) == 16 * 4
    assert all(p.grad is not None and not p.grad.any() for p in gates.values())


def test_a_saved_folder_is_a_teacher_with_a_new_head(tmp_path):
    made = converted(random_state(7))
    made.save_pretrained(tmp_path)
    spec = ImageTask(kind="image-classification", size=64, channels="rgb")
    task = ImageClassification(("a", "b", "c"), spec, 0)
    loaded = task.load(tmp_path, where="recipe.teacher.model")
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        mine, theirs = (m.eval().efficientnet(images).pooler_output for m in (made, loaded))
        assert torch.equal(mine, theirs)
        assert loaded(pixel_values=images).logits.shape == (2, 3)


def test_the_recipe_beside_it_fits_its_weights():
    asked, _ = load_recipe(Path(__file__).parent.parent / "examples/efficientnet.yaml")
    assert asked.task.size % 32 == 0 and asked.task.channels == "rgb"
    assert asked.task.mean == pytest.approx((127 / 255,) * 3, abs=1e-3)
    assert asked.task.std == pytest.approx((128 / 255,) * 3, abs=1e-3)


@pytest.mark.network
def test_the_published_weights():
    from limbeck.recipe import Source
    from limbeck.sources import fetch

    found = fetch(Source(uri=_URI), where="x", kind="model")
    state = torch.load(found.path, map_location="cpu", weights_only=True)
    assert compare(state, 224).shape == (2, 1000)
