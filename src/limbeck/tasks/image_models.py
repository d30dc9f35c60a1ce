"""What a folder of an image classifier says of itself, by transformers or by timm: the labels of
its head, and what it does to an image before it looks at it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from limbeck.models import TIMM
from limbeck.recipe_task import ImageTask
from limbeck.tasks.images import transform

_NEAR = 0.02  # (x - 127) / 128 and a mean of 0.5 are the same to any model


def head_labels(config: PretrainedConfig) -> tuple[str, ...] | None:
    """None for a model without a head for classes."""
    classes = [*(config.architectures or ())]
    if not classes and config.model_type == TIMM and config.num_labels:
        classes = ["TimmWrapperForImageClassification"]  # timm writes none
    if not any("ImageClassification" in name for name in classes):
        return None
    return tuple(str(label) for _, label in sorted((config.id2label or {}).items()))


def other_transform(folder: Path, task: ImageTask) -> list[str]:
    """A sentence where the model was taught with another mean or deviation than the task's."""
    own = _normalisation(folder)
    if own is None:
        return []
    ours = transform(task)
    far = [
        f"{name} {_said(theirs)} (task.{name}: {_said(ours[name])})"
        for name, theirs in own.items()
        if len(theirs) == len(ours[name])
        and max(abs(a - b) for a, b in zip(theirs, ours[name], strict=True)) > _NEAR
    ]
    if not far:
        return []
    return [f"The teacher's own folder asks for images with {' and '.join(far)}; the task's are "
            "what it gets."]  # fmt: skip


def _normalisation(folder: Path) -> dict[str, list[float]] | None:
    """Mean and deviation of each channel, black 0 and white 1, as the folder has them."""
    about = _json(folder / "preprocessor_config.json")
    found = {"mean": about.get("image_mean"), "std": about.get("image_std")}
    if not about:
        about = _json(folder / "config.json").get("pretrained_cfg") or {}  # timm's
        found = {"mean": about.get("mean"), "std": about.get("std")}
    if about.get("do_normalize") is False or about.get("do_rescale") is False:
        return None
    kept = {name: values for name, value in found.items() if (values := _numbers(value))}
    return kept or None


def _numbers(values: Any) -> list[float]:
    whole = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
    return [float(v) for v in values] if whole else []


def _said(values: Any) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
