"""An ONNX file in int8 with ranges of activations that are fixed beforehand: for convolutions,
which gain nothing from ranges that are found anew at each call."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from limbeck.export.onnx import quiet, require_extra
from limbeck.run import replaced

Arrays = Mapping[str, np.ndarray]


def quantize_static_int8(fp32: Path, int8: Path, batches: Sequence[Arrays]) -> None:
    """Write `fp32` with weights and activations in int8, by the ranges seen on these batches.

    Weights have a scale per output channel and 7 bits (`export.onnx.quantize_int8` says why); a
    normalisation behind a convolution becomes a part of it first.
    Raises MissingExtraError without the extra 'export'.
    """
    require_extra()
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Arrays] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.left, None)
            return None if found is None else dict(found)

    with tempfile.TemporaryDirectory(prefix="limbeck-") as folder, replaced(int8) as aside, quiet():
        joined = Path(folder) / "joined.onnx"
        _join(fp32, joined)
        model = onnx.load(joined)
        _shorten(model)
        _pool_all(model)
        onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
        onnx.save(model, joined)
        quantize_static(
            joined, aside, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )  # fmt: skip
        made = onnx.load(aside)
        _shorten(made)
        onnx.save(made, aside)


def _pool_all(model: object) -> None:
    """A pooling that is larger than the image is the mean of all there is: EfficientNet ends in one
    of 1280 x 1280, for which ONNX Runtime's int8 kernel computes nonsense."""
    graph = model.graph  # type: ignore[attr-defined]
    sides = [d.dim_value for value in graph.input for d in value.type.tensor_type.shape.dim[2:]]
    for node in graph.node:
        if node.op_type != "AveragePool" or not sides:
            continue
        about = {a.name: [*a.ints] or [a.i] for a in node.attribute}
        wide = min(about["kernel_shape"]) >= max(sides) > 0
        if wide and not any(about.get("pads", ())) and about.get("ceil_mode") == [1]:
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]


def _join(model: Path, to: Path) -> None:
    """Constants folded, normalisations folded into convolutions: ops that every runtime has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(to)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _shorten(model: object) -> None:
    """Names inside the graph by numbers: of a small model they are half of the file."""
    graph = model.graph  # type: ignore[attr-defined]
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}

    def short(name: str) -> str:
        return name if name in kept or not name else names.setdefault(name, f"{len(names):x}")

    for node in graph.node:
        node.name = ""
        node.doc_string = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    del graph.value_info[:]
