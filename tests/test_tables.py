"""Rows of text and label are the same whatever file they lie in; a bad file is named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.errors import DataError
from limbeck.recipe import DataSpec
from limbeck.tasks.tables import read_table

ROWS = [("a text, with a comma", "b"), ("zwei\u00e4 \u2014 \U0001f600", "a"), ('the "third"', "b")]


def spec(**settings) -> DataSpec:
    return DataSpec(train="unused", test="unused", **settings)


def read(path, **settings):
    return read_table(path, spec(**settings), where="data.train")


def write_csv(folder):
    lines = ['"{}","{}"'.format(text.replace('"', '""'), label) for text, label in ROWS]
    (folder / "r.csv").write_text("text,label\r\n" + "\r\n".join(lines), encoding="utf-8")
    return folder / "r.csv"


def write_csv_of_a_spreadsheet(folder):
    path = write_csv(folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    return path


def write_tsv(folder):
    lines = [f"{text}\t{label}\n" for text, label in ROWS]  # quotes are text here
    (folder / "r.tsv").write_text("text\tlabel\n" + "".join(lines), encoding="utf-8")
    return folder / "r.tsv"


def write_json_lines(folder):
    lines = [json.dumps({"label": label, "other": 1, "text": text}) for text, label in ROWS]
    (folder / "r.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "r.jsonl"


def write_parquet(folder):
    columns = dict(zip(("text", "label"), map(list, zip(*ROWS, strict=True)), strict=True))
    pq.write_table(pa.table(columns | {"other": [1, 2, 3]}), folder / "r.parquet")
    return folder / "r.parquet"


FILES = [write_csv, write_csv_of_a_spreadsheet, write_tsv, write_json_lines, write_parquet]


@pytest.mark.parametrize("write", FILES)
def test_every_kind_of_file_gives_the_same_rows(write, tmp_path):
    table = read(write(tmp_path))
    assert [*zip(table.texts, table.labels, strict=True)] == ROWS
    assert table.groups is None


def test_a_folder_of_folders_gives_their_names_as_labels(tmp_path):
    for name, text in (("b", "2"), ("a", "1"), ("a", "0")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{text}.txt").write_text(f"text {text}")
    table = read(tmp_path)
    assert table.texts == ["text 0", "text 1", "text 2"]
    assert table.labels == ["a", "a", "b"]


def test_columns_by_name_a_header_of_ones_own_and_groups(tmp_path):
    (tmp_path / "r.tab").write_text("junk\nmore junk\nx\tone\tg1\n\ny\ttwo\tg2\n")
    table = read(
        tmp_path / "r.tab", columns=("label", "text", "who"), skip_rows=2, group="who"
    )  # fmt: skip
    assert (table.texts, table.labels) == (["one", "two"], ["x", "y"])
    assert table.groups == ["g1", "g2"]


def test_numbers_are_labels_too(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": true}\n')
    assert read(tmp_path / "r.jsonl").labels == ["0", "True"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "words"),
    [
        ("r.csv", b"txt,label\na,b\n", {}, ["no column 'text'", "allowed: txt, label", "'txt'?"]),
        ("r.csv", b"text,text,label\na,b,c\n", {}, ["2 columns are called 'text'"]),
        ("r.csv", b"text;label\na;b\n", {}, ["called 'text;label'", "semicolon", "decimal point"]),
        ("r.tsv", b"text|label\na|b\n", {}, ["called 'text|label'", "a bar between"]),
        ("r.csv", b"text,label\n", {}, ["r.csv has no rows"]),
        ("r.csv", b"", {}, ["no column 'text'"]),
        ("r.csv", b"text,label\na,b\na\n", {}, ["row 2: 1 fields", "allowed: 2: text, label"]),
        ("r.csv", b"text,label\na,b\n,b\n", {}, ["row 2: text is ''"]),
        ("r.csv", b"text,label\na,b\n \t,b\n", {}, ["row 2: text is"]),
        ("r.csv", b"text,label\na,b\nc, \n", {}, ["row 2: label is ' '"]),
        ("r.csv", b"text,label\na,b\n\xff,c\n", {}, ["not UTF-8"]),
        ("r.csv", b'text,label\na,b\n"open,c\n', {}, ["behind row 1", "not readable as CSV"]),
        ("r.csv", b"text,label\na,b\n", {"group": "who"}, ["no column 'who'"]),
        ("r.txt", b"text,label\na,b\n", {}, ["r.txt is of no known kind", ".parquet"]),
        ("r.jsonl", b'{"text": "a", "label": "b"}\n{"text"', {}, ["line 2: not JSON"]),
        ("r.jsonl", b'{"text": "\xff", "label": "b"}\n', {}, ["line 1: not JSON"]),
        ("r.jsonl", b"[" * 100_000, {}, ["line 1: not JSON"]),
        ("r.jsonl", b'["a", "b"]\n', {}, ["line 1: not an object"]),
        ("r.jsonl", b'{"text": "a"}\n', {}, ["line 1: no column 'label'"]),
        ("r.jsonl", b'{"text": 3, "label": "b"}\n', {}, ["row 1: text is 3"]),
        ("r.jsonl", b'{"text": "a", "label": null}\n', {}, ["row 1: label is None"]),
        ("r.jsonl", b'{"text": "a", "label": NaN}\n', {}, ["row 1: label is nan"]),
        ("r.jsonl", b'{"text": "a", "label": ["b"]}\n', {}, ["row 1: label is ['b']"]),
        ("r.jsonl", b'{"text": "a", "label": 1}\n', {"skip_rows": 1}, ["no effect on r.jsonl"]),
        ("r.parquet", b"PAR1 or not", {}, ["r.parquet is not readable as Parquet"]),
        ("r.parquet", b"", {"columns": ("text", "label")}, ["no effect on r.parquet"]),
    ],
)
def test_a_bad_file_is_a_data_error_that_says_where(tmp_path, name, content, settings, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"^data\.train") as caught:
        read(tmp_path / name, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.allowed and caught.value.fix


def test_a_parquet_file_is_read_to_its_end(tmp_path):
    """Its footer is whole, so only reading the columns finds the damage."""
    path = write_parquet(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 24 + whole[28:])
    with pytest.raises(DataError, match="not readable as Parquet"):
        read(path)
    assert pq.ParquetFile(path).metadata.num_rows == len(ROWS)


@pytest.mark.parametrize("harm", ["empty", "no text", "latin 1", "group"])
def test_a_bad_folder_is_a_data_error(tmp_path, harm):
    settings = {"group": "who"} if harm == "group" else {}
    words = {"empty": "no subfolders", "no text": "no .txt file", "latin 1": "not UTF-8"}
    if harm != "empty":
        (tmp_path / "a").mkdir()
    if harm == "latin 1":
        (tmp_path / "a" / "0.txt").write_bytes(b"\xe4")
    with pytest.raises(DataError, match=words.get(harm, "no effect on a folder")):
        read(tmp_path, **settings)
