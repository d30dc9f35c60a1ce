"""A student as a plain Hugging Face folder, which transformers loads with nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from limbeck.models import label_config

# Of how the teacher's tokenizer was loaded, and of how long its own inputs were.
_LEFT_BEHIND = (
    "is_local", "local_files_only", "max_length", "pad_to_multiple_of", "stride",
    "truncation_strategy",
)  # fmt: skip


def save_model(model: PreTrainedModel, folder: Path, *, labels: Sequence[str]) -> None:
    """Write config and safetensors.

    The same model gives the same bytes. Raises ValueError for a model that carries what its class
    does not know, such as a projector: nobody else could load it.
    """
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        known = type(model)(config).state_dict().keys()
    if strange := model.state_dict().keys() ^ known:
        raise ValueError(f"not what {type(model).__name__} consists of: {sorted(strange)}")
    label_config(config, labels)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype  # transformers notes it only in passing, on the first save
    config._name_or_path = ""  # where the teacher lay on this machine
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(weights.stat().st_mode | (folder / "config.json").stat().st_mode)  # was 0600


def save_tokenizer(origin: Path, folder: Path, *, max_tokens: int) -> None:
    """With the length that the model was taught; padding is for whoever calls it to choose."""
    tokenizer = AutoTokenizer.from_pretrained(
        origin, trust_remote_code=False, local_files_only=True
    )
    tokenizer.model_max_length = max_tokens
    tokenizer.name_or_path = ""
    for name in _LEFT_BEHIND:
        tokenizer.init_kwargs.pop(name, None)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)
