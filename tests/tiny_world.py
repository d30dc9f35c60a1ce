"""A whole run's inputs in a folder: a tiny random teacher, a table it can learn, a recipe."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import Module
from transformers import BertConfig, PreTrainedTokenizerFast

from limbeck import pipeline, runtime
from limbeck import train as loop
from limbeck.energy import NoMeter
from limbeck.progress import Silent
from limbeck.step import Training
from limbeck.tasks.text_classification import Rows
from tiny_models import bert_config, random_model


def rows_of(examples: Sequence[np.ndarray]) -> Rows:
    """Rows of token ids, padded with 0."""
    numbers = np.arange(len(examples))
    return Rows(numbers, np.zeros_like(numbers), tuple(examples), ("",) * len(examples), 0)


def write_recipe(folder: Path, recipe: dict) -> Path:
    """`recipe.yaml`, with no more evidence, files and timing than it names itself."""
    least = {
        "evidence": {"baselines": "none"},
        "export": {"formats": ["hf"], "primary": "hf"},
        "measure": {"latency_runs": 10},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**least, **recipe}))
    return folder


def save_tokenizer(folder: Path) -> None:
    """Words `w4` to `w98` between [CLS] and [SEP]."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    words |= {f"w{i}": i for i in range(4, 99)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def table(num_rows: int = 260, num_labels: int = 3) -> str:
    """CSV. The classes do not share a word."""
    draw = random.Random(0)
    rows = ["text,label"]
    for i in range(num_rows):
        label = i % num_labels
        text = " ".join(f"w{draw.randrange(4 + 30 * label, 34 + 30 * label)}" for _ in range(6))
        rows.append(f"{text},class {label}")
    return "\n".join(rows) + "\n"


def make_world(folder: Path) -> Path:
    """`teacher/`, `rows.csv` and `recipe.yaml` in the folder."""
    save_tokenizer(folder / "teacher")
    random_model(bert_config()).save_pretrained(folder / "teacher")
    (folder / "rows.csv").write_text(table())
    training = {"epochs": 10, "batch_size": 16, "learning_rate": 3e-3}
    recipe = {
        "name": "tiny",
        "task": {"kind": "text-classification", "max_tokens": 10},
        "data": {"train": "rows.csv", "test_fraction": 0.25},
        "teacher": {"model": "teacher", "tune": {**training}},
        "distill": {"training": training},
        "students": [{"name": "one", "budget": {"params": 12000}}],
        "evidence": {"baselines": "none", "linear": False},
        "export": {"formats": ["hf"], "primary": "hf"},
        "measure": {"latency_runs": 10},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def save_bert(folder: Path, **changes) -> None:
    """The tiny random BERT with its tokenizer and a changed config."""
    random_model(BertConfig(**{**bert_config().to_dict(), **changes})).save_pretrained(folder)
    save_tokenizer(folder)


def make_known_world(folder: Path) -> Path:
    """As `make_world`, with a teacher that knows the task: its head has the data's labels, in an
    order of its own, so that nothing has to be tuned."""
    make_world(folder)
    save_bert(folder / "knows", id2label={0: "class 2", 1: "class 0", 2: "class 1"})
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teacher"] = {"model": "knows"}
    recipe["distill"]["training"]["epochs"] = 1
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "rows.csv").write_text(table(num_rows=90))
    return folder


def timing(latency_ms: float) -> runtime.Timing:
    return runtime.Timing(
        latency_ms=latency_ms, latency_p95_ms=1.0, latency_iqr_ms=0.0, latency_wall_ms=1.0,
        throughput_per_s=1.0, peak_memory_bytes=1, device="cpu", threads=1, runtime="none", runs=10,
    )  # fmt: skip


@contextmanager
def quickly() -> Iterator[None]:
    """No stop-watch and no energy meter: `test_runtime` and `test_measure` have the real ones."""
    with (
        patch.object(pipeline, "CodecarbonMeter", NoMeter),
        patch.object(runtime, "time_artifact", lambda *args, **settings: timing(1.0)),
    ):
        yield


class Said(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Killed(Exception):
    pass


class KillsAt(Silent):
    """A progress bar that ends the run behind a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, amount: int, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def trained(folder: Path, make: Callable[[], Module], lesson: Callable[[], Training], *kills: int):
    """The weights at the end, by name, of a training that is killed behind so many steps each."""
    folder.mkdir()
    with patch.object(loop, "_SAVE_EVERY", 0.0):
        for kill in kills:
            with pytest.raises(Killed):
                loop.train(make(), lesson(), folder, KillsAt(kill))
        loop.train(model := make(), lesson(), folder, Silent())
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}
