"""What was stored is damaged, the disk is full, the measurement says no: named, and mended."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

import limbeck.run
from conftest import contents
from limbeck import runtime
from limbeck.cli import main
from tiny_world import timing

pytestmark = pytest.mark.usefixtures("quick")


def test_a_budget_that_the_measurement_shows_unmet(distil, run, monkeypatch):
    """Promised for random weights in a temporary folder, broken by the student's own file."""

    def slower(path, *args, **settings):
        return timing(3.0 if "students" in path.parts else 1.0)

    monkeypatch.setattr(runtime, "time_artifact", slower)
    message = distil("students.one.budget={latency_ms: 2}", out=run, code=3)
    assert message.startswith("limbeck: recipe.students.one.budget: ")
    assert "misses its latency budget by 50.0 %: 3 ms, at most 2 ms asked" in message
    report = json.loads((run / "report.json").read_text())
    assert report["students"][0]["budget"]["met"] is False
    assert "misses its latency budget by 50.0 %" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["data/train.parquet", "signals/manifest.json", "signals/shard-00000.safetensors",
     "teacher/hf/model.safetensors", "architecture/axes.json", "students/one/plan/plan.json",
     "students/one/hf/model.safetensors", "students/one/measure/logits.npy"],
)  # fmt: skip
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_file_of_a_stage_is_named(distil, run, name, harm):
    path = run / name
    whole = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes(flipped if harm == "flipped" else whole[:middle])
    before = contents(run)
    message = distil(out=run, code=4)
    assert message.startswith(f"limbeck: {path}: ")
    assert "--repair" in message
    assert ("it is gone" in message) == (harm == "gone")
    assert contents(run) == before


