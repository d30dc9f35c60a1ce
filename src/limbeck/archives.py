"""Packages of PyPI and Debian: downloaded by their own tools, opened as if an enemy had made them.

Nothing of a package is installed, imported or run: files are read out of it, and that is all. Whose
mirror serves it is the user's configuration of pip and apt.
"""

from __future__ import annotations

import difflib
import email.parser
import errno
import importlib.util
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from limbeck.errors import SourceError

Tell = Callable[[str, int, int], None]
"""`tell(label, done, total)` in bytes; total is 0 where nobody knows it."""

MAX_BYTES = 20 * 10**9  # of one download, and of what one entry unpacks to
MAX_MEMBERS = 100_000
MAX_RATIO, RATIO_FROM_BYTES = 200, 50_000_000  # text packs 5 to 20 times, a bomb 1,000 times
_METADATA_BYTES = 1_000_000
_CHUNK = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error,
    EOFError, OverflowError, RuntimeError, ValueError,
)  # fmt: skip
"""All that zipfile raises for bytes that are no proper zip file, or an encrypted one."""


class MemberError(SourceError):
    """The package is fine; it does not hold the file that was asked for."""


def download_wheel(package: str, folder: Path, *, where: str, tell: Tell) -> Path:
    """The wheel of `NAME==VERSION`, in `folder`. Raises SourceError if pip cannot deliver it."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            where, "pip, which downloads the package, is not installed in this environment",
            fix="`python -m ensurepip`, or `uv pip install pip`",
        )  # fmt: skip
    # -P: a folder called `pip` in the working directory must not be run. Limbeck's cache keeps the
    # wheel, so pip's need not.
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--no-color",
        "--progress-bar", "off", "--dest", str(folder), package,
    ]  # fmt: skip
    code, output = _run(command, folder, where=where, label=f"download {package}", tell=tell)
    wheels = [*folder.glob("*.whl")]
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    raise SourceError(
        where, f"pip could not download {package}: {_reason(output, 'ERROR:')}",
        allowed="a package with a wheel for this Python",
        fix="check the name, the version, the connection and pip's index settings",
    )  # fmt: skip


def download_deb(package: str, folder: Path, *, where: str, tell: Tell) -> Path:
    """The .deb of `package` that the machine's apt chooses, in `folder`."""
    _need("apt-get", where)
    _need("dpkg", where)
    command = ["apt-get", "download", package]
    label = f"download {package}"
    code, output = _run(command, folder, where=where, label=label, tell=tell, cwd=folder)
    debs = [*folder.glob("*.deb")]
    if code == 0 and len(debs) == 1:
        return debs[0]
    raise SourceError(
        where, f"apt-get could not download {package}: {_reason(output, 'E:')}",
        fix="`apt-get update` renews apt's lists; `apt-cache policy` shows whether it is in them",
    )  # fmt: skip


def unpack_wheel(file: Path, member: str, to: Path, *, where: str, tell: Tell) -> None:
    """The file or folder `member` of the wheel, as `to/NAME`, in a new folder `to`.

    Raises MemberError if there is none, SourceError if the wheel is damaged or unsafe.
    """
    name = member.rpartition("/")[2]
    try:
        with zipfile.ZipFile(file) as archive:
            chosen = _choose(archive.infolist(), member, where=where, package=file.name)
            total, done = sum(info.file_size for info in chosen), 0
            with disk(where, to, total):
                for info in chosen:
                    target = to / info.filename[len(member) - len(name) :]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as packed, target.open("xb") as plain:
                        while chunk := packed.read(_CHUNK):
                            done += plain.write(chunk)
                            tell(f"unpack {file.name}", done, total)
                    if target.stat().st_size != info.file_size:  # zipfile lets a short one pass
                        raise zipfile.BadZipFile(f"{info.filename} is shorter than declared")
    except _DAMAGED as error:
        raise SourceError(
            where, f"{file.name} is damaged: {error}",
            allowed="a complete zip file whose checksums fit", fix="fetch it again",
        ) from error  # fmt: skip


