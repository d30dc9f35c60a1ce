"""`limbeck signals`: what a capture holds, whether that still holds, and what may go."""

from __future__ import annotations

from pathlib import Path

from limbeck.signals.store import MANIFEST
from limbeck.signals.verify import Verification, check_files, described, leftovers


def describe(folder: Path) -> dict[str, str]:
    """Title -> value, of a capture's folder or the run that it lies in."""
    return described(_store(folder))


def check(folder: Path, num_rows: int) -> tuple[int, Verification | None]:
    """(checked shards, comparison with the teacher, where the run has it beside the capture).

    Raises DamagedError for a file that is not as it was written, DataError where teacher or rows
    are not those that the signals were made from.
    """
    store = _store(folder)
    shards = check_files(store)
    run = store.parent
    teacher = run / "teacher/hf"
    there = any((teacher / name).is_file() for name in ("config.json", "estimator.json"))
    if not there or not (run / "data/data.json").is_file():
        return shards, None
    from limbeck import stages

    return shards, stages.verify_signals(run, num_rows)


def prune(folder: Path) -> dict[Path, int]:
    """Remove what is no part of the capture; each file with its bytes."""
    gone = {path: path.stat().st_size for path in leftovers(_store(folder))}
    for path in gone:
        path.unlink()
    return gone


def _store(folder: Path) -> Path:
    inside = folder / "signals"
    return inside if not (folder / MANIFEST).exists() and inside.is_dir() else folder
