"""Stored signals equal what was captured, in whatever order they are asked for, or say so."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from limbeck.errors import DamagedError, DataError, RunFolderError
from limbeck.progress import Silent
from limbeck.signals import capture as capturing
from limbeck.signals import store as storing
from limbeck.signals.codecs import Dense, Sampled, TopK
from limbeck.signals.store import open_store
from limbeck.signals.verify import check_files, verify
from limbeck.types import Batch, Need, Signal
from two_ranks import in_two

N, CLASSES, LENGTH = 50, 40, 6
MADE_FROM = {"teacher": {"weights": "t"}, "tokenizer": "w", "data": "d"}
CODECS = {
    "dense": Dense("fp32"), "half": Dense(), "topk": TopK(5, temperatures=(1.0, 2.0)),
    "sampled": Sampled(7),
}  # fmt: skip


def truth(example_ids: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, T, C): what this teacher says, a function of id and position alone."""
    at = example_ids[:, None] * 10 + torch.arange(LENGTH)
    return 3 * torch.sin(at[..., None] * torch.arange(1.0, CLASSES + 1))


class RowsOf:
    """Ids that are neither sorted nor without gaps, as after a split; 0 to 6 positions count."""

    ids = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) * 3 + 7).long()

    def __len__(self) -> int:
        return N

    def batch(self, positions) -> Batch:
        ids = self.ids[torch.tensor([*positions])]
        mask = torch.arange(LENGTH) < (ids % (LENGTH + 1))[:, None]
        mask[:, 0] &= ids % 2 == 0  # not only ends are left out
        return Batch(inputs={}, labels=mask.long(), mask=mask, example_ids=ids)


class Mouth:
    fingerprint = "t"
    provides = frozenset({Need.LOGITS})

    def signal(self, batch, needs) -> Signal:
        logits = truth(batch.example_ids)
        return Signal(logits=logits.masked_fill(~batch.mask[..., None], torch.nan))


@pytest.fixture
def capture(monkeypatch):
    monkeypatch.setattr(capturing, "_SHARD", 16)
    monkeypatch.setattr(capturing, "_BATCH", 5)

    def run(folder, made_from=MADE_FROM, teacher=None, codec=CODECS["dense"], seed=0):
        capturing.capture(
            teacher or Mouth(), RowsOf(), {folder: codec}, made_from=made_from,
            progress=Silent(), seed=seed,
        )  # fmt: skip
        return folder

    return run


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"
    }


def cut_behind(capture, folder, monkeypatch, shards):
    """A capture that was interrupted behind this many shards."""
    write = capturing.Writer.write

    def cut(self, *signals):
        if len(self.shards) == shards:
            raise KeyboardInterrupt
        write(self, *signals)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(capturing.Writer, "write", cut)
        capture(folder)
    assert not (folder / "manifest.json").exists(), "what has a manifest is whole"
    with pytest.raises(DataError, match="was not finished"):
        open_store(folder)


def said(example_ids) -> torch.Tensor:
    """(B,) -> (P, C): the counted positions of these examples, one's behind the other's."""
    places = [RowsOf.ids.tolist().index(i) for i in example_ids.tolist()]
    return truth(example_ids)[RowsOf().batch(places).mask]


@pytest.mark.parametrize("name", CODECS)
def test_signals_come_back_by_id_in_any_order(capture, tmp_path, name):
    codec = CODECS[name]
    store = open_store(capture(tmp_path / "s", codec=codec, seed=3))
    assert len(store) == N and store.vocab_size == CLASSES
    temperature = (codec.temperatures or (1.5,))[-1]
    for count in (N, 20, 1):
        asked = RowsOf.ids[torch.randperm(N)[:count]]
        batch = RowsOf().batch([RowsOf.ids.tolist().index(i) for i in asked.tolist()])
        fields = codec.encode(said(asked), capturing.keys_of(batch), 3)
        found, counts = store.take(asked)
        assert counts.tolist() == batch.mask.sum(1).tolist()
        assert found.keys() == fields.keys()
        for key, values in fields.items():
            assert torch.equal(found[key], values), "the same bytes in any order and batch"
        targets = store.targets(asked, temperature)
        if name == "dense":
            torch.testing.assert_close(targets.logits, said(asked), rtol=0, atol=0)
    with pytest.raises(DataError, match="example 1 was not captured"):
        store.take(torch.tensor([7, 1]))
    empty = RowsOf.ids[RowsOf.ids % 14 == 7]
    assert not len(next(iter(store.take(empty)[0].values())))


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
    store = open_store(folder)
    lost = {i for shard in [at] for i in RowsOf.ids[16 * shard : 16 * shard + 16].tolist()}
    store.take(torch.tensor([i for i in RowsOf.ids.tolist() if i not in lost]))  # those are sound
    with pytest.raises(DamagedError, match=re.escape(str(path))) as caught:
        store.take(torch.tensor([min(lost)]))
    assert caught.value.exit_code == 4
    with pytest.raises(DamagedError, match=re.escape(str(path))):
        check_files(folder)
    with pytest.raises(DamagedError, match=re.escape(str(path))):
        capture(folder)