def test_repair_makes_what_is_damaged_and_nothing_else(tiny, finished, run):
    (run / "signals/shard-00000.safetensors").write_bytes(b"")
    (run / "students/one/hf/model.safetensors").unlink()
    (run / "recipe.yaml").write_text("seed: [")
    (run / "teacher/measure/stage.json").write_text('{"fingerprint": 1, "fil')
    again = ["distill", str(tiny / "recipe.yaml"), "--out", str(run), "--repair"]
    assert main(again) == 0
    stages = json.loads((run / "report.json").read_text())["stages"]
    made = {stage["name"] for stage in stages if not stage["reused"]}
    assert made == {"signals", "students/one/hf", "teacher/measure"}
    for name in ("signals/shard-00000.safetensors", "students/one/hf/model.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert (run / "recipe.yaml").read_bytes() == (finished / "recipe.yaml").read_bytes()


def test_a_damaged_recipe_or_report_of_a_run_is_named(distil, refused, run):
    (run / "recipe.yaml").write_text("seed: [")
    message = distil(out=run, code=4)
    assert message.startswith(f"limbeck: {run / 'recipe.yaml'}: ") and "--repair" in message


def fail_to_flush(monkeypatch, name: str) -> None:
    """ENOSPC when a file whose name has this in it is flushed, as a disk with late allocation."""
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if name in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def full_for_the_rows(monkeypatch) -> None:
    fail_to_flush(monkeypatch, "train.parquet")


def full_for_a_record(monkeypatch) -> None:
    fail_to_flush(monkeypatch, "stage.json")


def full_for_weights(monkeypatch) -> None:
    def save(self, folder, **settings):
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise SafetensorError(  # as on a real full disk
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


def full_for_numpy(monkeypatch) -> None:
    def save(path, values):
        Path(path).write_bytes(b"half")
        raise OSError("500000 requested and 25584 written")  # as on a real full disk: no errno

    monkeypatch.setattr(np, "save", save)
    monkeypatch.setattr(limbeck.run, "_free_bytes", lambda folder: 0)


@pytest.mark.parametrize(
    ("fill", "stage"),
    [
        (full_for_the_rows, "data"),
        (full_for_a_record, "data"),
        (full_for_weights, "teacher/hf"),
        (full_for_numpy, "teacher/measure"),
    ],
)
def test_a_full_disk_keeps_what_was_finished_and_the_next_run_goes_on(
    distil, tiny, finished, run, fill: Callable, stage: str
):
    shutil.rmtree(run / stage)
    kept = {path: path.read_bytes() for path in run.rglob("stage.json")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        fill(monkeypatch)
        message = distil(out=run)
        assert str(run) in message and "the disk is full: " in message
        assert "run the same command again" in message
    assert kept == {path: path.read_bytes() for path in run.rglob("stage.json")}
    assert not [*run.rglob("*.part")]
    assert main(["distill", str(tiny / "recipe.yaml"), "--out", str(run)]) == 0
    stages = json.loads((run / "report.json").read_text())["stages"]
    assert [s["name"] for s in stages if not s["reused"]] == [stage]
    assert weights(run) == weights(finished)


def test_what_a_killed_process_was_writing_is_no_part_of_a_stage(distil, tiny, finished, run):
    """safetensors writes beside the file that it is to write (0.8)."""
    stage = run / "signals"
    shutil.rmtree(stage)
    with pytest.MonkeyPatch.context() as patch:
        fail_to_flush(patch, "manifest.json")
        distil(out=run)
    for left in (stage / ".shard-00000.safetensors.1.part", stage / "deeper/.x.json.1.part"):
        left.mkdir(parents=True)
        (left / ".tmpK2aQ3x").write_bytes(b"half a shard")
    assert main(["distill", str(tiny / "recipe.yaml"), "--out", str(run)]) == 0
    made = json.loads((stage / "stage.json").read_text())
    assert made["digest"] == json.loads((finished / "signals/stage.json").read_text())["digest"]
    assert not [*run.rglob("*.part")]


def weights(run: Path) -> dict[Path, bytes]:
    return {p.relative_to(run): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}


def test_a_disk_that_fills_up_in_training_costs_no_finished_step(
    distil, tiny, finished, run, monkeypatch
):
    import limbeck.train

    monkeypatch.setattr(limbeck.train, "_SAVE_EVERY", 0.0)  # a checkpoint at every step
    folder = run / "students/one/hf"
    (folder / "stage.json").unlink()
    with pytest.MonkeyPatch.context() as full:
        fail_to_flush(full, "checkpoint-3")
        assert "the disk is full" in distil(out=run)
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == 2
    firsts = []
    load = limbeck.train._Checkpoint.load
    monkeypatch.setattr(
        limbeck.train._Checkpoint, "load", lambda self: firsts.append(load(self)) or firsts[-1]
    )
    assert main(["distill", str(tiny / "recipe.yaml"), "--out", str(run)]) == 0
    assert firsts == [2]
    assert weights(run) == weights(finished)


def test_a_damaged_checkpoint_is_named_and_repair_trains_from_the_start(
    distil, tiny, finished, run, monkeypatch
):
    import limbeck.train

    monkeypatch.setattr(limbeck.train, "_SAVE_EVERY", 0.0)
    folder = run / "students/one/hf"
    (folder / "stage.json").unlink()
    with pytest.MonkeyPatch.context() as full:
        fail_to_flush(full, "checkpoint-3")
        distil(out=run)
    path = folder / "checkpoint-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = contents(run)
    assert main(["distill", str(tiny / "recipe.yaml"), "--out", str(run)]) == 4
    changed = {name for name, content in contents(run).items() if before.get(name) != content}
    assert changed <= {str(folder / "begun.json"), str(folder / "training.jsonl")}
    assert main(["distill", str(tiny / "recipe.yaml"), "--out", str(run), "--repair"]) == 0
    assert weights(run) == weights(finished)


def test_a_folder_that_cannot_be_written_is_named(distil, tmp_path, monkeypatch):
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if "train.parquet" in path.name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    message = distil()
    assert "cannot be written: Read-only file system" in message
    assert "choose another --out" in message
