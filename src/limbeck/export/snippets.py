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
    library: str = "transformers"
    """That knows the class of the folder."""
    runs: str = "onnx"
    """How the formats of these files begin."""
    by: str = "With ONNX Runtime, and no torch"


def kind_of(recipe: Mapping[str, Any]) -> Kind:
    return KINDS.get(recipe.get("task", {}).get("kind", "text-classification"), _OWN)


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

# Shared by both: a row as the task's files have them, as named arrays of batch 1.
_READ_ROW = """\
def read(row):
    found = {}
    if about["numbers"]:
        found["numbers"] = np.float32([[row[one["name"]] for one in about["numbers"]]])
    if about["categories"]:
        # 0 is a value that the training rows lack
        found["categories"] = np.int64(
            [[one["values"].index(row[one["name"]]) + 1 for one in about["categories"]]]
        )
    return found


with open("preprocessing.json", encoding="utf-8") as file:
    about = json.load(file)
# In place of this your own row, by column: here means, and the first of each column's categories.
row = {one["name"]: one["mean"] for one in about["numbers"]}
row |= {one["name"]: one["values"][0] for one in about["categories"]}
"""

_TABLE = f"""\
import json

import numpy as np
import torch
from limbeck.nets import TabularClassifier


{_READ_ROW}
model = TabularClassifier.from_pretrained(".").eval()
with torch.inference_mode():
    inputs = {{name: torch.from_numpy(array) for name, array in read(row).items()}}
    probabilities = model(**inputs).logits.softmax(-1)[0]
best = int(probabilities.argmax())
print(model.config.id2label[best], f"{{probabilities[best]:.3f}}")
"""

_TABLE_ONNX = f"""\
import json

import numpy as np
import onnxruntime


{_READ_ROW}
with open("config.json", encoding="utf-8") as file:
    labels = json.load(file)["id2label"]
session = onnxruntime.InferenceSession(PATH)
(logits,) = session.run(["logits"], read(row))[0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = int(logits.argmax())
print(labels[str(best)], f"{{probabilities[best]:.3f}}")
"""

# Arrays of whatever task: their names and sizes are the file's own.
_ARRAYS = """\
import json

import numpy as np
import torch
from limbeck import nets

with open("config.json", encoding="utf-8") as file:
    model = nets.CLASSES[json.load(file)["model_type"]].from_pretrained(".").eval()
with torch.inference_mode():
    logits = model(**model.dummy_inputs).logits  # in place of these your own arrays
best = int(logits[0].argmax())
print(model.config.id2label[best], f"{logits.softmax(-1)[0, best]:.3f}")
"""

_ARRAYS_ONNX = """\
import json

import numpy as np
import onnxruntime

with open("config.json", encoding="utf-8") as file:
    labels = json.load(file)["id2label"]
session = onnxruntime.InferenceSession(PATH)
types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
# In place of zeros your own arrays, of these sizes.
inputs = {i.name: np.zeros([1, *i.shape[1:]], types[i.type]) for i in session.get_inputs()}
(logits,) = session.run(["logits"], inputs)[0]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = int(logits.argmax())
print(labels[str(best)], f"{probabilities[best]:.3f}")
"""


def _columns(_: Settings) -> str:
    return "raw numbers and categories by index, as preprocessing.json says"


def _row(task: Settings) -> str:
    return f"it was taught on rows of at most {task.get('max_tokens')} tokens"


KINDS = {
    "text-classification": Kind(
        "A text classifier", "text-classification", _tokens, _TEXT, _text_onnx
    ),
    "image-classification": Kind(
        "An image classifier", "image-classification", _pixels, _IMAGE, lambda _: _IMAGE_ONNX
    ),
    "tabular": Kind(
        "A classifier of table rows", "tabular-classification", _columns, _TABLE,
        lambda _: _TABLE_ONNX, library="limbeck",
    ),
    "language-modeling": Kind(
        "A language model", "text-generation", _row, _LANGUAGE, lambda _: _LANGUAGE_GGUF,
        runs="gguf", by="With llama.cpp, by llama-cpp-python",
    ),
}
_OWN = Kind(
    "A classifier", "other", lambda _: "arrays, as preprocessing.json says", _ARRAYS,
    lambda _: _ARRAYS_ONNX, library="limbeck",
)  # fmt: skip
