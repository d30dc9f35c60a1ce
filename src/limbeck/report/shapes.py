"""Of report.json: sizes of an architecture, and what of it matters."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ConfigDict, Field

from limbeck.recipe import Spec


class ShapeEntry(Spec):
    """A student's size along each axis (`hidden`, `ffn`, ...), and the layers it keeps."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]

    layers: tuple[int, ...]
    """Indices of the teacher's layers that were kept, ascending."""

    @classmethod
    def of(cls, sizes: Mapping[str, int], layers: tuple[int, ...]) -> ShapeEntry:
        return cls.model_validate({"layers": layers, **sizes})

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.__pydantic_extra__)


class FrontierPoint(Spec):
    """A shape of an elastic run: a trained size, or one between."""

    name: str | None = None
    """Of the student that has it."""
    trained: bool
    """Whether the run taught it, or only what it shares with those that it taught."""
    shape: ShapeEntry
    """What it keeps."""
    params: int = Field(ge=1)
    """Its parameters."""
    size_mb: float = Field(gt=0)
    """Of the primary file, as predicted, 10^6 bytes."""
    quality: float
    """On validation rows, fp32; a fraction. No row of it was held out from choosing."""
    loss: float
    """Mean cross-entropy on these rows, nats."""
    n: int = Field(ge=1)
    """Validation rows."""


class UnitImportance(Spec):
    """What of the base carries its skill: units that move together, such as one layer's heads."""

    axis: str
    """`heads`, `ffn`, `hidden`, ..."""
    group: str
    """The axis, and where: `heads.3`."""
    units: int = Field(ge=1)
    """How many."""
    cumulative: tuple[float, ...]
    """Share of the importance that the best units carry, at each twentieth of the units."""
    by_unit: tuple[float, ...] | None = None
    """Each unit's own share, in the base's order; null where there are many."""
    total: float
    """Of all units, to hold groups of one axis against each other."""
