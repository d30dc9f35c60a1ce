"""Tables handed over in Python: the run keeps what they held."""

import re
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

import limbeck
from limbeck.errors import DataError, RunFolderError
from limbeck.recipe_file import load_recipe
from limbeck.tasks.given import keep_table
from tiny_world import quickly

pytestmark = pytest.mark.usefixtures("own_cache")
DOC = (Path(__file__).parents[1] / "docs/tabular.md").read_text()


def frame(num: int = 200, seed: int = 0) -> pandas.DataFrame:
    """Who calls often has left; its index is in another order and says nothing."""
    draw = np.random.default_rng(seed)
    calls = draw.uniform(0, 10, num)
    columns = {"calls": calls, "age": draw.integers(20, 70, num),
               "left": np.where(calls > 5, "yes", "no")}  # fmt: skip
    return pandas.DataFrame(columns, index=draw.permutation(num))


def example(train, test, out: Path):
    """As docs/tabular.md has it."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", DOC, re.S) if "train=frame" in c)
    scope = {"frame": train, "later": test}
    with quickly():
        exec(code.replace('"runs/churn"', "out"), scope | {"out": out}, scope)
    return scope["report"]


def test_the_documents_example_runs_resumes_and_knows_its_rows(tmp_path):
    train, test = frame(), frame(80, seed=1)
    report = example(train, test, tmp_path / "out")
    assert report.students[0].main.quality.n == len(test)
    assert report.students[0].main.quality.value > 0.8
    recipe, _ = load_recipe(tmp_path / "out")
    kept = parquet.read_table(recipe.data.train.uri)
    assert kept.column_names == ["calls", "age", "left"] and len(kept) == len(train)
    again = example(frame(), pa.Table.from_pandas(test, preserve_index=False), tmp_path / "out")
    assert all(stage.reused for stage in again.stages)
    train.loc[train.index[0], "age"] += 1
    with pytest.raises(RunFolderError, match=r"data\.train"):
        example(train, test, tmp_path / "out")


def test_whatever_speaks_arrow_is_the_same_table():
    class Foreign:  # as polars' frames
        def __init__(self, table):
            self.table = table

        def __arrow_c_stream__(self, requested_schema=None):
            return self.table.__arrow_c_stream__(requested_schema)

    columns = {"text": ["a", "b", None], "label": [1, 2, 3]}
    table = pa.table(columns)
    same = [columns, table, Foreign(table)]
    assert len({keep_table(one, "x")["sha256"] for one in same}) == 1
    assert keep_table({**columns, "label": [1, 2, 4]}, "x") != keep_table(table, "x")


@pytest.mark.parametrize("given", [[1, 2], "rows.csv", {"a": [1], "b": [1, 2]}, {"a": [object()]}])
def test_what_is_no_table_is_refused(given):
    with pytest.raises(DataError, match=r"distill\(train=\.\.\.\).* is not readable as a table"):
        limbeck.distill({}, "nowhere", train=given)
    assert not Path("nowhere").exists()


def test_in_place_of_a_files_data(tmp_path):
    """A recipe in a file names rows, and those handed over are taken."""
    from tiny_world import make_world, table

    folder = make_world(tmp_path)
    (folder / "rows.csv").rename(folder / "other.csv")
    lines = [line.split(",") for line in table(120).splitlines()[1:]]
    columns = dict(zip(("text", "label"), map(list, zip(*lines, strict=True)), strict=True))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", tmp_path / "out", train=columns)
    assert report.students[0].main.quality.n == 30