@pytest.mark.parametrize(
    "changed", [{"teacher": {"weights": "u"}}, {"tokenizer": "v"}, {"data": "e"}, {"more": 1}]
)
def test_signals_of_something_else_are_neither_mixed_nor_opened(capture, tmp_path, changed):
    folder = capture(tmp_path / "s")
    before = contents(folder)
    other = MADE_FROM | changed
    where, there, here = next(iter(storing.differences(MADE_FROM, other)))
    both = f"made_from.{where} is {there!r} there; allowed: {here!r}, as here"
    with pytest.raises(DataError, match=re.escape(both)):
        capture(folder, made_from=other)
    with pytest.raises(DataError, match=re.escape(both.removeprefix("made_from."))):
        open_store(folder, made_from=other)
    open_store(folder, made_from=MADE_FROM)
    assert contents(folder) == before
    for settings in ({"codec": CODECS["half"]}, {"seed": 1}):
        with pytest.raises(DataError, match="another capture"):
            capture(folder, **settings)
    assert contents(folder) == before


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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}', '{"schema": 2}'])
def test_a_torn_manifest_is_named(capture, tmp_path, text):
    folder = capture(tmp_path / "s")
    (folder / "manifest.json").write_text(text)
    for attempt in (capture, open_store):
        with pytest.raises(DamagedError, match=re.escape("manifest.json")):
            attempt(folder)


def test_a_store_of_another_schema_is_refused(capture, tmp_path):
    folder = capture(tmp_path / "s")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(DataError, match="schema 99; allowed: schema 2"):
        open_store(folder)


def test_a_full_disk_loses_no_finished_shard(capture, tmp_path, monkeypatch):
    whole = contents(capture(tmp_path / "whole"))
    written = []

    def full(tensors, path):
        if len(written) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        storing_save(tensors, path)

    storing_save = storing.save_file
    folder = tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(storing, "save_file", full)
        capture(folder)
    assert sorted(p.name for p in folder.glob("shard-*")) == [
        "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip
    assert contents(capture(folder)) == whole


# Forked from a process that has imported torch and started no threads.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["limbeck.stages", "limbeck.evaluation", "limbeck.pipeline"])


class Slow(Mouth):
    def signal(self, batch, needs) -> Signal:
        time.sleep(0.01)
        return super().signal(batch, needs)


def capture_slowly(folder: Path, begun) -> None:
    begun.send(True)
    capturing._SHARD, capturing._BATCH = 16, 5
    capturing.capture(
        Slow(), RowsOf(), {folder: CODECS["dense"]}, made_from=MADE_FROM, progress=Silent()
    )


def test_two_processes_do_not_capture_into_one_folder(capture, tmp_path):
    folder = tmp_path / "s"
    writer = storing.Writer(folder, MADE_FROM, CODECS["dense"])
    with writer.open(), pytest.raises(RunFolderError, match="another process"):
        capture(folder)
    assert open_store(capture(folder))


def test_killed_at_thirty_random_moments_it_ends_with_the_same_bytes(capture, tmp_path):
    whole = contents(capture(tmp_path / "whole"))
    draw, number, left_at = random.Random(0), 0, set()
    for attempt in range(300):
        if attempt >= 30 and len(left_at) >= 3:
            break  # on a busy machine it takes more of them
        folder = tmp_path / f"s{number}"
        begun, send = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=capture_slowly, args=(folder, send))
        process.start()
        begun.recv()
        time.sleep(draw.uniform(0, 0.08 * (1 + attempt / 30)))
        process.kill()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        left_at.add(len([*folder.glob("shard-*")]) if killed else "end")
        number += (folder / "manifest.json").exists()  # whole: the next one begins anew
    assert len(left_at) >= 3, f"kills must fall into different moments, not {left_at}"
    for folder in [path for path in tmp_path.glob("s*") if path.is_dir()]:
        assert contents(capture(folder)) == whole, "and nothing of the killed beside it"


