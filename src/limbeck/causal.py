"""Language models that continue text: from a folder or a GGUF file to a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from limbeck.errors import SourceError
from limbeck.gguf_source import GGUFHeader, read_gguf
from limbeck.models import load_model

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
    """As `load_causal` and `load_tokenizer` read it, and anybody else."""
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


def load_causal(folder: Path, *, where: str) -> PreTrainedModel:
    """The folder's language model in fp32 and eval mode, which keeps no keys and values.

    (`config.use_cache` is off: a training needs none, and with one transformers lets packed
    documents see each other. `generation_config` still says what a user of the model wants.)
    Raises SourceError for a model of another kind, as `load_model` does for one that does not load.
    """
    model = load_model(folder, where=where)
    if type(model).__name__ not in _DECODERS:
        raise SourceError(
            where, f"{folder} holds a {type(model).__name__}, which does not continue text",
            allowed="a causal language model, such as a Llama", fix="choose another model",
        )  # fmt: skip
    model.config.use_cache = False
    return model
