"""`limbeck try`: one text or image through an exported file, as a user's program would."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError, SourceError
from limbeck.recipe import Format
from limbeck.recipe_task import ArrayTask, kinds, task_of
from limbeck.runtime import load_predictor
from limbeck.tasks.columns import Encoding, row_of
from limbeck.tasks.images import PREPROCESSING, inputs_of
from limbeck.tasks.time_series import one_series


def classify(student: Path, what: str) -> list[tuple[str, float]]:
    """By a student's folder in a run (its int8 file is used), an .onnx file or an `hf` folder.

    `what` is a text, for a model of images the path of one, for a model of rows a JSON object.
    """
    path, format, hf = _find(student)
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    about = hf / PREPROCESSING
    inputs = _made_as(about, what) if about.is_file() else _of_text(what, hf)
    _require_sizes(inputs, config, what)
    logits = load_predictor(path, format, threads=1)(inputs)[0]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    names = {int(i): name for i, name in config["id2label"].items()}
    return [(names[i], float(probs[i])) for i in np.argsort(-probs)]


def write(student: Path, prompt: str, max_new_tokens: int) -> Iterator[str] | None:
    """The text that comes after the prompt, as it is written: the likeliest token each time; None
    for a model that classifies.

    By the .onnx file that is named, else by the `hf` folder. The prompt goes in as it is, without a
    chat template. Raises SourceError, DataError.
    """
    from limbeck.causal import load_causal
    from limbeck.generating import Sampling, end_ids, stream
    from limbeck.models import load_tokenizer
    from limbeck.onnx_decoder import OnnxCausal
    from limbeck.tasks.conversations import Encoder

    hf = hf_folder(student)
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    if not any(name.endswith("ForCausalLM") for name in config.get("architectures") or ()):
        return None
    where = str(hf)
    tokenizer = load_tokenizer(hf, where=where)
    model = (
        OnnxCausal(student, hf) if student.suffix == ".onnx" else load_causal(hf, where=where)
    )  # fmt: skip
    asked = Encoder(tokenizer, "text", where=where).prompt(prompt)
    sampling = Sampling(max_new_tokens=max_new_tokens, sampling_temperature=0)
    return stream(model, tokenizer, asked, sampling, ends=end_ids(model))


def hf_folder(student: Path) -> Path:
    """The `hf` folder of a student that is named by its folder, its file or itself."""
    return _find(student)[2]


def _of_text(text: str, hf: Path) -> dict[str, np.ndarray]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False, local_files_only=True)
    encoded = tokenizer(text, truncation=True, return_tensors="np")
    return {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def _require_sizes(inputs: Mapping[str, np.ndarray], config: Mapping[str, Any], what: str) -> None:
    """A runtime's own words about a wrong size name no file."""
    series = inputs.get("series")
    wanted = (config.get("num_channels"), config.get("length"))
    if series is not None and series.shape[1:] != wanted:
        raise DataError(
            what, f"series of shape {series.shape[1:]}", allowed=f"{wanted}, as those it learnt",
            fix="cut or fill it to that size",
        )  # fmt: skip


def _made_as(preprocessing: Path, what: str) -> dict[str, np.ndarray]:
    about = json.loads(preprocessing.read_text(encoding="utf-8"))
    if about.get("kind") == "tabular":
        return Encoding.of_json(about).one(row_of(what), "the row")
    if "kind" not in about:
        return inputs_of(Path(what), about)
    if about["kind"] == "time-series":
        return one_series(Path(what))
    found = task_of(about["kind"])
    if found is None or not issubclass(found, ArrayTask):
        raise SourceError(
            str(preprocessing), f"it is for a task {about['kind']!r}, which nobody registered",
            allowed=", ".join(kinds()), fix="import the module that registers it first",
        )  # fmt: skip
    return {
        name: np.asarray(one, np.int64 if name == "categories" else np.float32)
        for name, one in found(**about["settings"]).one(what).items()
    }


def _find(student: Path) -> tuple[Path, Format, Path]:
    if student.suffix == ".onnx" and student.is_file():
        format: Format = "onnx-int8" if "int8" in student.name else "onnx-fp32"
        return student, format, student.parent.parent / "hf"
    if student.suffix == ".gguf" and student.is_file():
        return student.parent.parent / "hf", "hf", student.parent.parent / "hf"
    if (student / "onnx" / "model-int8.onnx").is_file():
        return student / "onnx" / "model-int8.onnx", "onnx-int8", student / "hf"
    for folder in (student, student / "hf"):
        if (folder / "config.json").is_file():
            return folder, "hf", folder
    raise SourceError(
        str(student),
        "no student there",
        allowed="RUN/students/NAME, an .onnx or .gguf file, an hf folder",
        fix="`limbeck report RUN` shows a run's students",
    )
