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


def check_elastic(recipe: Recipe) -> None:
    """One run for all students, or one for each. Raises ValueError."""
    distill, cut = recipe.distill, [s for s in recipe.students if not s.trained]
    if distill.run == "dedicated":
        if cut:
            raise ValueError(
                f"`{cut[0].name}` is not trained, and there is no elastic run to cut it from: "
                "`distill.run: elastic`"
            )
        if distill.rivals > 1:
            raise ValueError("`distill.rivals` has no effect: they are tried in an elastic run")
        if recipe.evidence.dedicated:
            raise ValueError("`evidence.dedicated` has no effect: all students are dedicated")
        return
    trained = [s.name for s in recipe.students if s.trained]
    if unknown := sorted({*recipe.evidence.dedicated} - {*trained}):
        raise ValueError(f"`evidence.dedicated` names {unknown[0]!r}: some of the trained "
                         f"students, {', '.join(trained)}")  # fmt: skip
    if len(cut) == len(recipe.students):
        raise ValueError("no student is trained: one or more with `trained: true`")
    for name, given in (
        ("hidden", distill.hidden), ("embedding", distill.embedding),
        ("training.lora", distill.training.lora),
        ("quantization_aware", distill.quantization_aware),
        ("temperature.candidates", distill.temperature.candidates),
    ):  # fmt: skip
        if given:
            raise ValueError(f"`distill.{name}` is for students in runs of their own: leave "
                             "it out, or `distill.run: dedicated`")  # fmt: skip
    for student in cut:
        if student.epochs or student.learning_rate:
            raise ValueError(f"`epochs` and `learning_rate` have no effect on {student.name}, "
                             "which is not trained: leave them out")  # fmt: skip


def check_quantization(recipe: Recipe) -> None:
    """Rounding that some file of the run has. Raises ValueError."""
    spec = recipe.distill.quantization_aware
    if spec is None:
        return
    if recipe.task.has_labels:
        raise ValueError(f"`distill.quantization_aware` is for GGUF files, and {recipe.task.kind} "
                         "has none: leave it out")  # fmt: skip
    if spec.format not in recipe.export.formats:
        raise ValueError(f"`distill.quantization_aware.format` {spec.format} is no file of this "
                         "run: add it to `export.formats`, or another")  # fmt: skip
    if recipe.distill.training.lora is not None:
        raise ValueError("`distill.quantization_aware` rounds weights that `distill.training.lora` "
                         "lets rest: one of them")  # fmt: skip


def check_lora(recipe: Recipe) -> None:
    """Adapters beside weights that are worth keeping. Raises ValueError."""
    tune = recipe.teacher.tune
    if recipe.teacher.config is not None and tune is not None and tune.lora is not None:
        raise ValueError("`teacher.tune.lora` lets random weights rest: all learn, or a "
                         "`teacher.model`")  # fmt: skip
    if recipe.base is not None and recipe.base.config is not None and recipe.distill.training.lora:
        raise ValueError("`distill.training.lora` lets the random weights of `base.config` rest: "
                         "all learn, or a `base.model`")  # fmt: skip


def check_measure(recipe: Recipe) -> None:
    """What a model of this task and these files can be asked. Raises ValueError."""
    measure, data = recipe.measure, recipe.data
    if measure.secondary_rows is not None and len(recipe.export.formats) == 1:
        raise ValueError(
            "`measure.secondary_rows` has no effect with one format: null, or more formats"
        )
    for name in ("generate", "benchmarks"):
        if getattr(measure, name) is not None and recipe.task.has_labels:
            raise ValueError(f"`measure.{name}` is for models that write, not for "
                             f"{recipe.task.kind}: leave it out")  # fmt: skip
    if measure.generate is None:
        return
    if measure.generate.prompt_tokens is not None and (data.prompt or data.messages):
        raise ValueError("`measure.generate.prompt_tokens` is for plain text, and these data have "
                         "prompts: leave it out")  # fmt: skip
