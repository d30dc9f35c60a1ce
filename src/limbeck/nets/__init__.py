"""Small networks of our own, for tables and time series: transformers models, built from a config.

transformers has no such architectures. These are known to its Auto classes once limbeck is
imported; the exported ONNX files need neither. Field names are transformers', so that the axes of a
config mean the same here as everywhere (`architecture.probe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from limbeck.nets.series import (
    SeriesConvClassifier,
    SeriesConvConfig,
    SeriesTransformerClassifier,
    SeriesTransformerConfig,
)
from limbeck.nets.table import TabularClassifier, TabularConfig
from limbeck.types import Input

__all__ = [
    "CLASSES", "SeriesConvClassifier", "SeriesConvConfig", "SeriesTransformerClassifier",
    "SeriesTransformerConfig", "TabularClassifier", "TabularConfig", "input_fields", "serving",
]  # fmt: skip

CLASSES: dict[str, type[Any]] = {
    made.config_class.model_type: made
    for made in (TabularClassifier, SeriesConvClassifier, SeriesTransformerClassifier)
}
for _kind, _made in CLASSES.items():
    AutoConfig.register(_kind, _made.config_class, exist_ok=True)


def input_fields(config: PretrainedConfig, inputs: Sequence[Input]) -> dict[str, Any]:
    """What of a config the data decide. Raises LookupError for arrays that its model does not
    take."""
    given = {one.name: one for one in inputs}
    takes = CLASSES[config.model_type].takes
    if not given.keys() <= {*takes}:
        raise LookupError(f"takes {' and '.join(takes)}, not {' and '.join(given)}")
    fields: dict[str, Any] = CLASSES[config.model_type].fields(given)
    if (patch := getattr(config, "patch_size", 0)) > (length := fields.get("length", patch)):
        raise LookupError(f"patch_size {patch} is longer than the series, {length}")
    if (kernel := getattr(config, "kernel_size", 1)) % 2 == 0:
        raise LookupError(f"kernel_size {kernel} has no middle: an odd one")
    return fields


def serving(inputs: Sequence[Input]) -> tuple[str, ...]:
    """Which of these networks take such arrays."""
    names = {one.name for one in inputs}
    return tuple(kind for kind, made in CLASSES.items() if names <= {*made.takes})
