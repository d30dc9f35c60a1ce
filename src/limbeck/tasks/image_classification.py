"""Image classification: images are decoded once to the size that the recipe says, and served as
batches; training images in several views, each a pure function of seed, example and view."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from limbeck import models
from limbeck.cores import on_each
from limbeck.errors import DataError, RecipeError, SourceError
from limbeck.export.folder import save_model
from limbeck.judging import OfClassifier
from limbeck.recipe import Recipe
from limbeck.recipe_task import AugmentSpec, ImageTask
from limbeck.run import replaced, write_json
from limbeck.tasks.image_files import SUFFIXES, ImageTable, read_images
from limbeck.tasks.image_models import head_labels, other_transform
from limbeck.tasks.images import (
    PREPROCESSING,
    Unreadable,
    augmented,
    drawn,
    partner,
    pixels_of,
    tensor_of,
    transform,
)
from limbeck.tasks.rows import Held
from limbeck.tasks.splits import divided
from limbeck.tasks.task import Outline
from limbeck.types import Batch, Input, Mixed

_CLASSIFIERS = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES  # by model_type
_ALLOWED = "a folder with the config.json and model.safetensors of an image classifier"
_OVERHEAD = {  # ResNets of 3 to 6 blocks, and some bytes on the safe side
    "hf": (6_000, 2_500), "onnx-fp32": (8_000, 2_000), "onnx-int8": (6_000, 5_000),
}  # fmt: skip
_CHUNK = 256  # images decoded at a time
_NAMED = 5  # damaged images that a warning names


@dataclass(frozen=True)
class Rows(Held):
    """One split. A row's id is its place in the source, times the number of views, plus the view's:
    the key under which signals of that very view are stored."""

    places: np.ndarray  # (N,) int64, in the source
    labels: np.ndarray  # (N,) int64
    pixels: np.ndarray  # (N, S, S, C) uint8
    mean: Sequence[float]  # of each channel, black 0 and white 1
    std: Sequence[float]
    augment: AugmentSpec | None = None
    seed: int = 0
    whole: Rows | None = None  # that these were drawn from; mixup takes its partners there
    num_together = 32

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_views(self) -> int:
        return self.augment.views if self.augment else 1

    @property
    def ids(self) -> np.ndarray:
        """Of the images as they are."""
        return self.places * self.num_views

    def batch(self, positions: Sequence[int]) -> Batch:
        """View v of row i stands at v * N + i. `pixel_values` (B, C, S, S)."""
        view, at = np.divmod(np.asarray(positions), len(self))
        values, mixed = self._seen(at, view), None
        if view.any() and self.augment is not None and self.augment.mixup is not None:
            whole, alpha = self.whole or self, self.augment.mixup
            pairs = zip(self.places[at].tolist(), view.tolist(), strict=True)
            found = [partner(alpha, self.seed, i, v, len(whole)) for i, v in pairs]
            others, share = np.array([i for i, _ in found]), torch.tensor([s for _, s in found])
            values = values.lerp_(whole._seen(others, view), share.view(-1, 1, 1, 1))
            mixed = Mixed(labels=torch.from_numpy(whole.labels[others]), share=share)
        return Batch(
            inputs={"pixel_values": values},
            labels=torch.from_numpy(self.labels[at]),
            mask=torch.ones(len(at), dtype=torch.bool),
            example_ids=torch.from_numpy(self.places[at] * self.num_views + view),
            mixed=mixed,
        )

    def _seen(self, at: np.ndarray, view: np.ndarray) -> Tensor:
        """Images `at` in these views, not mixed yet. (B, C, S, S)"""
        pixels = self.pixels[at]
        if view.any():
            assert self.augment is not None
            pairs = zip(self.places[at].tolist(), view.tolist(), strict=True)
            pixels = augmented(pixels, [drawn(self.augment, self.seed, i, v) for i, v in pairs])
        return tensor_of(pixels, self.mean, self.std)

    def taken(self, at: np.ndarray) -> Rows:
        return replace(
            self, places=self.places[at], labels=self.labels[at], pixels=self.pixels[at],
            whole=self.whole or self,
        )  # fmt: skip


@dataclass(frozen=True)
class ImageClassification:
    """Prepared data in a folder: one Parquet file per split. See `tasks.task.Task`."""

    labels: tuple[str, ...]
    spec: ImageTask
    seed: int
    folder: Path | None = None

    calibrated = True  # ranges found anew at each call make an int8 convolution slow and no better

    def rows(self, split: str) -> Rows:
        assert self.folder is not None
        table = pq.read_table(self.folder / f"{split}.parquet").combine_chunks()
        size, about = self.spec.size, transform(self.spec)
        column = table["pixels"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
        pixels = np.frombuffer(column.buffers()[1], np.uint8)[: len(table) * column.type.byte_width]
        return Rows(
            places=table["id"].to_numpy(),
            labels=table["label"].to_numpy(),
            pixels=pixels.reshape(len(table), size, size, self.spec.num_channels),
            mean=about["mean"], std=about["std"],
            augment=self.spec.augment if split == "train" else None, seed=self.seed,
        )  # fmt: skip

    @property
    def judge(self) -> OfClassifier:
        return OfClassifier(self.labels)

    def read_config(self, folder: Path, *, where: str) -> PretrainedConfig:
        config = models.read_any_config(folder, where=where, allowed=_ALLOWED)
        if config.model_type not in _CLASSIFIERS:
            raise SourceError(
                where, f"{folder} holds a model of type {config.model_type!r}, which classifies no "
                "images", allowed=_ALLOWED, fix="choose an image classifier, such as a ResNet",
            )  # fmt: skip
        models.label_config(config, self.labels)
        return config

    def adapt(self, config: PretrainedConfig, *, where: str) -> None:
        models.label_config(config, self.labels)
        _check_takes(self, config, where)

    def own_labels(self, folder: Path, *, where: str) -> tuple[str, ...] | None:
        return head_labels(models.read_any_config(folder, where=where, allowed=_ALLOWED))

    def build(self, config: PretrainedConfig) -> nn.Module:
        model: nn.Module = AutoModelForImageClassification.from_config(
            config, trust_remote_code=False
        )
        return model

    def load(self, folder: Path, *, where: str) -> PreTrainedModel:
        config = self.read_config(folder, where=where)
        return models.load_as(
            AutoModelForImageClassification, folder, config, where=where, allowed=_ALLOWED
        )

    def save(self, model: PreTrainedModel, origin: Path, folder: Path) -> None:  # noqa: ARG002
        save_model(model, folder, labels=self.labels)
        write_json(folder / PREPROCESSING, transform(self.spec))

    @property
    def input_fields(self) -> tuple[str, ...]:
        return ("num_channels",)

    def inputs(self, config: PretrainedConfig) -> tuple[Input, ...]:  # noqa: ARG002 for any alike
        dims = (self.spec.num_channels, self.spec.size, self.spec.size)
        return (Input(name="pixel_values", dims=dims, free=(None,) * 3),)

    def overhead(self, format: str) -> tuple[int, int]:
        return _OVERHEAD[format]

    def preprocessing(self, model: Path) -> Mapping[str, Any]:  # noqa: ARG002 for any alike
        views = self.spec.augment.model_dump() if self.spec.augment else None
        about = {**transform(self.spec), "augment": views}
        return {"preprocessing": about | ({"seed": self.seed} if views else {})}

    def example(self) -> str:
        rows, n = self.rows("train"), self.spec.size
        label = self.labels[rows.labels[0]]
        mean = rows.pixels[0].mean() / 255
        return f"{n} x {n} {self.spec.channels}, brightness {mean:.2f}, label {label!r}"


def open_task(recipe: Recipe, folder: Path) -> ImageClassification:
    assert isinstance(recipe.task, ImageTask)
    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return ImageClassification(tuple(about["labels"]), recipe.task, recipe.seed, folder)


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:  # noqa: ARG001 for any alike
    assert isinstance(recipe.task, ImageTask)
    table = read_images(train, recipe.data, part="train")
    task = ImageClassification(tuple(sorted({*table.labels})), recipe.task, recipe.seed)
    return Outline(task=task, num_rows=len(table.labels), num_classes=len(task.labels))


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:
    """Read, split, decode and check; write `folder` for `open_task`.

    Raises DataError for empty data, too few labels, test labels that training never shows, damaged
    images; RecipeError for a teacher that does not take such images.
    """
    data, spec = recipe.data, recipe.task
    assert isinstance(spec, ImageTask)
    table = read_images(train, data, part="train")
    test_table = table if test is None else read_images(test, data, part="test")
    labels, (train_at, validation_at, test_at) = divided(
        recipe, table.labels, table.groups, None if test is None else test_table.labels
    )
    task = ImageClassification(tuple(labels), spec, recipe.seed)
    said = _passed_over([*table.others, *(test_table.others if test is not None else ())])
    if recipe.teacher.config is not None:
        models.make_config(recipe.teacher.config, where="recipe.teacher.config")
        where = "recipe.teacher.config"
        _check_takes(task, task.read_config(model, where=where), where)
    else:
        where = "recipe.teacher.model"
        _check_takes(task, task.read_config(model, where=where), where)
        said += other_transform(model, spec)
        own = task.own_labels(model, where="recipe.teacher.model")
        if own is not None and sorted(own) == labels:
            labels = list(own)  # in the order that the head has learnt

    hashes, counts, found = {}, {}, _Found([], 0)
    for split, source, at, where in (
        ("train", table, train_at, "recipe.data.train"),
        ("validation", table, validation_at, "recipe.data.train"),
        ("test", test_table, test_at, "recipe.data.test" if test else "recipe.data.train"),
    ):
        with replaced(folder / f"{split}.parquet") as aside:
            hashes[split], counts[split] = _write(aside, source, at, labels, spec, where, found)
    if gone := sorted({table.labels[i] for i in train_at} - counts["train"].keys()):
        raise DataError(
            "recipe.data.train", f"none of the images of {', '.join(gone[:_NAMED])} decodes",
            allowed="one or more of each class", fix="check them, or leave the class out",
        )  # fmt: skip
    rows = {split: count.total() for split, count in counts.items()}
    write_json(
        folder / "data.json",
        {
            "labels": labels, "rows": rows, "views": spec.augment.views if spec.augment else 1,
            "warnings": [*said, *found.warnings(len(hashes["train"] & hashes["test"]))],
        },
    )  # fmt: skip


def _passed_over(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    kinds = f"files that end in {', '.join(SUFFIXES)}"
    return [f"Passed over, as images are {kinds}: {', '.join(names[:_NAMED])}{more}."]


@dataclass
class _Found:
    damaged: list[str]
    converted: int

    def warnings(self, twins: int) -> list[str]:
        said = []
        if n := len(self.damaged):
            named = "; ".join(self.damaged[:_NAMED])
            more = f"; and {n - _NAMED:,} more" if n > _NAMED else ""
            said.append(f"{n:,} damaged images were left out: {named}{more}.")
        if self.converted:
            said.append(f"{self.converted:,} images had other channels and were converted.")
        if twins:
            said.append(f"{twins:,} images of the test rows are pixel for pixel training images.")
        return said


def _write(
    path: Path, table: ImageTable, at: np.ndarray, labels: Sequence[str], spec: ImageTask,
    where: str, found: _Found,
) -> tuple[set[bytes], Counter[str]]:  # fmt: skip
    """Decode these images into one Parquet file: the fingerprints of their pixels, and how many
    of each label."""
    width = spec.size**2 * spec.num_channels
    schema = pa.schema([("id", pa.int64()), ("label", pa.int64()), ("pixels", pa.binary(width))])
    hashes: set[bytes] = set()
    counts: Counter[str] = Counter()
    chunks = [at[start : start + _CHUNK] for start in range(0, len(at), _CHUNK)]
    with pq.ParquetWriter(path, schema) as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of files that are a little wrong
        for chunk, decoded in zip(
            chunks, on_each(partial(_decode, table, spec, where), chunks), strict=True
        ):
            kept: list[int] = []
            values: list[bytes] = []
            for i, one in zip(chunk.tolist(), decoded, strict=True):
                if isinstance(one, str):
                    if spec.unreadable == "refuse":
                        raise DataError(
                            f"{where}, {table.names[i]}", f"does not decode: {one}",
                            allowed="a whole image", fix="remove or mend it, or set "
                            "task.unreadable: skip",
                        )  # fmt: skip
                    found.damaged.append(f"{table.names[i]} ({one})")
                    continue
                pixels, converted = one
                found.converted += converted
                kept.append(i)
                values.append(pixels.tobytes())
            hashes |= {hashlib.blake2b(value, digest_size=16).digest() for value in values}
            counts.update(table.labels[i] for i in kept)
            columns = [
                pa.array(kept, pa.int64()),
                pa.array([labels.index(table.labels[i]) for i in kept], pa.int64()),
                pa.array(values, pa.binary(width)),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    if not counts:
        raise DataError(
            where, f"none of {len(at)} images decodes", allowed="images", fix="check some of them"
        )
    return hashes, counts


def _decode(
    table: ImageTable, spec: ImageTask, where: str, chunk: np.ndarray
) -> list[tuple[np.ndarray, bool] | str]:
    """Pixels and whether they were converted, or why there are none."""
    found: list[tuple[np.ndarray, bool] | str] = []
    for i in chunk.tolist():
        try:
            found.append(pixels_of(table.contents[i], spec, f"{where}, {table.names[i]}"))
        except Unreadable as error:
            found.append(str(error))
    return found


@torch.no_grad()
def _check_takes(task: ImageClassification, config: PretrainedConfig, where: str) -> None:
    """Raises RecipeError for a model that does not take the task's images."""
    shape = (2, *task.inputs(config)[0].dims)
    for device in ("meta", "cpu"):  # some models cannot be run without numbers
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                task.build(config).eval()(pixel_values=torch.zeros(shape))
            return
        except Exception as error:  # each architecture has its own
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
    raise RecipeError(
        where, f"it does not take {task.spec.channels} images of {task.spec.size} pixels: {reason}",
        allowed=f"a model with {task.spec.num_channels} channels, and of this size where its own "
        "is fixed", fix="set task.size and task.channels as it wants them (or its own config "
        "as the task has them: image_size, num_channels), or choose another",
    )  # fmt: skip
