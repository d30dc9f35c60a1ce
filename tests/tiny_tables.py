"""A whole run's inputs in a folder: a table of three kinds of things, a forest to teach them."""

import csv
from pathlib import Path

import numpy as np

from tiny_world import write_recipe

COLOURS = ("blue", "green", "red")
BASE = {
    "model_type": "limbeck-tabular", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2,
}  # fmt: skip


def things(num_rows: int = 360, seed: int = 0) -> list[dict]:
    """Kind is seen in the width, in the spread of a weight far from zero, and in the colour."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        kind = i % 3
        likely = np.full(3, 0.1)
        likely[kind] = 0.8
        rows.append(
            {
                "width": round(float(random.normal(kind * 2, 1)), 3),
                "weight": round(float(random.normal(1000 + 30 * kind, 20)), 2),
                "colour": str(random.choice(COLOURS, p=likely)),
                "kind": f"kind {kind}",
            }
        )
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_table_world(folder: Path, **changes) -> Path:
    """`things.csv` and `recipe.yaml` in the folder."""
    write_csv(folder / "things.csv", things())
    training = {"epochs": 12, "batch_size": 32, "learning_rate": 1e-2}
    recipe = {
        "name": "tiny",
        "task": {"kind": "tabular", "categories": ["colour"]},
        "data": {"train": "things.csv", "label": "kind", "test_fraction": 0.25},
        "teacher": {
            "estimator": {
                "kind": "extra_trees", "settings": {"n_estimators": 12},
                "search": {"min_samples_leaf": [2, 5]},
            }
        },
        "base": {"config": BASE},
        "distill": {"training": training},
        "students": [{"name": "one", "budget": {"params": 5000}}],
    }  # fmt: skip
    return write_recipe(folder, {**recipe, **changes})
