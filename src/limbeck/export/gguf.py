"""A language model's folder as one GGUF file, which llama.cpp and what is built on it load.

Llama and Qwen2, with a byte-level BPE tokenizer and its chat template, by llama.cpp's own writer
(the `gguf` package). Norms and biases stay in fp32. Where a matrix's rows do not divide into
blocks of 32 it is written in fp16, and beside Q4_0 the embeddings and the head in Q8_0: their
errors reach every logit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from limbeck.errors import MissingExtraError, SourceError
from limbeck.gguf_source import DIGITS, SPLITS, WHOLE_WORDS
from limbeck.models import load_tokenizer
from limbeck.quantization import block_kind
from limbeck.run import replaced

if TYPE_CHECKING:
    import gguf

GGUFKind = Literal["f32", "f16", "q8_0", "q4_0"]
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def write_gguf(folder: Path, path: Path, kind: GGUFKind, *, name: str, where: str) -> None:
    """Write the model in `folder` to `path`.

    Raises SourceError for a model or tokenizer that the format's rules here do not cover,
    MissingExtraError without the extra 'lm'.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError.of("GGUF export", "lm") from None
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = _architecture(config, folder, where)
    tokenizer = load_tokenizer(folder, where=where)
    with replaced(path) as aside:
        writer = gguf.GGUFWriter(aside, architecture)
        _add_settings(writer, config, name, kind)
        _add_tokenizer(writer, tokenizer, config, where)
        names = gguf.get_tensor_name_map(_model_arch(architecture), config.num_hidden_layers)
        for full, tensor in _weights(folder, config):
            known = names.get_name(full, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise SourceError(
                    where, f"{folder} has a weight that llama.cpp does not know: {full}",
                    allowed=f"the weights of a {config.architectures[0]}",
                    fix="export it without what was added",
                )  # fmt: skip
            if architecture == "llama":
                tensor = _rotated(full, tensor, config)
            stored = _kind_of(known, tensor, kind)
            values = gguf.quantize(tensor, stored)
            writer.add_tensor(known, values, raw_dtype=stored)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _architecture(config: PretrainedConfig, folder: Path, where: str) -> str:
    made = (config.architectures or ["none"])[0]
    if made not in _ARCHITECTURES:
        raise SourceError(
            where, f"{folder} holds a {made}", allowed=", ".join(_ARCHITECTURES),
            fix="leave GGUF out for this model",
        )  # fmt: skip
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default" or getattr(config, "use_sliding_window", False):
        raise SourceError(
            where, f"{folder} scales its positions ({rope}) or slides a window",
            allowed="plain rotary positions over the whole context",
            fix="leave GGUF out for this model",
        )  # fmt: skip
    return _ARCHITECTURES[made]


def _model_arch(architecture: str) -> gguf.MODEL_ARCH:
    from gguf import MODEL_ARCH

    return {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}[architecture]


def _add_settings(
    writer: gguf.GGUFWriter, config: PretrainedConfig, name: str, kind: GGUFKind
) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(
        {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16,
         "q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_0": LlamaFileType.MOSTLY_Q4_0}[kind]
    )  # fmt: skip
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _weights(folder: Path, config: PretrainedConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values in fp32; of a tied pair the embeddings alone."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                yield name, opened.get_tensor(name).to(torch.float32).numpy()


def _rotated(name: str, tensor: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Rows of q and k in the order of llama.cpp's rotary embedding, which turns neighbours where
    transformers turns halves. (convert_hf_to_gguf.py, LlamaModel.permute.)"""
    part = name.rpartition("self_attn.")[2].partition(".")[0]
    if part not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads
    if part == "k_proj":
        heads = config.num_key_value_heads or heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _kind_of(name: str, tensor: np.ndarray, kind: GGUFKind) -> gguf.GGMLQuantizationType:
    from gguf import GGMLQuantizationType as Kind

    if tensor.ndim == 1 or kind == "f32":
        return Kind.F32
    of_tokens = name in ("token_embd.weight", "output.weight")
    stored = None if kind == "f16" else block_kind(tensor.shape, kind, of_tokens=of_tokens)
    return {None: Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}[stored]


def _add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig,
    where: str,
) -> None:  # fmt: skip
    backend: Tokenizer = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(state["pre_tokenizer"]):
        raise SourceError(
            where, f"its tokenizer is a {state['model']['type']} over other units than bytes",
            allowed="byte-level BPE, such as GPT-2's, Llama 3's or Qwen's",
            fix="leave GGUF out for this model",
        )  # fmt: skip
    named = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    tokens, kinds = [], []
    for i in range(config.vocab_size):
        tokens.append(named.get(i, f"[PAD{i}]"))
        kind = {True: _CONTROL, False: _USER, None: _NORMAL}[added.get(i)]
        kinds.append(kind if i in named else _UNUSED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting_name(state, where=where))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    own: Any = tokenizer("")["input_ids"]
    bos: Any = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and bos in own)
    writer.add_add_space_prefix(False)
    for token, add in (
        (bos, writer.add_bos_token_id), (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):  # fmt: skip
        if token is not None:
            add(token)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def splitting_name(state: dict[str, Any], *, where: str) -> str:
    """llama.cpp's name for how text is split before the merges, and whether whole words go before
    them, from the contents of `tokenizer.json`.

    Raises SourceError where it has none: under another the file would cut other tokens.
    """
    whole_words = bool(state["model"].get("ignore_merges"))
    steps = state["pre_tokenizer"].get("pretokenizers") or [state["pre_tokenizer"]]
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    found: list[str] = []
    if not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            found = ["gpt-2"]
        elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            found = [*DIGITS]
        elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            pattern = steps[0]["pattern"].get("Regex")
            found = [name for name, known in SPLITS.items() if known and known == pattern]
    for name in found:
        if (name in WHOLE_WORDS) == whole_words:
            return name
    raise SourceError(
        where, "its tokenizer splits text by rules that llama.cpp has no name for: "
        f"{', '.join(kinds)}{', whole words first' if whole_words else ''}",
        allowed=", ".join([*SPLITS, DIGITS[0]]), fix="leave GGUF out for this model",
    )  # fmt: skip
