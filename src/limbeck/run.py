"""A run is a folder: every stage's result lies in it beside a manifest of what it was made from.

A stage is skipped when the fingerprint of its inputs has not changed and its files still have
their checksums. A stage that was killed finds its folder as it left it (`resume`) as long as its
inputs are the same; otherwise the folder is emptied first. Files are written aside, flushed and
renamed, so that a reader never sees half of one.

    recipe.yaml          the resolved recipe; `limbeck distill DIR/recipe.yaml` repeats the run
    STAGE/stage.json     fingerprint of the inputs, sha256 of each file, seconds, energy
    STAGE/...            the result
    metrics/NAME.jsonl   training curves, one object a line
    report.{json,md,html}
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from limbeck.errors import DamagedError, LimbeckError, RecipeError, RunFolderError
from limbeck.recipe import Recipe
from limbeck.recipe_file import RECIPE, differences, dump_recipe, fingerprint, load_recipe

# Timings and dates: checked, but not what a stage is made of.
_NOTES = frozenset({"training.jsonl", "provenance.json"})
_RECORDED = frozenset(
    {"fingerprint", "digest", "files", "seconds", "energy_wh", "energy_source"}
)  # fmt: skip
_SCHEMA = 1  # of stage.json; a change makes every stage run again
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EIO,
)  # fmt: skip
_ASIDE = ".part"  # ending of the folders that `replaced` writes in
_PAGE = 4096  # bytes; with less free, nothing can be written


@dataclass(frozen=True, slots=True)
class Energy:
    """Watt-hours of a stage and where the number is from."""

    watt_hours: float | None
    source: str  # 'measured: ...', 'estimated: ...' or 'not metered'


class Meter(Protocol):
    def begin(self, name: str) -> None: ...

    def end(self, name: str) -> Energy: ...  # since `begin`


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """One line of the report's ledger. A reused stage keeps the cost of when it was made."""

    name: str
    seconds: float
    energy_wh: float | None
    energy_source: str
    reused: bool


@dataclass(frozen=True, slots=True)
class Made:
    """A finished stage: where it lies, and a digest of its content for whoever builds on it."""

    folder: Path
    digest: str

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


