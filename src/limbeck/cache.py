"""The cache: what was fetched, beside a record of what it was when it came. One folder a package:

    ORIGIN/PACKAGE/NAME.whl              as downloaded, for the next member
    ORIGIN/PACKAGE/package.json          its sha256, licence and date
    ORIGIN/PACKAGE/members/NAME/entry.json   a `Fetched`, and each file's bytes and sha256
    ORIGIN/PACKAGE/members/NAME/content/...
    ORIGIN/PACKAGE/.aside/               half-done work; it is moved to its place whole

An entry never changes once it is there, so readers need no lock; who makes one holds the package's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from limbeck.errors import DamagedError, SourceError
from limbeck.run import file_sha256, write_json

Files = dict[str, list[Any]]
"""Each file's path and its [bytes, sha256]."""

_log = logging.getLogger(__name__)
_SCHEMA = 1  # of entry.json and package.json; a change fetches everything again


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """A source that lies on the disk, ready to read."""

    uri: str
    path: Path
    """The file or folder."""
    sha256: str
    """Of the downloaded package; of a local file; of a folder's sorted content."""
    size_bytes: int
    """Of `path`; a folder's files together."""
    origin: str
    """'pypi', 'apt', 'hub' or 'local'."""
    licence: str | None
    """As the package's own metadata calls it, where it does."""
    fetched: str
    """ISO date on which it first came; of the last change for a local path."""


_FIELDS = [field.name for field in fields(Fetched)]


def cache_folder() -> Path:
    """$LIMBECK_CACHE, or `limbeck` in the user's cache folder."""
    if own := os.environ.get("LIMBECK_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG standard has relative ones ignored
        return shared / "limbeck"
    try:
        return Path.home() / ".cache" / "limbeck"
    except RuntimeError:
        raise SourceError(
            "LIMBECK_CACHE", "there is no home folder to keep a cache in", fix="set LIMBECK_CACHE"
        ) from None


def cache_entries() -> list[Fetched]:
    """Everything in the cache, by URI."""
    folders = [path.parent for path in cache_folder().glob("*/*/members/*/entry.json")]
    entries = [entry for entry in map(read_entry, folders) if entry is not None]
    return sorted(entries, key=lambda entry: entry.uri)


def config_folder(config: Mapping[str, Any]) -> Fetched:
    """A folder whose config.json is that, for a model that has no weights yet."""
    text = json.dumps(config, indent=1, sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    folder = cache_folder() / "config" / sha256
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    return Fetched(
        uri=f"{config['model_type']}, from a config", path=folder, sha256=sha256,
        size_bytes=len(text), origin="config", licence=None, fetched=today(),
    )  # fmt: skip


def verify(fetched: Fetched) -> None:
    """Read all of it again. Raises DamagedError if a byte differs from when it was fetched."""
    local = fetched.origin == "local"
    record = None if local else read_record(_entry_of(fetched) / "entry.json")
    try:
        now = inventory(fetched.path)
    except OSError as error:
        raise DamagedError(str(fetched.path), f"cannot be read: {error.strerror}") from error
    if record is None:
        different = [] if digest(fetched.path, now) == fetched.sha256 else [fetched.path.name]
    else:
        was: Files = record["files"]
        different = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if different:
        raise DamagedError(
            str(fetched.path), f"{different[0]} is not what it was on {fetched.fetched}",
            fix="restore it" if local else f"remove {_entry_of(fetched)} and run again",
        )  # fmt: skip


@contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """Hold the package's lock, with an empty folder to work in that is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process is fetching %s; waiting for it", folder.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        aside = folder / ".aside"
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def read_entry(folder: Path) -> Fetched | None:
    record = read_record(folder / "entry.json")
    if record is None:
        return None
    return Fetched(**{name: record[name] for name in _FIELDS} | {"path": folder / record["path"]})


def is_whole(entry: Fetched) -> bool:
    """Every recorded file is there in its recorded size, and nothing else. `verify` reads them."""
    record = read_record(_entry_of(entry) / "entry.json")
    if record is None or not entry.path.exists():
        return False
    sizes = {name: file.stat().st_size for name, file in listed(entry.path).items()}
    return sizes == {name: size for name, (size, _) in record["files"].items()}


def _entry_of(entry: Fetched) -> Path:
    return entry.path.parent.parent


def file_name(text: str) -> str:
    """Readable, safe, and different for different texts."""
    last = re.sub(r"[^A-Za-z0-9._]+", "-", text.rpartition("/")[2])[:60]
    return f"{last}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def inventory(path: Path) -> Files:
    return {name: [f.stat().st_size, file_sha256(f)] for name, f in listed(path).items()}


def total_bytes(files: Files) -> int:
    return sum(size for size, _ in files.values())


def digest(path: Path, files: Files) -> str:
    """A file's sha256; a folder's is that of what `sha256sum` prints for its sorted files."""
    if not path.is_dir():
        return str(files[path.name][1])
    lines = "".join(f"{sha256}  {name}\n" for name, (_, sha256) in files.items())
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def listed(path: Path) -> dict[str, Path]:
    """A folder's files by their path in it, sorted; a file by its name. Links are followed."""
    if not path.is_dir():
        return {path.name: path}
    files = {file.relative_to(path).as_posix(): file for file in _walk(path, frozenset())}
    return dict(sorted(files.items()))


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link back up
        return
    for child in folder.iterdir():
        if child.is_dir():
            yield from _walk(child, above | {real})
        elif child.is_file():
            yield child


def read_record(path: Path) -> dict[str, Any] | None:
    """An entry.json or package.json; a damaged one is none."""
    needed = {"file", "sha256", "licence", "fetched"}
    if path.name == "entry.json":
        needed = {"files", *_FIELDS}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("schema") != _SCHEMA or needed - {*record}:
        return None
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_json(path, {"schema": _SCHEMA, **record})


def publish(made: Path, final: Path) -> None:
    """Move it to its place, flushed before and after: a power cut leaves all of it or nothing."""
    final.parent.mkdir(exist_ok=True)
    parts = [made, *made.rglob("*")]
    if len(parts) > 200:
        os.sync()  # one by one would take minutes
        parts = []
    for path in parts:
        _flush(path)
    made.replace(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def today() -> str:
    return datetime.now(UTC).date().isoformat()
