"""What signals were made from, each thing by a fingerprint of its own, for a store's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.run import file_sha256

_ABOUT = ("config.json", "estimator.json")


def origins(teacher: Path, rows: Path, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Of a teacher's folder (of Hugging Face, or an estimator's), the file of rows that
    it is asked about, and of what lies between the two (`Task.preprocessing`)."""
    found = [*sorted(teacher.glob("*.safetensors")), *sorted(teacher.glob("*.skops"))]
    about = next(path for name in _ABOUT if (path := teacher / name).is_file())
    weights = {path.name: file_sha256(path) for path in found}
    return {
        "teacher": {"config": file_sha256(about), "weights": weights},
        **preprocessing,
        "data": {"rows": file_sha256(rows)},
    }
