"""Rows of tables and series that a student answers otherwise than its teacher."""

import numpy as np
import pytest

from limbeck.partings import partings
from limbeck.report.parting import Parting
from limbeck.tasks.arrays import ArrayClassification, Rows, inputs_of, scales_of

NAMES = [f"n{i}" for i in range(9)]


def parted(arrays: dict, about: dict, labels: int = 3) -> list[dict]:
    n = len(next(iter(arrays.values())))
    random = np.random.default_rng(0)
    teacher, student = (random.normal(0, 2, (n, labels)).astype(np.float32) for _ in range(2))
    below = {"categories": (4,) * (arrays["categories"].shape[1] if "categories" in arrays else 0)}
    task = ArrayClassification(
        ("a", "b", "c"), inputs_of(arrays, below), scales_of(arrays), about
    )  # fmt: skip
    rows = Rows(np.arange(n) * 7, np.arange(n) % 3, arrays)
    found = partings(task, rows, teacher, student)
    differ = (teacher.argmax(1) != student.argmax(1)).sum()
    assert 0 < len(found) == min(8, differ)
    assert all(Parting.model_validate(one).label in "abc" for one in found)
    assert [one["kl"] for one in found] == sorted((one["kl"] for one in found), reverse=True)
    return found


def numbers(count: int = 20) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(count, 9)).astype(np.float32)
    values[:, 7] += 1000 * np.arange(count)  # a column is judged by its own spread
    return values


def test_a_row_is_shown_by_its_categories_and_its_most_unusual_numbers():
    values = numbers()
    ids = np.random.default_rng(2).integers(0, 3, (20, 1))
    about = {
        "numbers": [{"name": name, "mean": 0.0} for name in NAMES],
        "categories": [{"name": "colour", "values": ["blue", "x" * 99]}],
    }
    mean, std = values.astype(np.float64).mean(0), values.astype(np.float64).std(0)
    for one in parted({"numbers": values, "categories": ids}, about):
        *cells, (last, colour) = one["row"]
        assert last == "colour" and colour in ("(not known)", "blue", "x" * 39 + "…")
        (row,) = (v for v in values if f"{v[NAMES.index(cells[0][0])]:.4g}" == cells[0][1])
        far = np.argsort(-np.abs((row - mean) / std))[:5]
        assert [name for name, _ in cells] == [NAMES[i] for i in sorted(far)]
        assert [value for _, value in cells] == [f"{row[i]:.4g}" for i in sorted(far)]


def test_columns_without_names_have_numbers_and_other_arrays_are_not_shown():
    few = numbers()[:, :2]
    assert [name for name, _ in parted({"numbers": few}, {})[0]["row"]] == [
        "numbers[0]", "numbers[1]"
    ]  # fmt: skip
    ids = np.ones((20, 1), np.int64)
    assert parted({"categories": ids}, {})[0]["row"] == [["categories[0]", "1"]]
    with pytest.raises(AssertionError, match="0 < 0"):  # nothing to show
        parted({"spectrum": few}, {})


def test_a_series_is_its_first_channels_in_as_many_points_as_a_picture_has():
    waves = np.random.default_rng(3).normal(size=(20, 5, 300)).astype(np.float32)
    one = parted({"series": waves}, {})[0]["series"]
    assert len(one) == 3 and len(one[0]) == 75
    assert any(np.allclose(one[0], w[0].reshape(75, 4).mean(1), atol=1e-3) for w in waves)
    short = parted({"series": waves[:, :1, :7]}, {})[0]["series"]
    assert len(short) == 1 and any(np.allclose(short[0], w[0, :7], rtol=1e-3) for w in waves)
