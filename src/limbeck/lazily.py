"""What the stages do, imported (and torch with it) only when one really runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Lazily:
    """A module, imported at the first use."""

    module: str

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.module), name)


stages: Any = _Lazily("limbeck.stages")
teaching: Any = _Lazily("limbeck.teaching")
scaling: Any = _Lazily("limbeck.scaling")
evaluation: Any = _Lazily("limbeck.evaluation")
texts: Any = _Lazily("limbeck.texts")
