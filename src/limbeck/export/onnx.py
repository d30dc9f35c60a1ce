"""A classifier as one ONNX file, and that file in int8.

Inputs as the task says (`Input`), with B and their free dimensions free; output `logits` (B, C)
float32. The file is whole (no external data) and holds no trace of the machine that made it.
Models of 2 GB and more do not fit into one file.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.errors import MissingExtraError
from limbeck.run import replaced
from limbeck.types import Input

if TYPE_CHECKING:
    import onnx

# The first with Gelu as one op (with Erf and friends ORT finds it again, but only in fp32); ONNX
# Runtime 1.17 and later read it. Opset 23 has Attention as one op: no faster (BERT, 3 x 160 and
# 6 x 384), and the int8 quantiser takes it for com.microsoft's op of the same name.
OPSET = 20
_OUTPUTS = ["logits"]
_SMALL = 7  # at most, of a free dimension of the example that is traced
MAX_BYTES = 2**31 - 2**20  # protobuf's limit, with room for the graph itself


def export_onnx(
    model: nn.Module, path: Path, *, inputs: Sequence[Input], draft: bool = False
) -> None:
    """Write the model's forward to `path`; free dimensions from 2 to what the inputs say.

    `draft` is for timing candidates whose weights mean nothing: torch's old exporter writes a
    file of the same speed in a tenth of the time. It follows one example through the model and
    proves nothing about others, so it never makes what is shipped.
    Raises MissingExtraError without the extra 'export'.
    """
    require_extra()
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes of weights do not fit into one ONNX file (2 GB)")
    device = next(model.parameters()).device
    example = tuple(_example(one).to(device) for one in inputs)
    write = _write_draft if draft else _write
    module = _LogitsOnly(model, [one.name for one in inputs])
    with replaced(path) as aside, evaluating(model), torch.no_grad(), quiet():
        write(module, example, aside, inputs)


def _example(one: Input) -> Tensor:
    """Two of batch and another size of what is free, lest the exporter take one for the other."""
    dims = [min(n, _SMALL) if free else n for n, free in zip(one.dims, one.free, strict=True)]
    return torch.ones(2, *dims, dtype=getattr(torch, one.dtype))


def _write(
    module: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: Sequence[Input]
) -> None:
    # Seconds for MiniLM: torch.export 2, decomposing with symbolic sizes 4, onnxscript's table of
    # ops 1, translating and optimising 1. `verify` would run the model again: parity is measured
    # on real examples later.
    batch = torch.export.Dim("batch", min=1)
    sizes = {n: torch.export.Dim(n, max=most) for n, most in _free(inputs).items()}
    dynamic = [
        {0: batch} | {at: sizes[name] for at, name in enumerate(one.free, 1) if name}
        for one in inputs
    ]
    program = torch.onnx.export(
        module,
        example,
        dynamo=True,
        input_names=[one.name for one in inputs],
        output_names=_OUTPUTS,
        opset_version=OPSET,
        dynamic_shapes=(tuple(dynamic),),
        custom_translation_table={
            torch.ops.aten.scaled_dot_product_attention.default: _attention_translation()
        },
        verbose=False,
    )
    save_plain(program, path)


def save_plain(program: torch.onnx.ONNXProgram | None, path: Path) -> None:
    """One file without stack traces, which hold this machine's paths: half of a tiny model's."""
    assert program is not None
    graph = program.model.graph
    for part in (*graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()
        for value in getattr(part, "outputs", ()):
            value.metadata_props.clear()
    program.save(path, external_data=False)


def _write_draft(
    module: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: Sequence[Input]
) -> None:
    names = [one.name for one in inputs]
    dynamic = {
        one.name: {0: "batch"} | {at: name for at, name in enumerate(one.free, 1) if name}
        for one in inputs
    }
    torch.onnx.export(
        module,
        example,
        str(path),
        dynamo=False,
        input_names=names,
        output_names=_OUTPUTS,
        opset_version=OPSET,
        dynamic_axes={**dynamic, "logits": {0: "batch"}},
    )


def _free(inputs: Sequence[Input]) -> dict[str, int]:
    """The free dimensions by name, and the largest that they may be."""
    found = (zip(one.free, one.dims, strict=True) for one in inputs)
    return {name: most for pairs in found for name, most in pairs if name}


class _LogitsOnly(nn.Module):
    """The named inputs, one output; what else the model could take stays at its default."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *arrays: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, arrays, strict=True)))
        logits: Tensor = output.logits  # (B, C)
        return logits


