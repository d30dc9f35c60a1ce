"""All the files of one model that a recipe asks for, by the formats' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from limbeck.export.gguf import GGUFKind, write_gguf
from limbeck.export.onnx import export_onnx, quantize_int8
from limbeck.export.onnx_language import export_decoder
from limbeck.export.static import quantize_static_int8
from limbeck.recipe import file_of
from limbeck.types import Input


def write_files(
    model: nn.Module, hf: Path, folder: Path, inputs: Sequence[Input], formats: set[Any],
    calibration: Sequence[Mapping[str, np.ndarray]] | None, *, draft: bool, writes: bool = False,
) -> None:  # fmt: skip
    """Into `folder`; what is made from the model's own folder `hf`, from there.

    A model that `writes` takes and gives its cache. `calibration`: inputs by which an int8 file's
    ranges are fixed; none: they are not.
    """
    for format in sorted(formats):
        if format.startswith("gguf-"):
            kind = cast(GGUFKind, format.removeprefix("gguf-"))
            write_gguf(hf, folder / file_of(format), kind, name="student", where="recipe.export")
    if writes:
        if "onnx-fp32" in formats:
            causal = cast(PreTrainedModel, model)
            export_decoder(causal, folder / file_of("onnx-fp32"), where="recipe.export")
        return
    fp32, int8 = (folder / file_of(format) for format in ("onnx-fp32", "onnx-int8"))
    if formats & {"onnx-fp32", "onnx-int8"}:
        export_onnx(model, fp32, inputs=inputs, draft=draft)
    if "onnx-int8" in formats:
        if calibration is None:
            quantize_int8(fp32, int8)
        else:
            quantize_static_int8(fp32, int8, calibration)
        if "onnx-fp32" not in formats:
            fp32.unlink()
