"""A language model as one ONNX file that takes and gives its cache of keys and values.

Inputs and outputs have the names that optimum, transformers.js and onnxruntime-genai expect:
`input_ids` (B, T), `attention_mask` (B, P + T), `position_ids` (B, T), and of each layer
`past_key_values.N.key` and `.value` (B, heads, P, D); `logits` (B, T, V), `present.N.key` and
`.value` (B, heads, P + T, D). B, T and the past's length P are free; P is 0 in the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from limbeck.errors import SourceError
from limbeck.export.onnx import MAX_BYTES, OPSET, evaluating, quiet, require_extra, save_plain
from limbeck.run import replaced

_BATCH, _TOKENS, _PAST = 2, 3, 5  # of the example: apart, lest the exporter take one for the other
_TOKEN_INPUTS = ["input_ids", "attention_mask", "position_ids"]


def export_decoder(model: PreTrainedModel, path: Path, *, where: str) -> None:
    """Write the model to `path`; tied embeddings are stored once.

    Raises MissingExtraError without the extra 'export', SourceError for a model of more than 2 GB
    and for one whose cache is not plain keys and values of every token.
    """
    require_extra()
    size = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
    if size > MAX_BYTES:
        raise SourceError(
            where, f"{size / 1e9:.1f} GB of weights", allowed="2 GB: what one ONNX file holds",
            fix="leave ONNX out for this model",
        )  # fmt: skip
    with evaluating(model), torch.no_grad(), quiet():
        past = _example(model, where)
        layers = range(len(past) // 2)
        with replaced(path) as aside:
            program = torch.onnx.export(
                _FlatCache(model),
                (
                    torch.ones(_BATCH, _TOKENS, dtype=torch.long),
                    torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.long),
                    torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1),
                    past,
                ),
                dynamo=True,
                input_names=[*_TOKEN_INPUTS, *_names("past_key_values", layers)],
                output_names=["logits", *_names("present", layers)],
                opset_version=OPSET,
                dynamic_shapes=_free(len(past)),
                verbose=False,
            )
            save_plain(program, aside)


def _names(stem: str, layers: Sequence[int]) -> list[str]:
    return [f"{stem}.{layer}.{kind}" for layer in layers for kind in ("key", "value")]


def _free(num_past: int) -> Any:
    batch, tokens, past = (torch.export.Dim(n) for n in ("batch", "sequence", "past"))
    both: Any = torch.export.Dim.DYNAMIC  # past + sequence
    return (
        {0: batch, 1: tokens}, {0: batch, 1: both}, {0: batch, 1: tokens},
        [{0: batch, 2: past}] * num_past,
    )  # fmt: skip


def _example(model: PreTrainedModel, where: str) -> list[Tensor]:
    """Keys and values of each layer behind a few tokens, of the shapes that the model makes."""
    ids = torch.ones(_BATCH, _PAST, dtype=torch.long)
    cache: Any = model(input_ids=ids, use_cache=True).past_key_values
    layers = getattr(cache, "layers", ())
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or [type(cache).__name__]
        raise SourceError(
            where, f"a {type(model).__name__}, whose cache is of another kind: {', '.join(kinds)}",
            allowed="keys and values of every token, such as a Llama's",
            fix="leave ONNX out for this model",
        )  # fmt: skip
    return _flat(cache)


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class _FlatCache(nn.Module):
    """The model with its cache as tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        said = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return (said.logits, *_flat(said.past_key_values))