class Run:
    """The only thing that changes: a folder, and the ledger of what this process did in it."""

    def __init__(self, folder: Path, recipe: Recipe, meter: Meter, *, repair: bool = False) -> None:
        self.folder, self.recipe = folder, recipe
        self.stages: list[StageRecord] = []
        self._meter, self._repair = meter, repair
        self._listeners: list[Callable[[str, bool], None]] = []

    def on_stage(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener(name, reused)` when a stage begins."""
        self._listeners.append(listener)

    def stage(self, name: str, inputs: Any, make: Callable[[Path], None]) -> Made:
        """The result of `make(folder)`, made now or when these inputs were last seen.

        `make` gets the stage's folder, which holds what an interrupted earlier try left there.
        Raises DamagedError if stored files no longer have their checksums (or, with repair, makes
        them again).
        """
        folder = self.folder / name
        wanted = fingerprint(_SCHEMA, name, inputs)
        record = _read_record(folder / "stage.json", _RECORDED)
        if record and record["fingerprint"] == wanted:
            try:
                for file, sha256 in record["files"].items():
                    require_sha256(folder / file, sha256)
            except DamagedError:
                if not self._repair:
                    raise
                shutil.rmtree(folder)
            else:
                self._tell(name, record, reused=True)
                return Made(folder, record["digest"])
        with disk_errors(folder):
            try:
                return self._make(name, folder, wanted, make)
            except DamagedError as error:  # in what an interrupted try had left here
                if not self._repair or not Path(error.where).is_relative_to(folder):
                    raise
                shutil.rmtree(folder)
                return self._make(name, folder, wanted, make)

    def _make(self, name: str, folder: Path, wanted: str, make: Callable[[Path], None]) -> Made:
        begun = _read_record(folder / "begun.json", {"fingerprint", "seconds"})
        if folder.exists() and (begun is None or begun["fingerprint"] != wanted):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spent = begun["seconds"] if begun and begun["fingerprint"] == wanted else 0.0
        for listener in self._listeners:
            listener(name, False)
        write_json(folder / "begun.json", {"fingerprint": wanted, "seconds": spent})
        start = time.monotonic()
        self._meter.begin(name)
        try:
            make(folder)
        except BaseException:
            self._meter.end(name)
            seconds = spent + time.monotonic() - start
            if folder.exists():
                with _ignore_full_disk():
                    write_json(folder / "begun.json", {"fingerprint": wanted, "seconds": seconds})
            raise
        energy = self._meter.end(name)
        (folder / "begun.json").unlink()
        sweep(folder)
        files = {
            str(path.relative_to(folder)): file_sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "stage.json"
        }
        record: dict[str, Any] = {
            "fingerprint": wanted,
            "digest": fingerprint({k: v for k, v in files.items() if k not in _NOTES}),
            "files": files,
            "seconds": round(spent + time.monotonic() - start, 3),
            "energy_wh": energy.watt_hours,
            "energy_source": energy.source,
        }
        write_json(folder / "stage.json", record)
        self._tell(name, record, reused=False)
        return Made(folder, record["digest"])

    def _tell(self, name: str, record: Mapping[str, Any], *, reused: bool) -> None:
        if reused:
            for listener in self._listeners:
                listener(name, True)
        self.stages.append(
            StageRecord(
                name=name,
                seconds=record["seconds"],
                energy_wh=record["energy_wh"],
                energy_source=record["energy_source"],
                reused=reused,
            )
        )


@contextmanager
def open_run(folder: Path, recipe: Recipe, meter: Meter, *, repair: bool = False) -> Iterator[Run]:
    """The run in this folder, locked against a second process.

    Raises RunFolderError if the folder holds results of another recipe (another task, data, teacher
    or seed), or something else entirely, or is in use. Other settings may change: what depends on
    them is made again.
    """
    path = folder / RECIPE
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if {".lock", RECIPE} <= names:  # a recipe without a lock is the user's own file
        if any(folder.rglob("stage.json")):  # a try that made nothing leaves the folder free
            _same_recipe_or_refuse(folder, path, recipe, repair=repair)
    elif folder.exists() and (not folder.is_dir() or names - {".lock"}):
        raise RunFolderError(
            f"--out {folder}", "exists and is not a run folder",
            allowed="a new or empty folder, or one that holds this recipe's run",
            fix="choose another --out",
        )  # fmt: skip
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"--out {folder}", "another process is working in it", allowed="one at a time",
                    fix="wait for it to end",
                ) from None  # fmt: skip
            write_text(path, dump_recipe(recipe))
            yield Run(folder, recipe, meter, repair=repair)


def _same_recipe_or_refuse(folder: Path, path: Path, new: Recipe, *, repair: bool) -> None:
    """Another seed, task, data or teacher is another run; anything else is a change of this one."""
    try:
        old = load_recipe(path)[0]
    except RecipeError as error:
        if repair:  # each stage's fingerprint still keeps two recipes apart
            return
        raise DamagedError(
            str(path), f"is no recipe any more: {error.where}: {error.found}",
            allowed="the recipe of the run that lies there",
            fix="run again with --repair to put this one in its place",
        ) from error  # fmt: skip
    keys = {"name", "seed", "task", "data", "teacher"}
    for where, before, now in differences(
        old.model_dump(mode="json", include=keys), new.model_dump(mode="json", include=keys)
    ):
        raise RunFolderError(
            f"--out {folder}",
            f"holds another recipe's run: {where} is {before!r} there, {now!r} here",
            allowed="changes of students, distill, evidence, export and measure",
            fix="choose another --out",
        )  # fmt: skip


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """All of it or nothing: written aside, flushed, renamed."""
    with replaced(path) as aside, aside.open("wb") as file:
        file.write(data)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes `path`'s place, whole, when the block ends well.

    It lies in a folder of its own, so that what a writer puts beside it (safetensors does) stays
    together: `sweep` removes it where the process was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}{_ASIDE}")
    try:
        aside.mkdir(exist_ok=True)
        yield aside / path.name
        with (aside / path.name).open("rb+") as file:
            os.fsync(file.fileno())
        (aside / path.name).replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing. For a folder that nobody else writes to now."""
    for aside in [path for path in folder.rglob(f".*{_ASIDE}") if path.is_dir()]:
        shutil.rmtree(aside)


def damaged(path: Path) -> DamagedError:
    """What to raise where a stored file is not what was written."""
    found = "it is not what was written there" if path.is_file() else "it is gone"
    return DamagedError(
        str(path), found, allowed="the file as recorded, by its sha256",
        fix="run again with --repair to make it anew",
    )  # fmt: skip


def require_sha256(path: Path, sha256: str) -> None:
    """Raises DamagedError unless the file has this checksum."""
    if not path.is_file() or file_sha256(path) != sha256:
        raise damaged(path)


def read_index(path: Path, needed: Set[str]) -> dict[str, Any] | None:
    """A JSON object that names other files, None where there is none.

    Raises DamagedError for what is no JSON object with these keys: unlike a stage's own record it
    cannot be ignored, since the files that it names would be.
    """
    if not path.exists():
        return None
    record = _read_record(path, needed)
    if record is None:
        raise damaged(path)
    return record


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def json_sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full or unwritable disk as a sentence. What was finished before stays."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        if _is_full(error, folder):
            raise RunFolderError(
                str(getattr(error, "filename", None) or folder),
                f"the disk is full: {_free_bytes(folder):,} bytes are free",
                allowed="room for the rest of the run",
                fix="free some space and run the same command again: it goes on where it stopped",
            ) from error  # fmt: skip
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            named = Path(os.fsdecode(error.filename)) if error.filename else folder
            inside = named.is_relative_to(folder)
            raise RunFolderError(
                str(named), f"cannot be {'written' if inside else 'used'}: {error.strerror}",
                allowed="a folder in which you may write" if inside else "",
                fix="choose another --out" if inside else "check that path",
            ) from error  # fmt: skip
        raise


def _is_full(error: Exception, folder: Path) -> bool:
    """Whoever wrote says it with a number, in words (safetensors), or not at all (numpy, torch)."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if any(os.strerror(number) in str(error) for number in _FULL):
        return True
    writing = isinstance(error, OSError | RuntimeError)
    return writing and _free_bytes(folder) < _PAGE


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def _ignore_full_disk() -> Iterator[None]:
    """The bookkeeping of a failed stage must not hide why it failed."""
    with suppress(OSError):
        yield


def _read_record(path: Path, needed: Set[str]) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None  # a damaged record is no record: the stage is made again
    return record if isinstance(record, dict) and needed <= record.keys() else None
