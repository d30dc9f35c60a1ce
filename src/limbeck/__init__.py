"""Limbeck distils a model you have into the family of models you need.

    import limbeck
    report = limbeck.distill("quickstart", "runs/quickstart")

The verbs of the command line are functions here; `report` and `recipes` are rooms of the package,
so is `signals`; theirs are `load_report`, `list_recipes`, `describe_signals` and the like.
"""

from limbeck import _startup  # noqa: F401  before torch is imported
from limbeck._api import (
    chat_with,
    describe_signals,
    distill,
    doctor,
    list_recipes,
    load_family,
    load_report,
    plan,
    prune_signals,
    scale,
    try_student,
    verify_signals,
    write_with,
)
from limbeck.errors import LimbeckError

__all__ = [
    "LimbeckError",
    "chat_with",
    "describe_signals",
    "distill",
    "doctor",
    "list_recipes",
    "load_family",
    "load_report",
    "plan",
    "prune_signals",
    "scale",
    "try_student",
    "verify_signals",
    "write_with",
]
