"""Of report.json: examples that a student answers otherwise than its teacher."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from limbeck.recipe import Spec


class Answer(Spec):
    """What a model holds an example for."""

    label: str
    """Name of the class."""
    probability: float = Field(ge=0, le=1)
    """At temperature 1."""


class Parting(Spec):
    """An image, a row of a table or a stretch of a signal on which student and teacher part."""

    image: str | None = Field(None, pattern=r"^data:image/png;base64,[A-Za-z0-9+/]+=*$")
    """As the models see it, or smaller; a data URI."""
    row: tuple[tuple[str, str], ...] | None = Field(None, min_length=1)
    """Names of columns and what stands in them; of many the categories, and the numbers furthest
    from the mean."""
    series: tuple[tuple[float, ...], ...] | None = Field(None, min_length=1)
    """The first channels; of many points means."""
    label: str
    """Name of its class."""
    teacher: tuple[Answer, ...] = Field(min_length=1)
    """The teacher's three most probable answers, the first first."""
    student: tuple[Answer, ...] = Field(min_length=1)
    """The student's."""
    kl: float
    """KL(teacher || student) at temperature 1, nats."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if [self.image, self.row, self.series].count(None) != 2:
            raise ValueError("not one example: either `image`, `row` or `series`")
        return self

    @property
    def kind(self) -> Literal["image", "row", "series"]:
        """What is shown."""
        if self.image is not None:
            return "image"
        return "row" if self.row is not None else "series"
