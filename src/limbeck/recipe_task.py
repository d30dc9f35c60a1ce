"""Settings of a recipe that say what the models do. `recipe` has the rest. No import of torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from limbeck.recipe_data import DataSpec
from limbeck.recipe_teaching import Spec

if TYPE_CHECKING:
    import numpy as np

Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=10)]
_DOCUMENTS = ("prompt", "completion", "messages")
_ONNX = ("hf", "onnx-fp32", "onnx-int8")


class TextTask(Spec):
    """Texts into classes."""

    idle_data: ClassVar[tuple[str, ...]] = ("image", *_DOCUMENTS)  # `data`'s without an effect
    takes_estimators: ClassVar[bool] = False
    has_tokens: ClassVar[bool] = True
    has_labels: ClassVar[bool] = True
    num_views: ClassVar[int] = 1
    formats: ClassVar[tuple[str, ...]] = _ONNX  # that are written where the recipe names none
    primary: ClassVar[str] = "onnx-int8"
    more_formats: ClassVar[tuple[str, ...]] = ()  # that are written where it does
    files: ClassVar[str] = "onnx"  # the folder that they lie in

    kind: Literal["text-classification"]
    """What the models are for."""
    max_tokens: int = Field(128, ge=4, le=8192)
    """Inputs are cut to this many tokens, special tokens included."""


class AugmentSpec(Spec):
    """Further views of each training image: teacher and students see the very same ones."""

    flip: bool = False
    """Mirror left and right, half of the time."""
    shift: int = Field(0, ge=0, le=512)
    """Move by up to this many pixels each way; what comes in is black."""
    mixup: float | None = Field(None, gt=0, le=10)
    """Mix each view but the first with another training image, whose share is drawn from
    Beta(mixup, mixup), at most a half; the labels count by their shares."""
    views: int = Field(8, ge=2, le=256)
    """Of each image; the first is the image as it is. Each epoch takes the next, and after the
    last the first again. The teacher is asked about each once: signals take this times the room."""

    @model_validator(mode="after")
    def _draws_something(self) -> Self:
        if not self.flip and not self.shift and self.mixup is None:
            raise ValueError("`augment` draws nothing: `flip`, `shift`, `mixup`; or leave it out")
        return self


class ImageTask(Spec):
    """Images into classes."""

    idle_data: ClassVar[tuple[str, ...]] = ("text", "columns", "skip_rows", *_DOCUMENTS)
    takes_estimators: ClassVar[bool] = False
    has_tokens: ClassVar[bool] = False
    has_labels: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = _ONNX
    primary: ClassVar[str] = "onnx-int8"
    more_formats: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[str] = "onnx"

    kind: Literal["image-classification"]
    """What the models are for."""
    size: int = Field(ge=4, le=2048)
    """Pixels: images become `size` x `size`."""
    fit: Literal["crop", "stretch"] = "crop"
    """`crop`: the shorter side becomes `size`, and the middle is kept; `stretch`: both sides."""
    channels: Literal["grey", "rgb"] = "rgb"
    """What an image consists of."""
    mean: tuple[Share, ...] | None = None
    """Of each channel, black 0 and white 1; it is subtracted. Default: 0.5."""
    std: tuple[Spread, ...] | None = None
    """Of each channel; it is divided by. Default: 0.5."""
    augment: AugmentSpec | None = None
    """Random changes of the training images. Default: none."""
    convert: bool = False
    """Also take images of other channels (grey among colour, palettes, transparency), and convert
    them; the report says how many."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What to do about an image that is damaged: stop, or go on without it and say so in the
    report."""

    @property
    def num_channels(self) -> int:
        return 1 if self.channels == "grey" else 3

    @property
    def num_views(self) -> int:
        return self.augment.views if self.augment else 1

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Self:
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.num_channels:
                raise ValueError(
                    f"`{name}` has {len(given)} values: {self.num_channels}, one for each channel "
                    f"of {self.channels}"
                )
        if self.augment is not None and self.augment.shift >= self.size:
            raise ValueError(f"`augment.shift` moves the image out of sight: below {self.size}")
        return self


class LanguageTask(Spec):
    """Text that goes on: each token from those before it."""

    idle_data: ClassVar[tuple[str, ...]] = ("image", "label", "label_names", "columns", "skip_rows")
    takes_estimators: ClassVar[bool] = False
    has_tokens: ClassVar[bool] = True
    has_labels: ClassVar[bool] = False
    num_views: ClassVar[int] = 1
    formats: ClassVar[tuple[str, ...]] = ("hf", "gguf-f16", "gguf-q8_0", "gguf-q4_0")
    primary: ClassVar[str] = "gguf-q8_0"
    more_formats: ClassVar[tuple[str, ...]] = ("onnx-fp32",)
    files: ClassVar[str] = "gguf"

    kind: Literal["language-modeling"]
    """What the models are for."""
    max_tokens: int = Field(256, ge=4, le=32768)
    """Of a row. Longer texts go on in the next one; a longer completion is cut at its end."""
    layout: Literal["pack", "pad"] = "pack"
    """`pack`: several documents in a row, which do not see each other; `pad`: one in each."""
    learn: Literal["answer", "all"] = "answer"
    """Which tokens are to be predicted: completions and the assistant's words, or prompts too. Of
    plain text it is all of them."""


class _Arrays(Spec):
    """Arrays of one size, by name, into classes."""

    idle_data: ClassVar[tuple[str, ...]] = ("text", "image", *_DOCUMENTS)
    takes_estimators: ClassVar[bool] = False
    has_tokens: ClassVar[bool] = False
    has_labels: ClassVar[bool] = True
    num_views: ClassVar[int] = 1
    formats: ClassVar[tuple[str, ...]] = _ONNX
    primary: ClassVar[str] = "onnx-int8"
    more_formats: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[str] = "onnx"

    kind: str
    """What the models are for."""


class ArrayTask(_Arrays, ABC):
    """A task of your own (`docs/own_domain.md`): its settings, `read` and `one`."""

    @abstractmethod
    def read(self, path: Path, data: DataSpec) -> Examples:
        """All examples of a file or folder. DataError is for what a user can mend."""

    @abstractmethod
    def one(self, what: str) -> Mapping[str, np.ndarray]:
        """What `limbeck try` was given, a path say, as arrays (1, ...) by name."""


@dataclass(frozen=True)
class Examples:
    """What `ArrayTask.read` returns."""

    arrays: Mapping[str, np.ndarray]
    """By name, a row for each example: `numbers` (N, F) and `categories` (N, K), or `series`
    (N, C, T)."""
    labels: Sequence[str]
    groups: Sequence[str] | None = None
    """Examples with the same stay in the same split: of one speaker, one machine."""


class TabularTask(_Arrays):
    """Rows of a table into classes."""

    takes_estimators: ClassVar[bool] = True

    kind: Literal["tabular"]
    """What the models are for."""
    numbers: tuple[str, ...] | None = None
    """Columns that hold numbers. Default: all but `categories`, and `data`'s label and group."""
    categories: tuple[str, ...] = ()
    """Columns whose values are names: learnt one by one, those of the training rows."""
    missing: Literal["refuse", "fill"] = "refuse"
    """An empty field, null or NaN: stop, or take the training rows' mean (of `categories`: as
    `unknown: ignore` does)."""
    unknown: Literal["refuse", "ignore"] = "refuse"
    """A category that the training rows lack: stop, or go on without what that column says."""

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        columns = [*(self.numbers or ()), *self.categories]
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise ValueError(f"column {twice[0]!r} is named twice: once, in `numbers` or in "
                             "`categories`")  # fmt: skip
        if self.numbers == () and not self.categories:
            raise ValueError("no column is left to learn from: `numbers`, `categories` or both")
        return self


