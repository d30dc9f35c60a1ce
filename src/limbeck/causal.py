"""Language models that continue text: from a folder or a GGUF file to a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from limbeck.errors import SourceError
from limbeck.gguf_source import GGUFHeader, read_gguf
from limbeck.models import load_model, read_any_config

_DECODERS = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def causal_folder(path: Path, aside: Path, *, where: str) -> Path:
    """The model's folder: `path` itself, or `aside`, into which a GGUF file is unpacked.

    `path` is a folder with safetensors, a .gguf file, or a folder whose only weights are one.
    Raises what `unpack_gguf` does.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if path.is_dir() and ((path / "config.json").is_file() or not files):
        return path
    if len(files) > 1:
        raise SourceError(
            where, f"{path} holds {len(files)} GGUF files", allowed="one",
            fix=f"name one of them, such as {files[0].name}",
        )  # fmt: skip
    unpack_gguf(files[0], aside, where=where)
    return aside


def unpack_gguf(
    file: Path, folder: Path, *, where: str, dtype: Literal["fp32", "bf16"] = "fp32"
) -> GGUFHeader:
    """Write the file's model into `folder`. Raises what `read_gguf` does."""
    model, tokenizer, header = read_gguf(file, where=where, dtype=dtype)
    save_causal(model, tokenizer, folder)
    return header


def save_causal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As `load_causal` and `load_tokenizer` read it, and anybody else.

    Raises ValueError for a model that carries what its class does not know, such as a projector.
    """
    with torch.device("meta"):
        known = type(model)(model.config).state_dict().keys()
    if strange := model.state_dict().keys() ^ known:
        raise ValueError(f"not what {type(model).__name__} consists of: {sorted(strange)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    used_cache, config.use_cache = config.use_cache, True  # as users of the folder expect
    config._name_or_path = ""  # where it lay on this machine
    config.architectures = [type(model).__name__]
    tokenizer.name_or_path = ""
    try:
        model.save_pretrained(folder)
    finally:
        config.use_cache = used_cache
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(weights.stat().st_mode | (folder / "config.json").stat().st_mode)  # was 0600


def read_causal_config(folder: Path, *, where: str) -> PretrainedConfig:
    """The folder's config. Raises SourceError unless it is that of a causal language model."""
    config = read_any_config(folder, where=where, allowed="a model's folder")
    names = config.architectures or ["model of no class"]
    if not {*names} & _DECODERS:
        raise SourceError(
            where, f"{folder} holds a {names[0]}, which does not continue text",
            allowed="a causal language model, such as a Llama", fix="choose another model",
        )  # fmt: skip
    config.use_cache = False
    return config


def build_causal(config: PretrainedConfig) -> nn.Module:
    """The same architecture with fresh weights."""
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_causal(folder: Path, *, where: str) -> PreTrainedModel:
    """The folder's language model in fp32 and eval mode, which keeps no keys and values.

    (`config.use_cache` is off: a training needs none, and with one transformers lets packed
    documents see each other. `generation_config` still says what a user of the model wants.)
    Raises SourceError for a model of another kind, as `load_model` does for one that does not load.
    """
    read_causal_config(folder, where=where)
    model = load_model(folder, where=where)
    model.config.use_cache = False
    return model
