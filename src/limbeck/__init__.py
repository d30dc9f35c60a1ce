"""Limbeck distils a model you have into the family of models you need.

    import limbeck
    report = limbeck.distill("quickstart", "runs/quickstart")

The verbs of the command line are functions of the same names.
"""

from limbeck import _startup
from limbeck._api import distill, doctor, plan, recipes, report, try_student
from limbeck.errors import LimbeckError

__all__ = ["LimbeckError", "distill", "doctor", "plan", "recipes", "report", "try_student"]

del _startup