def unpack_deb(file: Path, member: str, to: Path, *, where: str, tell: Tell) -> None:
    """The file or folder `member` of the .deb, as `to/NAME`; all of it lies beside `to` after."""
    _need("dpkg", where)
    tree = to.with_name("tree")
    tree.mkdir()
    command = ["dpkg", "-x", str(file), str(tree)]
    code, output = _run(command, to.parent, where=where, label=f"unpack {file.name}", tell=tell)
    if code != 0:
        raise SourceError(where, f"{file.name} is damaged: {_reason(output)}", fix="fetch it again")
    start = _inside(tree / member, tree, where=where, package=file.name)
    if not start.exists():
        names = [path.relative_to(tree).as_posix() for path in tree.rglob("*")]
        raise _no_member(names, member, where=where, package=file.name)
    name = member.rpartition("/")[2]
    pairs: list[tuple[Path, Path]] = []
    for path in [start] if start.is_file() else sorted(start.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        real = _inside(path, tree, where=where, package=file.name)
        if not real.is_file():
            raise _unsafe(where, file.name, f"{path.relative_to(tree)} is no plain file")
        pairs.append((real, to / name / path.relative_to(start)))
    if not pairs:
        raise _no_member([], member, where=where, package=file.name)
    total = sum(real.stat().st_size for real, _ in pairs)
    _check_amount(total, len(pairs), where=where, package=file.name)
    with disk(where, to, total):
        for real, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real, target)


def wheel_licence(wheel: Path) -> str | None:
    """What the wheel's METADATA calls its licence, best form first; None if it says nothing."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            with archive.open(names[0]) as file:
                text = file.read(_METADATA_BYTES).decode("utf-8", "replace")
    except (*_DAMAGED, IndexError):
        return None
    fields = email.parser.HeaderParser().parsestr(text)
    for field in ("License-Expression", "License"):
        value = str(fields.get(field, "")).strip()
        # Some paste the whole licence here; then the classifier says it shorter.
        if value and value.upper() != "UNKNOWN" and "\n" not in value and len(value) <= 100:
            return value
    classifiers = [str(value) for value in fields.get_all("Classifier", [])]
    named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License ::")]
    return " / ".join(named) or None


@contextmanager
def disk(where: str, folder: Path, needed: int = 0) -> Iterator[None]:
    """Room for `needed` bytes below `folder`; what the disk says meanwhile becomes a sentence."""
    # Asked before the first byte is written: a disk that fills up hurts others too.
    if needed and needed > _free_bytes(folder):
        raise full_disk(where, folder, needed)
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(where, folder, needed) from error
        raise SourceError(
            where, f"{error.filename or folder}: {error.strerror or error}",
            fix="check the cache's folder, or put it elsewhere with LIMBECK_CACHE",
        ) from error  # fmt: skip


def full_disk(where: str, folder: Path, needed: int) -> SourceError:
    amount = f"{needed:,} bytes are needed" if needed else "more room is needed"
    return SourceError(
        where, f"the cache's disk is full: {amount} in {folder}, {_free_bytes(folder):,} are free",
        fix="free some space, or put the cache elsewhere with LIMBECK_CACHE",
    )  # fmt: skip


def close_matches(wanted: str, names: Sequence[str]) -> list[str]:
    """Up to three names that might have been meant: the same last part first, then alike ones."""
    last = wanted.rpartition("/")[2].lower()
    same = [name for name in names if name.rpartition("/")[2].lower() == last]
    alike = difflib.get_close_matches(wanted, names[:5000], 3)  # slow: some 10,000 names a second
    return list(dict.fromkeys([*same, *alike]))[:3]


def did_you_mean(matches: Sequence[str]) -> str:
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else ""


def _choose(
    infos: Sequence[zipfile.ZipInfo], member: str, *, where: str, package: str
) -> list[zipfile.ZipInfo]:
    """The members to write, once the whole archive has been found harmless."""
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if _leads_out(info.filename):
            raise _unsafe(where, package, f"{info.filename!r} leads out of its folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _unsafe(where, package, f"{info.filename!r} is a link or a special file")
    chosen = [
        info
        for info in infos
        if not info.is_dir() and (info.filename == member or info.filename.startswith(f"{member}/"))
    ]
    if not chosen:
        names = [info.filename for info in infos if not info.is_dir()]
        folders = {name.rpartition("/")[0] for name in names} - {""}
        raise _no_member([*names, *sorted(folders)], member, where=where, package=package)
    names = [info.filename for info in chosen]
    if len({*names}) < len(names):
        raise _unsafe(where, package, "two members have the same name")
    for info in chosen:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # bz2 and LZMA unpack a chunk of any size at once
            raise _unsafe(where, package, f"{info.filename!r} is packed unusually for a wheel")
        if info.file_size > max(RATIO_FROM_BYTES, MAX_RATIO * info.compress_size):
            raise _unsafe(
                where, package,
                f"{info.compress_size:,} bytes unpack to {info.file_size:,} in {info.filename!r}",
            )  # fmt: skip
    total = sum(info.file_size for info in chosen)
    _check_amount(total, len(infos), where=where, package=package)
    return chosen


def _leads_out(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return (
        parts[0] == ""
        or ".." in parts
        or any(re.match(r"[A-Za-z]:", part) for part in parts)
        or any(ord(char) < 32 for char in name)
    )


def _inside(path: Path, root: Path, *, where: str, package: str) -> Path:
    """The path with its links followed. Raises SourceError if that leads out of `root`."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise _unsafe(where, package, f"{path.relative_to(root)} leads out of the package")
    return real


