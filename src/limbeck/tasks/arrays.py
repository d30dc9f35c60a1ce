"""Arrays of one size into classes: rows of a table, stretches of a signal, whatever a task of your
own makes of its files. What is learnt from are named arrays with a row for each example."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from limbeck import models, nets
from limbeck.errors import RecipeError, SourceError
from limbeck.export.folder import save_model
from limbeck.judging import OfClassifier
from limbeck.recipe import Recipe
from limbeck.run import replaced, write_json
from limbeck.tasks.rows import Held
from limbeck.types import Batch, Input

PREPROCESSING = "preprocessing.json"  # in each model's folder: how its inputs are made
_ALLOWED = f"a folder with the config.json and model.safetensors of a {', '.join(nets.CLASSES)}"
_OVERHEAD = {  # networks of tables with 1 and 2 layers, and some bytes on the safe side
    "hf": (3_000, 600), "onnx-fp32": (4_000, 1_500), "onnx-int8": (6_500, 4_500),
}  # fmt: skip
_TYPES = {"float32": pa.float32(), "int64": pa.int64()}
_COARSE = 1e-4  # of a column's deviation: steps of float32 that are no longer small
_NAMED = 5

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Rows(Held):
    """One split. A row's id is its place in the file that it came from."""

    ids: np.ndarray  # (N,) int64
    labels: np.ndarray  # (N,) int64
    arrays: Arrays  # by name, (N, ...)
    num_views = 1
    num_together = 64

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, positions: Sequence[int]) -> Batch:
        at = np.asarray(positions)
        return Batch(
            inputs={name: torch.from_numpy(array[at]) for name, array in self.arrays.items()},
            labels=torch.from_numpy(self.labels[at]),
            mask=torch.ones(len(at), dtype=torch.bool),
            example_ids=torch.from_numpy(self.ids[at]),
        )

    def taken(self, at: np.ndarray) -> Rows:
        return Rows(self.ids[at], self.labels[at], {k: a[at] for k, a in self.arrays.items()})


