"""One interface for every way to store what a teacher says at a position.

A codec gives each position the same number of bytes, so that a store's rows can be mapped into
memory and read at random. It is frozen data; its settings go into a manifest and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.errors import RecipeError
from limbeck.signals.dense import Dense
from limbeck.signals.sampled import Sampled
from limbeck.signals.targets import Targets
from limbeck.signals.topk import TopK
from limbeck.signals.vectors import Embedding, Hidden, Text


class Codec(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """Those it can serve; None: any."""
        ...

    def fields(self, vocab_size: int) -> dict[str, tuple[torch.dtype, int]]:
        """What a position is stored as: name -> type and number of values."""
        ...

    def encode(self, logits: Tensor, keys: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Logits (P, V) of any float type, keys (P, 2) int64 [example id, position] -> fields.

        Fields are (P, width), on the logits' device. A row depends on its logits, its key and the
        seed alone. -inf is a masked entry (probability exactly 0). Raises DataError, naming the
        example, for NaN, +inf, or a row of nothing but -inf.
        """
        ...

    def decode(
        self, fields: Mapping[str, Tensor], vocab_size: int, temperature: float = 1.0
    ) -> Targets:
        """Raises DataError for a temperature that these signals cannot serve."""
        ...


LogitCodec = Dense | TopK | Sampled  # each a `Codec`
VectorCodec = Hidden | Embedding | Text
AnyCodec = LogitCodec | VectorCodec

CODECS: Mapping[str, type[AnyCodec]] = {
    "dense": Dense,
    "topk": TopK,
    "sampled": Sampled,
    "hidden": Hidden,
    "embedding": Embedding,
    "text": Text,
}


def settings_of(codec: AnyCodec) -> dict[str, Any]:
    """For a manifest, as JSON can hold it: {"codec": "topk", "k": 32, ...}."""
    settings = {"codec": codec.name, **asdict(codec)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def codec_from_settings(settings: Mapping[str, Any]) -> AnyCodec:
    """The inverse of `settings_of`; left-out settings take their defaults. Raises RecipeError."""
    given = dict(settings)
    name = given.pop("codec", None)
    if name not in CODECS:
        raise RecipeError("signals.codec", f"{name!r}", allowed=f"one of {', '.join(CODECS)}")
    known = CODECS[name].__dataclass_fields__
    if unknown := given.keys() - known.keys():
        raise RecipeError(
            f"signals.{name}.{min(unknown)}",
            "no such setting",
            allowed=f"one of {', '.join(known)}",
        )
    return CODECS[name](**given)


def logit_codec(settings: Mapping[str, Any]) -> LogitCodec:
    """As `codec_from_settings`, of a codec that is known to be for logits."""
    codec = codec_from_settings(settings)
    assert isinstance(codec, LogitCodec), f"{codec.name} is not for logits"
    return codec


def bytes_per_position(codec: Codec, vocab_size: int) -> int:
    """Exactly what `encode` gives."""
    return sum(dtype.itemsize * width for dtype, width in codec.fields(vocab_size).values())
