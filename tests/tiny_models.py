"""Tiny random models whose weights are large enough that every unit shows in the outputs."""

from functools import cache

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    PretrainedConfig,
)

from limbeck.architecture.axes import Axis
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes


def bert_config() -> BertConfig:
    return BertConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        intermediate_size=48,
        vocab_size=99,
        max_position_embeddings=40,
        num_labels=5,
    )


def build(config: PretrainedConfig) -> nn.Module:
    auto = AutoModelForSequenceClassification
    if getattr(config, "image_size", None):
        auto = AutoModelForImageClassification
    return auto.from_config(config)


def random_model(config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """As `build`, in eval mode, with weights of every kind random: biases and norms too."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=(parameter.numel() / parameter.shape[0]) ** -0.5)
            else:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def proved(model: nn.Module, axes: tuple[Axis, ...], seed: int = 0) -> dict[str, Axis]:
    inputs = example_inputs(model, model.config)
    return {a.name: a for a in prove_axes(model, model.config, build, axes, inputs, seed=seed)}


@cache
def bert_axes() -> tuple[Axis, ...]:
    """Found once, proved on `random_model(bert_config())`."""
    model = random_model(bert_config())
    return tuple(proved(model, find_axes(bert_config(), build)).values())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**example_inputs(model, model.config)).logits
