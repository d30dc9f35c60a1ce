"""`limbeck try`: one text through an exported file, as a user's program would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from limbeck.errors import SourceError
from limbeck.recipe import Format
from limbeck.runtime import load_predictor


def classify(student: Path, text: str) -> list[tuple[str, float]]:
    """By a student's folder in a run (its int8 file is used), an .onnx file or an `hf` folder."""
    path, format, hf = _find(student)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False, local_files_only=True)
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    encoded = tokenizer(text, truncation=True, return_tensors="np")
    inputs = {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    logits = load_predictor(path, format, threads=1)(inputs)[0]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    names = {int(i): name for i, name in config["id2label"].items()}
    return [(names[i], float(probs[i])) for i in np.argsort(-probs)]


def _find(student: Path) -> tuple[Path, Format, Path]:
    if student.suffix == ".onnx" and student.is_file():
        format: Format = "onnx-int8" if "int8" in student.name else "onnx-fp32"
        return student, format, student.parent.parent / "hf"
    if (student / "onnx" / "model-int8.onnx").is_file():
        return student / "onnx" / "model-int8.onnx", "onnx-int8", student / "hf"
    for folder in (student, student / "hf"):
        if (folder / "config.json").is_file():
            return folder, "hf", folder
    raise SourceError(
        str(student),
        "no student there",
        allowed="RUN/students/NAME, an .onnx file, an hf folder",
        fix="`limbeck report RUN` shows a run's students",
    )
