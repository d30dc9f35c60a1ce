"""Of report.json: examples that a student answers otherwise than its teacher."""

from __future__ import annotations

from pydantic import Field

from limbeck.recipe import Spec


class Answer(Spec):
    """What a model holds an example for."""

    label: str
    """Name of the class."""
    probability: float = Field(ge=0, le=1)
    """At temperature 1."""


class Parting(Spec):
    """An image on which student and teacher part."""

    image: str = Field(pattern=r"^data:image/png;base64,[A-Za-z0-9+/]+=*$")
    """As the models see it, or smaller; a data URI."""
    label: str
    """Name of its class."""
    teacher: tuple[Answer, ...] = Field(min_length=1)
    """The teacher's three most probable answers, the first first."""
    student: tuple[Answer, ...] = Field(min_length=1)
    """The student's."""
    kl: float
    """KL(teacher || student) at temperature 1, nats."""
