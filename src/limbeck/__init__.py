"""Limbeck distils a model you have into the family of models you need.

    import limbeck
    report = limbeck.distill("quickstart", "runs/quickstart")

The verbs of the command line are functions here; `report` and `recipes` are rooms of the package,
so theirs are `load_report` and `list_recipes`.
"""

from limbeck import _startup  # noqa: F401  before torch is imported
from limbeck._api import distill, doctor, list_recipes, load_report, plan, try_student
from limbeck.errors import LimbeckError

__all__ = [
    "LimbeckError",
    "distill",
    "doctor",
    "list_recipes",
    "load_report",
    "plan",
    "try_student",
]
