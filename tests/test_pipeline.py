"""The whole still on a tiny model: once through, again for nothing, and killed along the way."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.energy import NoMeter
from limbeck.errors import DamagedError
from limbeck.pipeline import distill
from limbeck.recipe_file import load_recipe
from limbeck.run import file_sha256
from tiny_world import make_world

# Real processes, forked from one that has imported torch once: imports would be most of the time.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["limbeck.stages", "limbeck.evaluation", "limbeck.pipeline"])


def drive(recipe_file: Path, out: Path, overrides: tuple[str, ...], ran) -> None:
    """One run, as `limbeck distill` makes it; sends the number of stages that really ran.

    A checkpoint each tenth of a second, so that a kill in training has something to resume from;
    and no stop-watch: `test_runtime` times real files, here it would only cost time.
    """
    import limbeck.train
    from limbeck import pipeline, runtime

    limbeck.train._SAVE_EVERY = 0.1
    runtime.time_artifact = lambda *a, **k: runtime.Timing(
        latency_ms=1.0, latency_p95_ms=1.0, latency_iqr_ms=0.0, latency_wall_ms=1.0,
        throughput_per_s=1.0, peak_memory_bytes=1, device="cpu", threads=1, runtime="none", runs=10,
    )  # fmt: skip
    recipe, base = load_recipe(recipe_file, overrides)
    report = pipeline.distill(recipe, out, base=base, meter=NoMeter())
    ran.send(sum(not stage.reused for stage in report.stages))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def start(world: Path, out: Path, *overrides: str):
    receive, send = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=drive, args=(world / "recipe.yaml", out, overrides, send))
    process.start()
    send.close()
    return process, receive


def finish(world: Path, out: Path, *overrides: str) -> int:
    """Stages that really ran."""
    process, receive = start(world, out, *overrides)
    process.join(timeout=300)
    assert process.exitcode == 0
    return receive.recv()


def kill_at(world: Path, out: Path, moment: str) -> bool:
    """SIGKILL once this file is there; whether the process was still at work."""
    process, _ = start(world, out)
    while process.is_alive() and not (out / moment).exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def unkilled(world) -> Path:
    out = world / "unkilled"
    assert finish(world, out) > 0
    return out


def weights(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): file_sha256(p) for p in sorted(out.rglob("*.safetensors"))}


def test_a_run_leaves_a_report_and_no_checkpoint(unkilled):
    from limbeck import load_report

    report = load_report(unkilled)
    assert [s.name for s in report.students] == ["one"]
    assert report.students[0].budget.met
    assert report.teacher.main.quality.value > 0.9  # the classes do not share a word
    assert (unkilled / "report.html").stat().st_size > 1000
    assert not list(unkilled.rglob("*checkpoint*"))


def test_a_student_loads_with_transformers_alone(unkilled):
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A;"
        "from transformers import AutoTokenizer;"
        f"A.from_pretrained({str(unkilled / 'students/one/hf')!r});"
        f"AutoTokenizer.from_pretrained({str(unkilled / 'students/one/hf')!r});"
        "assert 'limbeck' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_second_run_makes_nothing_and_a_changed_budget_only_the_student(world, unkilled):
    before = weights(unkilled)
    assert finish(world, unkilled) == 0
    assert weights(unkilled) == before
    changed = world / "changed"
    subprocess.run(["cp", "-r", unkilled, changed], check=True)
    finish(world, changed, "students.one.budget.params=9000")
    after = weights(changed)
    differ = {name for name in before if before[name] != after.get(name)}
    assert differ == {"students/one/hf/model.safetensors"}  # not the teacher, signals, importance


def test_a_run_killed_at_several_stages_ends_with_the_same_weights(world, unkilled):
    out = world / "killed"
    killed = 0
    for moment in (
        "data/begun.json",
        "teacher/hf/checkpoint.json",
        "signals/begun.json",
        "architecture/begun.json",
        "students/one/hf/checkpoint.json",
        "students/one/measure/begun.json",
    ):
        killed += kill_at(world, out, moment)
    assert killed >= 4, "most moments must have been caught for the test to say anything"
    finish(world, out)
    assert weights(out) == weights(unkilled)


@pytest.mark.parametrize("what", ["checkpoint-*", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named_and_begun_anew_only_on_demand(world, unkilled, what):
    out = world / f"damaged {what[:-2]}"
    assert kill_at(world, out, "teacher/hf/checkpoint.json")
    for path in (out / "teacher/hf").glob(what):
        path.write_bytes(path.read_bytes()[1:])
    recipe, base = load_recipe(world / "recipe.yaml")
    with pytest.raises(DamagedError, match="checkpoint"):
        distill(recipe, out, base=base, meter=NoMeter())
    distill(recipe, out, base=base, meter=NoMeter(), repair=True)
    assert weights(out) == weights(unkilled)


def test_the_teacher_depends_on_the_model_it_starts_from_not_only_on_the_data(tmp_path):
    from limbeck.cache import Fetched
    from limbeck.pipeline import Sources, _Still
    from limbeck.progress import Silent
    from limbeck.recipe_file import fingerprint, load_recipe
    from limbeck.run import Made

    class Recorder:
        def stage(self, name, inputs, make):
            return fingerprint(inputs)

    def of(sha256: str) -> str:
        fetched = Fetched(
            uri="m", path=tmp_path, sha256=sha256, size_bytes=1, origin="local", licence=None,
            fetched="2026-11-24",
        )  # fmt: skip
        sources = Sources(fetched, fetched, None, None)
        still = _Still(Recorder(), load_recipe("quickstart")[0], Silent(), sources)
        return still.teacher(Made(tmp_path, "same data"))

    assert of("a" * 64) == of("a" * 64)
    assert of("a" * 64) != of("b" * 64)
