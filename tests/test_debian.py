"""Descriptions are read as Debian's policy says they are written."""

import json

import pytest

from limbeck.debian import fetch_lists, read_descriptions, write_descriptions
from limbeck.errors import DataError

TRANSLATION = """\
Package: liba-dev
Description-md5: 1
Description-en: headers of liba
 The library does
 one thing.
 .
 It has:
  * a list
  * of two
 and an end.

Package: liba1
Description-md5: 2
Description-en: liba itself
 The library does
 one thing, for users.

Package: liba-twin
Description-en: the same again
 The library does one
 thing, for users.

Package: bare
Description-en: nothing more is said
"""
PACKAGES = """\
Package: liba-dev
Source: a (1.0)
Section: contrib/libdevel

Package: liba1
Source: a
"""


@pytest.fixture
def found(tmp_path):
    (tmp_path / "T").write_text(TRANSLATION)
    (tmp_path / "P").write_text(PACKAGES)
    return read_descriptions(tmp_path / "T", tmp_path / "P", where="x")


def test_paragraphs_lists_and_sources(found, tmp_path):
    assert [(d.package, d.source, d.synopsis) for d in found] == [
        ("liba-dev", "a", "headers of liba"), ("liba1", "a", "liba itself")
    ]  # fmt: skip
    first = ["The library does one thing.", "", "It has:", " * a list", " * of two", "and an end."]
    assert found[0].text.split("\n") == first
    assert found[1].text == "The library does one thing, for users."
    alone = read_descriptions(tmp_path / "T", where="x")
    assert [d.source for d in alone] == ["liba-dev", "liba1"]
    assert [d.section for d in found] == ["libdevel", "unknown"]
    assert [d.section for d in alone] == ["unknown", "unknown"]


def test_they_are_written_as_rows(found, tmp_path):
    write_descriptions(found, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    columns = ["package", "section", "source", "synopsis", "text"]
    assert [sorted(row) for row in rows] == [columns] * 2


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "T").write_text(PACKAGES)
    with pytest.raises(DataError, match="describes no package"):
        read_descriptions(tmp_path / "T", where="x")
    (tmp_path / "T").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(DataError, match="no readable list"):
        read_descriptions(tmp_path / "T", where="x")


@pytest.mark.network
def test_the_machines_own_mirror_has_thousands(tmp_path):
    translation, packages = fetch_lists(tmp_path, where="x")
    found = read_descriptions(translation, packages, where="x")
    assert len(found) > 20_000
    assert len({d.source for d in found}) < 0.8 * len(found)
