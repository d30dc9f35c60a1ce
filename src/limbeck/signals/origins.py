"""What signals were made from, each thing by a fingerprint of its own, for a store's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.run import file_sha256


def origins(teacher: Path, rows: Path, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Of a teacher's Hugging Face folder, the file of rows that it is asked about, and of what
    lies between the two (`Task.preprocessing`)."""
    weights = {path.name: file_sha256(path) for path in sorted(teacher.glob("*.safetensors"))}
    return {
        "teacher": {"config": file_sha256(teacher / "config.json"), "weights": weights},
        **preprocessing,
        "data": {"rows": file_sha256(rows)},
    }
