"""Documents to learn to continue: text, prompts with completions, or conversations, from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.errors import DataError
from limbeck.tasks.tables import _json_rows, _parquet_rows

ROLES = ("system", "user", "assistant", "tool")
Kind = Literal["text", "completion", "messages"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where a file's rows have what."""

    kind: Kind
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    group: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is learnt."""
        if self.kind == "completion":
            return (self.prompt, self.completion)
        return (self.text if self.kind == "text" else self.messages,)


@dataclass(frozen=True, slots=True)
class Records:
    values: list[Any]
    """str, (prompt, completion), or a list of {"role": ..., "content": ...}."""
    groups: list[str] | None

    def __len__(self) -> int:
        return len(self.values)


def read_records(path: Path, columns: Columns, *, where: str) -> Records:
    """From .jsonl, .parquet, .txt (a document is what stands between empty lines) or a folder of
    .txt files (a document each).

    Raises DataError for an unknown kind of file, a missing column, a value of the wrong kind, no
    rows.
    """
    values: list[Any] = []
    groups: list[str] = []
    for number, row in enumerate(_rows(path, columns, where), start=1):
        at = f"{where}, row {number}"
        values.append(_value(row, columns, at))
        if columns.group:
            groups.append(str(row[columns.group]))
    if not values:
        raise DataError(
            where, f"{path.name} has no rows", allowed="one or more",
            fix="name a file that has some",
        )  # fmt: skip
    return Records(values, groups if columns.group else None)


def _rows(path: Path, columns: Columns, where: str) -> Iterator[dict[str, Any]]:
    wanted = [*columns.names, *([columns.group] if columns.group else [])]
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".jsonl", ".ndjson"):
        return _json_rows(path, wanted, where)
    if path.is_file() and suffix == ".parquet":
        return _parquet_rows(path, wanted, where)
    plain = path.is_dir() or suffix == ".txt"
    if not plain or columns.kind != "text" or columns.group:
        raise DataError(
            where, f"{path.name} cannot hold {columns.kind} in columns {', '.join(wanted)}"
            if plain else f"{path.name} is of no known kind",
            allowed=".jsonl, .parquet; for text without groups .txt or a folder of .txt files too",
            fix="convert or rename it",
        )  # fmt: skip
    return _texts(path, columns.text, where)


def _texts(path: Path, name: str, where: str) -> Iterator[dict[str, Any]]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                where, f"{file.name} is not UTF-8 text at byte {error.start}", allowed="UTF-8",
                fix="convert it",
            ) from None  # fmt: skip
        for part in [text] if path.is_dir() else _paragraphs(text):
            yield {name: part}


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def _value(row: dict[str, Any], columns: Columns, at: str) -> Any:
    if columns.kind == "messages":
        return _messages(row[columns.messages], columns.messages, at)
    for name in columns.names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(
                at, f"{name} is {row[name]!r}", allowed="text", fix="remove or mend the row"
            )
    found = [row[name] for name in columns.names]
    return found[0] if columns.kind == "text" else tuple(found)


def _messages(value: Any, name: str, at: str) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            at, f"{name} is {value!r}", fix="remove or mend the row",
            allowed='a list of {"role": ..., "content": ...}',
        )  # fmt: skip
    found = []
    for number, message in enumerate(value, start=1):
        here = f"{at}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(
                here, f"{message!r}", allowed='{"role": ..., "content": "text"}',
                fix="remove or mend the row",
            )  # fmt: skip
        if message.get("role") not in ROLES:
            raise DataError(
                here, f"its role is {message.get('role')!r}", allowed=", ".join(ROLES),
                fix="rename it",
            )  # fmt: skip
        found.append({"role": message["role"], "content": message["content"]})
    if found[-1]["role"] != "assistant":
        raise DataError(
            at, f"the last message is the {found[-1]['role']}'s: there is no answer to learn",
            allowed="an answer of the assistant at the end", fix="remove or complete the row",
        )  # fmt: skip
    return found
