"""A language model's ONNX file in ONNX Runtime: asked about rows, and writing with its cache."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.errors import LimbeckError, MissingExtraError
from limbeck.losses.fused import Head
from limbeck.models import read_any_config
from limbeck.runtime_worker import Decoder, onnx_session

if TYPE_CHECKING:
    from limbeck.tasks.causal_rows import Rows


@dataclass(frozen=True, kw_only=True)
class Said:
    """What an `OnnxCausal` gives, named as transformers does."""

    logits: Tensor
    past_key_values: list[np.ndarray]


class OnnxCausal(nn.Module):
    """The file as a model that `generating` writes with. `hf`: the folder it was made from."""

    def __init__(self, path: Path, hf: Path) -> None:
        super().__init__()
        self.config = read_any_config(hf, where=str(hf), allowed="a model's folder")
        ends = hf / "generation_config.json"
        known = json.loads(ends.read_text(encoding="utf-8")) if ends.is_file() else {}
        if known.get("eos_token_id") is not None:
            self.config.eos_token_id = known["eos_token_id"]
        self._decoder = open_decoder(path)

    def forward(
        self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
        past_key_values: list[np.ndarray] | None, use_cache: bool,
    ) -> Said:  # fmt: skip
        assert use_cache
        said, past = self._decoder(
            input_ids.numpy(), past_key_values or (), mask=attention_mask.numpy(),
            places=position_ids.numpy(),
        )  # fmt: skip
        return Said(logits=torch.from_numpy(said), past_key_values=past)


def open_decoder(path: Path) -> Decoder:
    """Raises MissingExtraError without the extra 'export', LimbeckError for what does not load."""
    return Decoder(_session(path, str(path)))


def open_headless(path: Path) -> tuple[Decoder, Head | None]:
    """The file without its last matrix, and that matrix; where it ends in none, whole, and None."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError.of(f"running {path.name}", "export") from error
    model = onnx.load(path)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {one.name: one for one in graph.initializer}
    last = makers["logits"]
    turned = makers.get(last.input[1]) if last.op_type == "MatMul" else None
    is_turn = turned is not None and turned.op_type == "Transpose"
    name = turned.input[0] if turned is not None and is_turn else last.input[1]
    if last.op_type != "MatMul" or name not in weights:
        return open_decoder(path), None
    table = torch.from_numpy(onnx.numpy_helper.to_array(weights[name]).copy())
    hidden = last.input[0]
    graph.node.remove(last)
    graph.output.remove(next(one for one in graph.output if one.name == "logits"))
    graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    session = _session(path, model.SerializeToString())
    return Decoder(session, hidden), Head(weight=table if is_turn else table.T)


def _session(path: Path, model: str | bytes) -> Any:
    try:
        return onnx_session(model, 1)
    except ImportError as error:
        raise MissingExtraError.of(f"running {path.name}", "export") from error
    except Exception as error:  # ONNX Runtime's own, which share no class
        raise LimbeckError(
            str(path), f"does not load as ONNX: {str(error).strip()[-300:]}",
            fix="export it again",
        ) from error  # fmt: skip


def said_of(decoder: Decoder, rows: Rows, at: int, *, steps: int = 0) -> Tensor:
    """(P, V or D): what it says at each counted position of a row; each document by itself.

    The last `steps` tokens of a document come one by one, by the cache of those before them.
    """
    ends = [*rows.starts[at].tolist(), len(rows.tokens[at])]
    found: list[np.ndarray] = []
    for start, end in itertools.pairwise(ends):
        ids = rows.tokens[at][None, start:end].astype(np.int64)
        found += [part[0] for part in _in_parts(decoder, ids, steps)]
    mask = rows.batch([at]).mask[0]
    return torch.from_numpy(np.concatenate(found))[mask]


def _in_parts(decoder: Decoder, ids: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    first = max(1, ids.shape[1] - steps)
    said, past = decoder(ids[:, :first])
    yield said
    for at in range(first, ids.shape[1]):
        said, past = decoder(ids[:, at : at + 1], past)
        yield said
