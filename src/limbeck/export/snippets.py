"""What a model card says of each kind of task: a noun, the hub's tag, the input, and two snippets
that work as they stand in the folder that the card lies in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]  # a recipe's `task`


@dataclass(frozen=True)
class Kind:
    noun: str
    tag: str
    """The hub's `pipeline_tag`."""
    takes: Callable[[Settings], str]
    """One sentence about the input."""
    transformers: str
    other: Callable[[Settings], str]
    """For the exported files, with PATH where the file's name belongs."""
    runs: str = "onnx"
    """How the formats of these files begin."""
    by: str = "With ONNX Runtime, and no torch"


def kind_of(recipe: Mapping[str, Any]) -> Kind:
    return KINDS[recipe.get("task", {}).get("kind", "text-classification")]


def _tokens(task: Settings) -> str:
    tokens = task.get("max_tokens")
    return f"at most {tokens} tokens, special tokens included; the rest is cut" if tokens else ""


def _pixels(task: Settings) -> str:
    how = {"crop": "the middle of the image", "stretch": "the image"}[task["fit"]]
    return f"{how} as {task['size']} x {task['size']} pixels, {task['channels']}"


def _text_onnx(task: Settings) -> str:
    tokens = task.get("max_tokens")
    return _TEXT_ONNX.replace("CUT\n", f"tokenizer.enable_truncation({tokens})\n" if tokens else "")


_TEXT = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".").eval()
inputs = tokenizer("Your text", truncation=True, return_tensors="pt")
with torch.inference_mode():
    probabilities = model(**inputs).logits.softmax(-1)[0]
best = int(probabilities.argmax())
print(model.config.id2label[best], f"{probabilities[best]:.3f}")
"""

_TEXT_ONNX = """\
import json

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
CUT
with open("config.json", encoding="utf-8") as file:
    labels = json.load(file)["id2label"]
session = onnxruntime.InferenceSession(PATH)
ids = np.array([tokenizer.encode("Your text").ids], dtype=np.int64)
(logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = int(logits.argmax())
print(labels[str(best)], f"{probabilities[best]:.3f}")
"""

# Shared by both: from a file to (1, C, S, S) float32.
_READ = """\
def read(path):
    with open("preprocessing.json", encoding="utf-8") as file:
        about = json.load(file)
    image, size = Image.open(path), about["size"]
    image = ImageOps.exif_transpose(image).convert("L" if about["channels"] == "grey" else "RGB")
    box = None
    if about["fit"] == "crop":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, -1) / 255
    pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
    return pixels.transpose(2, 0, 1)[None]
"""

_IMAGE = f"""\
import json

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageClassification


{_READ}

model = AutoModelForImageClassification.from_pretrained(".").eval()
with torch.inference_mode():
    probabilities = model(torch.from_numpy(read("image.png"))).logits.softmax(-1)[0]
best = int(probabilities.argmax())
print(model.config.id2label[best], f"{{probabilities[best]:.3f}}")
"""

_IMAGE_ONNX = f"""\
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


{_READ}

with open("config.json", encoding="utf-8") as file:
    labels = json.load(file)["id2label"]
session = onnxruntime.InferenceSession(PATH)
(logits,) = session.run(["logits"], {{"pixel_values": read("image.png")}})[0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = int(logits.argmax())
print(labels[str(best)], f"{{probabilities[best]:.3f}}")
"""

_LANGUAGE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".").eval()
inputs = tokenizer("Your text", return_tensors="pt", return_token_type_ids=False)
with torch.inference_mode():
    written = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
"""

_LANGUAGE_GGUF = """\
from llama_cpp import Llama

model = Llama(PATH, verbose=False)
print(model.create_completion("Your text", max_tokens=40, temperature=0)["choices"][0]["text"])
"""


def _row(task: Settings) -> str:
    return f"it was taught on rows of at most {task.get('max_tokens')} tokens"


KINDS = {
    "text-classification": Kind(
        "A text classifier", "text-classification", _tokens, _TEXT, _text_onnx
    ),
    "image-classification": Kind(
        "An image classifier", "image-classification", _pixels, _IMAGE, lambda _: _IMAGE_ONNX
    ),
    "language-modeling": Kind(
        "A language model", "text-generation", _row, _LANGUAGE, lambda _: _LANGUAGE_GGUF,
        runs="gguf", by="With llama.cpp, by llama-cpp-python",
    ),
}