def _check_amount(total: int, members: int, *, where: str, package: str) -> None:
    if total > MAX_BYTES or members > MAX_MEMBERS:
        raise _unsafe(
            where, package, f"{members:,} members, {total:,} bytes unpacked",
            allowed=f"at most {MAX_MEMBERS:,} members and {MAX_BYTES:,} bytes",
        )  # fmt: skip


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _no_member(names: Sequence[str], member: str, *, where: str, package: str) -> MemberError:
    fix = did_you_mean(close_matches(member, names))
    some = ", ".join(sorted(names)[:5])
    return MemberError(
        where,
        f"{package} holds no {member!r}",
        fix=fix or (f"it holds {some}, ..." if some else ""),
    )


def _unsafe(where: str, package: str, found: str, *, allowed: str = "") -> SourceError:
    return SourceError(
        where, f"{package} is not safe to unpack: {found}", allowed=allowed,
        fix="use another source",
    )  # fmt: skip


def _need(tool: str, where: str) -> None:
    if shutil.which(tool) is None:
        raise SourceError(
            where, f"{tool} is not installed", allowed="apt:// needs Debian's apt-get and dpkg",
            fix="fetch the file in another way and give its path",
        )  # fmt: skip


def _reason(output: str, mark: str = "") -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marked = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
    return (marked or lines or ["no reason given"])[0][:300]


def _run(
    command: Sequence[str], folder: Path, *, where: str, label: str, tell: Tell,
    cwd: Path | None = None,
) -> tuple[int, str]:  # fmt: skip
    """Exit code and output of a command that writes to `folder`, whose growth is the progress."""
    scratch, log = folder / "tmp", folder / "output.txt"
    scratch.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(scratch), "LC_ALL": "C.UTF-8"}
    done = 0
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, cwd=cwd, env=environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            while process.poll() is None:
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    scratched = _bytes_below(scratch)  # pip loads it there, then copies it
                    done = max(done, scratched, _bytes_below(folder) - scratched)
                    tell(label, done, 0)
                if done > MAX_BYTES:
                    raise SourceError(
                        where, f"{label}: more than {MAX_BYTES:,} bytes", fix="use another source"
                    )
        except BaseException:
            process.kill()
            raise
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0 and "No space left on device" in text:
        raise full_disk(where, folder, 0)
    return process.returncode, text


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except FileNotFoundError:  # the command has just moved it
                continue
    return total
