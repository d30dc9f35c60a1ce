"""Which rows of a table are trained on, chosen on, and measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from limbeck.errors import DataError
from limbeck.recipe import Recipe

_MANY = 20  # labels that a handful of rows may have


def hold_out(
    groups: Sequence[str] | None, rows: np.ndarray, fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """(held out, kept) of the rows, by the groups of the whole table: a group stays together.

    Raises DataError where nothing is left for one of the two.
    """
    keys = [groups[i] if groups else str(i) for i in rows]
    unique = sorted(set(keys))
    random = np.random.default_rng((seed, len(purpose)))
    random.shuffle(unique)
    target, chosen, taken = math.ceil(fraction * len(rows)), set(), 0
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    for key in unique:
        if taken >= target:
            break
        chosen.add(key)
        taken += sizes[key]
    held = np.array([key in chosen for key in keys])
    if held.all() or not held.any():
        raise DataError(
            "recipe.data", f"{len(rows)} rows in {len(unique)} groups leave nothing to train on or "
            f"to hold out for {purpose}", allowed="at least one group of rows for each",
            fix="give more data",
        )  # fmt: skip
    return rows[held], rows[~held]


def limited(rows: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """At most `limit` of them, drawn at random, in order."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng((seed, 99)).permutation(rows)[:limit])


def check_labels(
    labels: Sequence[str], of_table: Sequence[str], rows: np.ndarray, where: str
) -> None:
    """Raises DataError for one label alone, or for rows with a label that is not among them."""
    if len(labels) < 2:
        raise DataError(
            "recipe.data.train", f"the only label is {labels[0]!r}", allowed="two or more",
            fix="check data.label and data.max_train_rows",
        )  # fmt: skip
    unknown = sorted({of_table[i] for i in rows} - {*labels})
    if unknown:
        raise DataError(
            where, f"labels that the training rows lack: {', '.join(unknown[:8])}",
            allowed=f"{len(labels)} labels: {', '.join(labels[:8])}"
            + (", ..." if len(labels) > 8 else ""),
            fix="mend those rows, or set data.label, the split or max_train_rows otherwise",
        )  # fmt: skip


def divided(
    recipe: Recipe, labels: Sequence[str], groups: Sequence[str] | None,
    test_labels: Sequence[str] | None,
) -> tuple[list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """The labels that are learnt, sorted, and which rows are trained on, chosen on, measured on:
    the last of the test table, or of the same one where there is none.

    Raises DataError as `hold_out` and `check_labels` do.
    """
    data, everything = recipe.data, np.arange(len(labels))
    if test_labels is None:
        assert data.test_fraction is not None  # the recipe checked it
        test_at, kept = hold_out(groups, everything, data.test_fraction, recipe.seed, "test")
        test_labels = labels
    else:
        test_at, kept = np.arange(len(test_labels)), everything
    validation_at, train_at = hold_out(
        groups, kept, data.validation_fraction, recipe.seed, "validation"
    )
    train_at = limited(train_at, data.max_train_rows, recipe.seed)
    test_at = limited(test_at, data.max_test_rows, recipe.seed)
    learnt = sorted({labels[i] for i in train_at})
    if len(learnt) > max(_MANY, len(train_at) / 2):
        raise DataError(
            "recipe.data.label", f"{len(learnt):,} labels in {len(train_at):,} training rows: "
            f"{', '.join(learnt[:3])}, ...", allowed="classes, with several rows each",
            fix="name another column; of a quantity, make ranges first",
        )  # fmt: skip
    check_labels(learnt, labels, validation_at, "recipe.data.train (validation rows)")
    check_labels(learnt, test_labels, test_at, "recipe.data.test")
    return learnt, (train_at, validation_at, test_at)