@pytest.mark.parametrize("cut", [False, True])
def test_two_ranks_give_the_bytes_of_one(capture, tmp_path, monkeypatch, cut):
    whole, folder = contents(capture(tmp_path / "whole")), tmp_path / "s"
    if cut:
        cut_behind(capture, folder, monkeypatch, 1)
    code = (
        "import test_store as t; t.capturing._SHARD, t.capturing._BATCH = 16, 5;"
        "t.capturing.capture(t.Mouth(), t.RowsOf(), {Path(sys.argv[2]): t.CODECS['dense']},"
        " made_from=t.MADE_FROM, progress=t.Silent())"
    )
    in_two(code, folder)
    assert contents(folder) == whole


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_reading_a_large_store_takes_flat_memory(tmp_path, monkeypatch):
    """64 MB of shards, all of them read: they are mapped, not loaded."""
    rows, width = 4000, 4096

    class Many:
        def __len__(self) -> int:
            return rows

        def batch(self, positions) -> Batch:
            ids = torch.tensor([*positions])
            mask = torch.ones(len(ids), dtype=torch.bool)
            return Batch(inputs={}, labels=ids, mask=mask, example_ids=ids)

    class Wide(Mouth):
        def signal(self, batch, needs) -> Signal:
            return Signal(logits=batch.example_ids[:, None].float().expand(-1, width))

    capturing.capture(
        Wide(), Many(), {tmp_path: Dense("fp32")}, made_from=MADE_FROM, progress=Silent()
    )
    store = open_store(tmp_path)
    order = torch.randperm(rows)
    store.take(order[:32])
    before = anonymous_bytes()
    for batch in order.split(32):
        fields, _ = store.take(batch)
        assert (fields["logits"][:, 0] == batch).all()
    assert anonymous_bytes() - before < 8e6


@pytest.mark.parametrize("name", CODECS)
def test_verify_asks_the_teacher_again(capture, tmp_path, name):
    folder = capture(tmp_path / "s", codec=CODECS[name])
    found = verify(folder, Mouth(), RowsOf(), num_rows=30)
    again = verify(folder, Mouth(), RowsOf(), num_rows=30)
    assert found == again and found.positions > 50
    assert found.largest_difference <= (2e-3 if name == "half" else 1e-6)
    if name == "sampled":
        assert found.kl is None and abs(found.bias_score) < 3
        assert found.gradient_bias < found.gradient_error / 3
    else:
        assert found.kl < (1.0 if name == "topk" else 1e-5)
        assert (found.gradient_bias > 0.05) == (name == "topk"), "its bias is no noise"

    class Other(Mouth):
        def signal(self, batch, needs) -> Signal:
            return Signal(logits=truth(batch.example_ids + 1))

    assert verify(folder, Other(), RowsOf(), num_rows=30).largest_difference > 0.01


def test_the_teacher_is_asked_once_for_two_students_and_two_temperatures(capture, tmp_path):
    asked = []

    class Counting(Mouth):
        def signal(self, batch, needs) -> Signal:
            asked.extend(batch.example_ids.tolist())
            return super().signal(batch, needs)

    folder = capture(tmp_path / "s", teacher=Counting(), codec=CODECS["topk"])
    for temperature, _ in itertools.product((1.0, 2.0), range(2)):
        targets = open_store(folder, MADE_FROM).targets(RowsOf.ids[:9], temperature)
        mass = targets.probs.sum(-1) + targets.tail
        torch.testing.assert_close(mass, torch.ones_like(mass))
    with pytest.raises(DataError, match="cannot be served"):
        open_store(folder).targets(RowsOf.ids[:9], 3.0)
    capture(folder, teacher=Counting(), codec=replace(CODECS["topk"]))
    assert sorted(asked) == sorted(RowsOf.ids.tolist())