class SeriesTask(_Arrays):
    """Stretches of signals, all of one length, into classes."""

    idle_data: ClassVar[tuple[str, ...]] = (
        "text", "image", "columns", "skip_rows", *_DOCUMENTS
    )  # fmt: skip

    kind: Literal["time-series"]
    """What the models are for."""
    series: str = "series"
    """Where a file has them: the array of a .npz file, (N, C, T) or (N, T) for one channel; or the
    column of a Parquet file, each a list of C lists of T numbers, or of T numbers."""


TASKS = (TextTask, ImageTask, LanguageTask, TabularTask, SeriesTask)
KINDS = tuple(task.model_fields["kind"].annotation.__args__[0] for task in TASKS)  # type: ignore[union-attr]


OWN = "registered"  # the tag of all kinds that others bring
_ENTRY_POINTS = "limbeck.tasks"  # of installed packages: kind = "module:Class"
_registered: dict[str, type[ArrayTask]] = {}


def register(task: type[ArrayTask]) -> type[ArrayTask]:
    """Make a kind of task of your own known: recipes name it by the one value of its `kind`.

    Raises ValueError for a class that is no such task.
    """
    (kind, *others) = getattr(task.model_fields["kind"].annotation, "__args__", (None,))
    if not isinstance(kind, str) or others:
        raise ValueError(f'{task.__name__}.kind is not one text: `kind: Literal["keywords"]`, say')
    if kind in (*KINDS, OWN) or _registered.get(kind, task).__qualname__ != task.__qualname__:
        raise ValueError(f"{task.__name__}: a task of kind {kind!r} is there already")
    if missing := sorted(task.__abstractmethods__):
        raise ValueError(f"{task.__name__} has no `{missing[0]}` of its own")
    _registered[kind] = task
    return task


def task_of(kind: Any) -> type[TextTask | ImageTask | LanguageTask | _Arrays] | None:
    """The settings of a kind; None for what is none. Kinds of others are looked for among
    installed packages."""
    if not isinstance(kind, str):
        return None
    known: dict[str, Any] = dict(zip(KINDS, TASKS, strict=True)) | _registered
    if kind not in known:
        for entry in entry_points(group=_ENTRY_POINTS, name=kind):
            known[kind] = register(entry.load())
    return known.get(kind)


def kinds() -> list[str]:
    """All that are known."""
    return [*KINDS, *_registered]


def _kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return OWN if kind not in KINDS and task_of(kind) else kind


def _of_its_class(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = task_of(value["kind"])
    assert found is not None  # the tag says so
    try:
        return found.model_validate(value)
    except ValidationError as error:  # inside of another one its place would be lost
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(found.model_fields)
            raise ValueError(f"`{name}` is no setting of {value['kind']}: {known}") from None
        wrong = f"`{name}` of {value['kind']} is {first['input']!r}"
        raise ValueError(f"{wrong}: {first['msg']}") from None


# By a function, not by the field's name: `Spec` looks at fields first, which pydantic then forbids.
TaskSpec = Annotated[
    Annotated[TextTask, Tag(KINDS[0])]
    | Annotated[ImageTask, Tag(KINDS[1])]
    | Annotated[LanguageTask, Tag(KINDS[2])]
    | Annotated[TabularTask, Tag(KINDS[3])]
    | Annotated[SeriesTask, Tag(KINDS[4])]
    | Annotated[
        SerializeAsAny[ArrayTask], BeforeValidator(_of_its_class), Tag(OWN),
        WithJsonSchema({"not": {}, "description": "What others register no schema can know."}),
    ],
    Discriminator(_kind),
]