@dataclass(frozen=True)
class ArrayClassification:
    """Prepared data in a folder: one Parquet file per split. See `tasks.task.Task`."""

    labels: tuple[str, ...]
    takes: tuple[Input, ...]
    scales: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Of each array of floats: mean and deviation of its columns or channels, on training rows."""
    about: Mapping[str, Any]
    """What `preprocessing.json` says of how inputs are made."""
    folder: Path | None = None

    input_fields: tuple[str, ...] = ()

    def rows(self, split: str) -> Rows:
        assert self.folder is not None
        table = pq.read_table(self.folder / f"{split}.parquet").combine_chunks()
        arrays = {}
        for one in self.takes:
            flat = table[one.name].combine_chunks()
            flat = flat.chunk(0) if isinstance(flat, pa.ChunkedArray) else flat
            values = flat.values.to_numpy(zero_copy_only=True)
            arrays[one.name] = values.reshape(len(table), *one.dims).copy()  # torch wants to write
        return Rows(table["id"].to_numpy(), table["label"].to_numpy(), arrays)

    @property
    def calibrated(self) -> bool:
        """Convolutions gain nothing from ranges that are found anew at each call; of numbers in a
        table each column has its own range, and only what is behind their scaling has one."""
        return any(one.name == "series" for one in self.takes)

    @property
    def judge(self) -> OfClassifier:
        return OfClassifier(self.labels)

    def read_config(self, folder: Path, *, where: str) -> PretrainedConfig:
        config = models.read_any_config(folder, where=where, allowed=_ALLOWED)
        if config.model_type not in nets.CLASSES:
            raise SourceError(
                where, f"{folder} holds a model of type {config.model_type!r}, which does not take "
                f"{' and '.join(one.name for one in self.takes)}", allowed=_ALLOWED,
                fix="name one of these, or a config of its type",
            )  # fmt: skip
        if (folder / "model.safetensors").is_file():
            for name, value in nets.input_fields(config, self.takes).items():
                if (found := getattr(config, name)) != value:
                    raise SourceError(
                        where, f"its {name} is {found}, of the data it is {value}",
                        allowed="a model of the same columns in the same order",
                        fix="choose another model, or name the columns it was trained on",
                    )  # fmt: skip
        self.adapt(config, where=where)
        return config

    def adapt(self, config: PretrainedConfig, *, where: str) -> None:
        try:
            fields = nets.input_fields(config, self.takes)
        except LookupError as error:
            raise RecipeError(
                f"{where}.model_type", f"{config.model_type!r}: {error}",
                allowed=", ".join(nets.serving(self.takes)) or "none: no network takes such arrays",
                fix="name one of these",
            ) from None  # fmt: skip
        for name, value in fields.items():
            setattr(config, name, value)
        models.label_config(config, self.labels)

    def own_labels(self, folder: Path, *, where: str) -> tuple[str, ...] | None:
        config = models.read_any_config(folder, where=where, allowed=_ALLOWED)
        if not config.architectures:
            return None
        return tuple(str(label) for _, label in sorted((config.id2label or {}).items()))

    def build(self, config: PretrainedConfig) -> nn.Module:
        model = nets.CLASSES[config.model_type](config)
        for name, (mean, scale) in self.scales.items():
            model.scaled_input(name).fit(mean, scale)
        return model

    def load(self, folder: Path, *, where: str) -> PreTrainedModel:
        config = self.read_config(folder, where=where)
        return models.load_as(
            nets.CLASSES[config.model_type], folder, config, where=where, allowed=_ALLOWED
        )

    def save(self, model: PreTrainedModel, origin: Path, folder: Path) -> None:  # noqa: ARG002
        save_model(model, folder, labels=self.labels)
        write_json(folder / PREPROCESSING, dict(self.about))

    def inputs(self, config: PretrainedConfig) -> tuple[Input, ...]:  # noqa: ARG002 for any alike
        return self.takes

    def overhead(self, format: str) -> tuple[int, int]:
        return _OVERHEAD[format]

    def preprocessing(self, model: Path) -> Mapping[str, Any]:  # noqa: ARG002 for any alike
        return {"preprocessing": dict(self.about)}

    def example(self) -> str:
        rows = self.rows("train")
        values = ", ".join(
            f"{name} {np.array2string(array[0], precision=3, threshold=12)}"
            for name, array in rows.arrays.items()
        )
        return f"{values}, label {self.labels[rows.labels[0]]!r}"


@dataclass(frozen=True)
class Part:
    """One split before it is written."""

    ids: np.ndarray
    labels: Sequence[str]
    arrays: Arrays


def inputs_of(arrays: Arrays, below: Mapping[str, tuple[int, ...]]) -> tuple[Input, ...]:
    """What an exported file takes of arrays like these; `below`: counts of each integer column."""
    found = []
    for name, array in arrays.items():
        dims = array.shape[1:]
        one = Input(name=name, dims=dims, free=(None,) * len(dims))
        if array.dtype == np.int64:
            one = replace(one, dtype="int64", below=below[name])
        found.append(one)
    return tuple(found)


def scales_of(arrays: Arrays) -> dict[str, tuple[list[float], list[float]]]:
    """Mean and deviation of each column (N, F), or of each channel of what has more dimensions; of
    a column that never changes the deviation is 1."""
    found = {}
    for name, array in arrays.items():
        if array.dtype == np.float32:
            over = (0, *range(2, array.ndim))
            wide = array.astype(np.float64)
            mean, std = wide.mean(over), wide.std(over)
            still = std <= 1e-12 * np.maximum(1.0, np.abs(mean))
            found[name] = (mean.tolist(), np.where(still, 1.0, std).tolist())
    return found


def write_parts(
    folder: Path, labels: Sequence[str], parts: Mapping[str, Part],
    below: Mapping[str, tuple[int, ...]], about: Mapping[str, Any], names: Mapping[str, Any],
) -> None:  # fmt: skip
    """Fill the folder for `open_folder`. `names`: of the columns of each array, for warnings."""
    for split, part in parts.items():
        columns: dict[str, Any] = {
            "id": pa.array(part.ids, pa.int64()),
            "label": pa.array([labels.index(label) for label in part.labels], pa.int64()),
        }
        for name, array in part.arrays.items():
            flat = pa.array(np.ascontiguousarray(array).reshape(-1), _TYPES[str(array.dtype)])
            size = math.prod(array.shape[1:])
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, size)
        with replaced(folder / f"{split}.parquet") as aside:
            pq.write_table(pa.table(columns), aside)
    train = parts["train"].arrays
    scales = scales_of(train)
    write_json(
        folder / "data.json",
        {
            "labels": [*labels], "rows": {split: len(p.ids) for split, p in parts.items()},
            "inputs": [asdict(one) for one in inputs_of(train, below)],
            "scales": {name: [*both] for name, both in scales.items()}, "about": dict(about),
            "warnings": _warnings(parts, scales, names),
        },
    )  # fmt: skip


def open_folder(folder: Path) -> ArrayClassification:
    about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    takes = []
    for one in about["inputs"]:
        below = None if one["below"] is None else tuple(one["below"])
        takes.append(
            Input(
                name=one["name"], dims=tuple(one["dims"]), free=tuple(one["free"]),
                dtype=one["dtype"], below=below,
            )
        )  # fmt: skip
    scales = {name: (mean, scale) for name, (mean, scale) in about["scales"].items()}
    return ArrayClassification(
        tuple(about["labels"]), tuple(takes), scales, about["about"], folder
    )


def _warnings(
    parts: Mapping[str, Part], scales: Mapping[str, Any], names: Mapping[str, Any]
) -> list[str]:
    said = []
    rows = {
        split: {
            b"".join(a[i].tobytes() for a in part.arrays.values()) for i in range(len(part.ids))
        }
        for split, part in parts.items() if split != "validation"
    }  # fmt: skip
    if twins := len(rows["train"] & rows["test"]):
        said.append(f"{twins} different test rows stand value for value in the training rows.")
    for name, (mean, scale) in scales.items():
        known = names.get(name) or [f"{name}[{i}]" for i in range(len(mean))]
        steps = np.spacing(np.abs(np.float32(mean))) / np.asarray(scale)
        if coarse := [n for n, step in zip(known, steps, strict=True) if step > _COARSE]:
            said.append(
                f"float32 is coarse for {', '.join(coarse[:_NAMED])}: far from zero beside how far "
                "values are apart. Subtract a constant first."
            )
    return said


def open_task(recipe: Recipe, folder: Path) -> ArrayClassification:  # noqa: ARG001 for any alike
    return open_folder(folder)
