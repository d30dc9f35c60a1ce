"""Load and build models through transformers, and never run a stranger's code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from limbeck.errors import SourceError


def load_classifier(folder: Path, labels: Sequence[str], *, where: str) -> PreTrainedModel:
    """The model with a head for these labels; a head that is not in the folder starts random.

    Raises SourceError where the folder holds no model that transformers' Auto classes load.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        label_config(config, labels)
        return AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise SourceError(
            where, f"{folder} does not load: {_first_line(error)}",
            allowed="a folder with config.json and model.safetensors of a text model",
        ) from error  # fmt: skip


def head_labels(folder: Path, *, where: str) -> tuple[str, ...] | None:
    """The labels of the folder's own classification head, or None if it has none."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(where, f"{folder}: {_first_line(error)}") from error
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    return tuple(config.id2label[i] for i in range(config.num_labels))


def label_config(config: PretrainedConfig, labels: Sequence[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def build_classifier(config: PretrainedConfig) -> nn.Module:
    """The same architecture with fresh weights."""
    return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # tied ones once


def no_dropout(model: nn.Module) -> None:
    """Few epochs have little to gain from dropout, whose random numbers are slow on a CPU."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
