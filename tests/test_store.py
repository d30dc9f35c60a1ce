"""Stored signals equal what was captured, in whatever order they are asked for, or say so."""

import json
import re

import pytest
import torch

from limbeck.errors import DamagedError, DataError
from limbeck.progress import Silent
from limbeck.signals import capture as capturing
from limbeck.signals.store import open_store
from limbeck.types import Batch, Need, Signal

N, CLASSES = 50, 4
MADE_FROM = {"teacher": "t", "data": "d"}


def truth(example_ids: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, C): what this teacher says, a function of the id alone."""
    return torch.sin(example_ids[:, None] * torch.arange(1.0, CLASSES + 1))


class RowsOf:
    """Ids that are neither sorted nor without gaps, as after a split."""

    ids = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) * 3 + 7).long()

    def __len__(self) -> int:
        return N

    def batch(self, positions) -> Batch:
        ids = self.ids[torch.tensor([*positions])]
        blank = torch.zeros(len(ids), dtype=torch.long)
        return Batch(inputs={}, labels=blank, mask=blank == 0, example_ids=ids)


class Mouth:
    fingerprint = "t"
    provides = frozenset({Need.LOGITS})

    def signal(self, batch, needs) -> Signal:
        return Signal(logits=truth(batch.example_ids))


@pytest.fixture
def capture(monkeypatch):
    monkeypatch.setattr(capturing, "_SHARD", 16)
    monkeypatch.setattr(capturing, "_BATCH", 5)

    def run(folder, made_from=MADE_FROM, teacher=None):
        capturing.capture(
            teacher or Mouth(), RowsOf(), folder, made_from=made_from, progress=Silent()
        )
        return folder

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut_behind(capture, folder, monkeypatch, shards):
    """A capture that was interrupted behind this many shards."""
    append = capturing.Writer.append

    def cut(self, *signals):
        if len(self.manifest["shards"]) == shards:
            raise KeyboardInterrupt
        append(self, *signals)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(capturing.Writer, "append", cut)
        capture(folder)


def test_signals_come_back_by_id_in_any_order(capture, tmp_path):
    store = open_store(capture(tmp_path / "s"))
    asked = RowsOf.ids[torch.randperm(N)[:20]]
    torch.testing.assert_close(store.take(asked), truth(asked), rtol=0, atol=0)
    with pytest.raises(DataError, match="example 1 was not captured"):
        store.take(torch.tensor([7, 1]))


@pytest.mark.parametrize("shards", [0, 1, 2, 3])
def test_a_capture_cut_behind_any_shard_goes_on_to_the_same_bytes(
    capture, tmp_path, monkeypatch, shards
):
    whole = contents(capture(tmp_path / "whole"))
    cut_behind(capture, tmp_path / "cut", monkeypatch, shards)
    asked = []

    class Counting(Mouth):
        def signal(self, batch, needs) -> Signal:
            asked.extend(batch.example_ids.tolist())
            return super().signal(batch, needs)

    assert contents(capture(tmp_path / "cut", teacher=Counting())) == whole
    assert sorted(asked) == sorted(RowsOf.ids[16 * shards :].tolist()), "and nothing twice"


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_named(capture, tmp_path, at, harm):
    folder = capture(tmp_path / "s")
    path = sorted(folder.glob("shard-*"))[at]
    whole = path.read_bytes()
    if harm == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(whole[:-8])
    else:
        path.unlink()
    with pytest.raises(DamagedError, match=re.escape(str(path))) as caught:
        open_store(folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("changed", [{"teacher": "other"}, {"data": "other"}])
def test_signals_of_another_teacher_or_of_other_data_are_not_mixed(capture, tmp_path, changed):
    folder = capture(tmp_path / "s")
    before = contents(folder)
    with pytest.raises(DataError, match="another teacher or other data"):
        capture(folder, made_from=MADE_FROM | changed)
    assert contents(folder) == before
    assert json.loads(before["manifest.json"])["made_from"] == MADE_FROM


def test_a_teacher_without_logits_is_refused(capture, tmp_path):
    class Mute(Mouth):
        provides = frozenset({Need.EMBEDDING})

    with pytest.raises(DataError, match="embedding"):
        capture(tmp_path / "s", teacher=Mute())


def test_a_capture_does_not_go_on_behind_a_damaged_shard(capture, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    cut_behind(capture, folder, monkeypatch, 2)
    path = folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = contents(folder)
    with pytest.raises(DamagedError, match="shard-00000"):
        capture(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}'])
def test_a_torn_manifest_is_named(capture, tmp_path, text):
    folder = capture(tmp_path / "s")
    (folder / "manifest.json").write_text(text)
    for attempt in (capture, open_store):
        with pytest.raises(DamagedError, match=re.escape("manifest.json")):
            attempt(folder)
