"""Debian's descriptions of packages as domain text: English prose, 40,000 texts, free to use.

`Translation-en` has the descriptions, `Packages` says which source each package is built from. A
source makes many packages with nearly one description (more than half share their first 80
characters with another), so texts are split by source.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from limbeck.errors import DataError, SourceError
from limbeck.run import write_text

_NO_SECTION = "unknown"


@dataclass(frozen=True, slots=True)
class Description:
    package: str
    source: str
    section: str  # of the archive: 'science', 'libs'; 'unknown' as dpkg says where none is given
    synopsis: str  # one line
    text: str  # paragraphs, each on one line or as a list; an empty line between them


def read_descriptions(
    translation: Path, packages: Path | None = None, *, where: str
) -> list[Description]:
    """Each text once, in the file's order; a package that `packages` does not name is its own
    source, its section unknown. Raises DataError for a file of another kind."""
    origins = _origins(packages) if packages else {}
    found: list[Description] = []
    seen: set[str] = set()
    for stanza in _stanzas(translation, where):
        package, body = stanza.get("Package"), stanza.get("Description-en")
        if not package or body is None:
            continue
        synopsis, _, rest = body.partition("\n")
        text = _paragraphs(rest)
        if not text or text in seen:
            continue
        seen.add(text)
        source, section = origins.get(package, (package, _NO_SECTION))
        found.append(Description(package, source, section, synopsis.strip(), text))
    if not found:
        raise DataError(
            where, f"{translation.name} describes no package",
            allowed="Debian's Translation-en, unpacked", fix="name that file",
        )  # fmt: skip
    return found


def write_descriptions(descriptions: list[Description], path: Path) -> None:
    """As JSON lines with package, source, section, synopsis and text: `group: source` keeps
    siblings in one split."""
    lines = [json.dumps(asdict(found), ensure_ascii=False) for found in descriptions]
    write_text(path, "\n".join(lines) + "\n")


def fetch_lists(folder: Path, *, where: str, language: str = "en") -> tuple[Path, Path | None]:
    """(Translation, Packages) of the machine's own mirror, by its apt, in `folder`.

    The machine's lists are left alone. The archive is live: record the files' hashes. Raises
    SourceError where there is no apt or no mirror.
    """
    if shutil.which("apt-get") is None:
        raise SourceError(
            where, "apt-get is not there", allowed="a Debian machine", fix="give the files"
        )
    folder = folder.absolute()
    for name in ("lists/partial", "cache/archives/partial", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_text(folder / "sources.list", "\n".join(_mirror(where)) + "\n")
    write_text(
        folder / "apt.conf",
        f'Dir::State "{folder}/state";\nDir::State::lists "{folder}/lists";\n'
        f'Dir::Cache "{folder}/cache";\nDir::Etc::sourcelist "{folder}/sources.list";\n'
        'Dir::Etc::sourceparts "/dev/null";\nDir::Etc::parts "/dev/null";\n'
        f'Acquire::Languages {{ "{language}"; }};\nAcquire::IndexTargets::deb::Contents-deb::'
        'DefaultEnabled "false";\nAcquire::GzipIndexes "false";\n',
    )
    done = subprocess.run(
        ["apt-get", "update", "-q"], env={**os.environ, "APT_CONFIG": str(folder / "apt.conf")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    translations = sorted(
        (folder / "lists").glob(f"*_Translation-{language}"), key=lambda p: -p.stat().st_size
    )
    if done.returncode or not translations:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SourceError(
            where, f"apt-get update brought no descriptions: {said[0] if said else 'no reason'}",
            allowed="a mirror in the machine's own sources", fix="check apt's settings",
        )  # fmt: skip
    # of the largest part of the archive (main, not a security update)
    prefix = translations[0].name.partition("_i18n_")[0]
    packages = next((folder / "lists").glob(f"{prefix}_binary-*_Packages"), None)
    return translations[0], packages


def _mirror(where: str) -> list[str]:
    """The archive itself (no security updates, nobody else's) in the machine's own sources."""
    etc = Path("/etc/apt")
    for file in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            if re.match(r"deb\s.*/debian/?\s.*\bmain\b", line):
                return [line]
    for file in sorted((etc / "sources.list.d").glob("*.sources")):
        for stanza in _stanzas(file, where):
            address = next(iter(stanza.get("URIs", "").split()), "")
            if re.search(r"/debian/?$", address) and "main" in stanza.get("Components", ""):
                options = f"[signed-by={key}] " if (key := stanza.get("Signed-By", "")) else ""
                return [f"deb {options}{address} {stanza['Suites'].split()[0]} main"]
    raise SourceError(
        where, "this machine's apt has no archive of Debian among its sources",
        allowed="one in /etc/apt with the component main", fix="add it, or give the files",
    )  # fmt: skip


def _origins(packages: Path) -> dict[str, tuple[str, str]]:
    """Package -> (source, section)."""
    found = {}
    for stanza in _stanzas(packages, str(packages)):
        package = stanza.get("Package", "")
        # "Source: name (version)", where it is not the package's own
        source = stanza.get("Source", package).partition(" ")[0]
        found[package] = source, stanza.get("Section", _NO_SECTION).rpartition("/")[2]
    return found


def _stanzas(path: Path, where: str) -> Iterator[dict[str, str]]:
    """Fields of each paragraph; lines that continue a field keep all but their first space."""
    fields: dict[str, str] = {}
    name = ""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                line = line.rstrip("\n")
                if not line.strip():
                    if fields:
                        yield fields
                    fields, name = {}, ""
                elif line.startswith((" ", "\t")):
                    if name:
                        fields[name] += "\n" + line[1:]
                elif not line.startswith("#") and ":" in line:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            where, f"{path.name} is no readable list: {error}", allowed="UTF-8 text",
            fix="unpack it, or fetch it again",
        ) from error  # fmt: skip
    if fields:
        yield fields


def _paragraphs(body: str) -> str:
    """Lines that were wrapped are joined; lines that begin with a space stay as they are.

    (Debian policy 5.6.13: " ." is an empty line, a second space means verbatim.)
    """
    blocks: list[str] = []
    for line in body.split("\n"):
        if line.strip() in ("", "."):
            blocks.append("")
        elif line[0] in " \t" or not blocks or not blocks[-1] or blocks[-1][0] in " \t":
            blocks.append(line.rstrip())
        else:
            blocks[-1] += " " + line.strip()
    return "\n".join(blocks).strip("\n")
