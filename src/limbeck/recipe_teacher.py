"""Settings of a recipe for a teacher that only answers; `recipe` has the rest. No torch."""

from __future__ import annotations

import sys
from typing import Literal, Self

from pydantic import Field, model_validator

from limbeck.recipe_data import Source
from limbeck.recipe_teaching import Spec

Setting = bool | int | float | str | None
_HARMLESS = frozenset({"collections", "functools"})  # of Python's own modules


class EstimatorSpec(Spec):
    """tabular: any scikit-learn estimator with `predict_proba` (extra 'tabular'). It is asked, and
    never cut: students come from `base`."""

    model: Source | None = None
    """A .skops file. Pickles (.pkl, .joblib) can run code and are refused."""
    trusted: tuple[str, ...] = ()
    """Types in that file which you allow to be loaded, beyond those that skops knows to be
    harmless; a run without them lists what the file asks for."""
    kind: Literal["hist_gradient_boosting", "random_forest", "extra_trees"] | None = None
    """Instead of a file: scikit-learn's classifier of that kind, fitted here on the training
    rows."""
    settings: dict[str, Setting] = Field({}, max_length=40)
    """Of the kind, by scikit-learn's names."""
    search: dict[str, tuple[Setting, ...]] = Field({}, max_length=4)
    """Several values of such settings: each combination is fitted, and the one with the most right
    answers on the validation rows is the teacher."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.model is None) == (self.kind is None):
            raise ValueError("not one estimator: either `model` or `kind`")
        for name in ("settings", "search"):
            if self.model is not None and getattr(self, name):
                raise ValueError(f"`{name}` has no effect on a saved estimator: `kind` has it")
        if self.kind is not None and self.trusted:
            raise ValueError("`trusted` has no effect: what is fitted here is known")
        if twice := sorted({*self.settings} & {*self.search}):
            raise ValueError(f"`{twice[0]}` is in `settings` and `search`: in either of them")
        for name, values in self.search.items():
            if len({*values}) < 2:
                raise ValueError(f"`search.{name}` leaves no choice: two values or more")
        return self

    @model_validator(mode="after")
    def _no_python_itself(self) -> Self:
        """`os.system` is a type to skops too, once it is trusted."""
        for name in self.trusted:
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names - _HARMLESS:
                raise ValueError(f"`trusted` names {name}, with which a file can do anything: "
                                 "types of scikit-learn and the like")  # fmt: skip
        return self