def _attention_translation() -> Callable[..., Any]:
    """Attention in as few ops as it takes: 7 % faster at batch 1 than torch's own translation,
    which reshapes the keys twice and guards against rows without any token (there are none)."""
    from onnxscript import ir
    from onnxscript import opset20 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

    # Any, as onnxscript reads other annotations as ONNX types.
    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0,
        is_causal: Any = False, scale: Any = None, enable_gqa: Any = False,
    ) -> Any:  # fmt: skip
        if is_causal or enable_gqa:
            return aten_scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scaled = op.Mul(query, op.Constant(value_float=scale))
        scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))  # (B, heads, T, T)
        if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
            lowest: Any = op.Constant(value_float=torch.finfo(torch.float32).min)
            zero: Any = op.Constant(value_float=0.0)
            attn_mask = op.Where(attn_mask, zero, lowest)
        if attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    return attention


def quantize_int8(fp32: Path, int8: Path) -> None:
    """Write `fp32` with weights and embeddings in int8; activations are quantised as they come
    (`export.static` has them fixed).

    Raises MissingExtraError without the extra 'export'.
    """
    require_extra()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(fp32)
    _quantize_embeddings(model)
    # Says that shapes are known already, and keeps the quantiser from saying so on the root logger.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with replaced(int8) as aside, quiet():
        # A CPU without VNNI (this includes every AVX2 laptop) adds pairs of u8 x s8 products in 16
        # bits, which saturate beyond 2 x 255 x 64: `reduce_range` keeps weights to 7 bits, so that
        # the file says the same everywhere. A scale per output channel more than makes up for it.
        # Agreement with fp32 on such a CPU, MiniLM tuned on 20 Newsgroups (n = 1000) / a student of
        # 3 x 160 (n = 1500), and the time of a call:
        #   s8 per tensor 95.4/95.9 %   the same, 7 bits 90.8/95.7   s8 per channel 97.1/92.9
        #   s8 per channel, 7 bits 97.3/97.5      u8 per channel 97.7/97.8, but 9 to 15 % slower
        quantize_dynamic(
            model,
            aside,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )


def _quantize_embeddings(model: onnx.ModelProto) -> None:
    """Replace each looked-up table by int8 rows and a scale per row.

    ONNX Runtime's own has one scale per table: its few outliers made a third of the small
    student's difference from fp32. A scale per row costs 4 bytes of D + 4.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = {t.name: t for t in graph.initializer if _is_table(t)}
    # A table with any other use must stay as it is.
    kept = {name for node in graph.node if not _looks_up(node) for name in node.input}
    for name in sorted(tables.keys() - kept):
        table = numpy_helper.to_array(tables[name])  # (V, D)
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-12)  # (V, 1)
        rows = np.rint(table / scale).astype(np.int8)
        graph.initializer.remove(tables[name])
        graph.initializer.append(numpy_helper.from_array(rows, f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    nodes = []
    for node in graph.node:
        if not _looks_up(node) or node.input[0] not in tables.keys() - kept:
            nodes.append(node)
            continue
        (name, ids), out = node.input, node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"]),  # (B, T, D)
            helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"]),  # (B, T, 1)
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _is_table(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == tensor.FLOAT and len(tensor.dims) == 2


def _looks_up(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and all(a.i == 0 for a in node.attribute if a.name == "axis")


def require_extra() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("ONNX export", "export") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing here is a user's business: deprecations inside the exporters, torchvision that is
    not there, names of axes that the exporter merges."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in ("torch", "onnx", "transformers", "copyreg", "limbeck.export"):
                warnings.filterwarnings("ignore", module=module)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
