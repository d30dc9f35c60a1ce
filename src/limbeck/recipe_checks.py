"""Rules between a recipe's settings that are too long for its own module. No import of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.recipe_teaching import SignalsSpec

if TYPE_CHECKING:
    from limbeck.recipe import Recipe


def check_uld(recipe: Recipe) -> None:
    """Students of another tokenizer: by what else they can be taught. Raises ValueError."""
    distill = recipe.distill
    if not recipe.of_another_tokenizer:
        return
    if recipe.task.has_labels or recipe.base is None or recipe.base.model is None:
        raise ValueError("`distill.divergence` uld is for language-modeling with students of "
                         "another tokenizer: a `base.model`, or something else")  # fmt: skip
    if recipe.data.messages is not None:
        raise ValueError("`data.messages` are other words in each tokenizer's chat template, which "
                         "uld cannot hold against each other: `prompt` and `completion`, or "
                         "`text`")  # fmt: skip
    idle = {
        "distill.standardize": distill.standardize, "distill.hidden": distill.hidden,
        "distill.embedding": distill.embedding, "distill.on_policy": distill.on_policy,
        "signals": recipe.signals != SignalsSpec(),
    }  # fmt: skip
    for name, given in idle.items():
        if given:
            raise ValueError(f"`{name}` has no effect on students of another tokenizer: leave it "
                             "out")  # fmt: skip
