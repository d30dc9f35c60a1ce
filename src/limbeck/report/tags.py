"""Small pieces of HTML. Whatever comes from a run passes through `text`, which escapes it."""

from __future__ import annotations

import re
from html import escape

from limbeck.report.tables import Table

_JOINT = re.compile(r"(?<=\w)([./_-])(?=\w)")
_UNIT = re.compile(r"(?<=\d) (?=(?:%|[GMk]|MB|ms|nats|Wh|s|min|h)(?!\w))")


def text(value: str) -> str:
    """Escaped for content and attributes; a number and its unit stay on one line."""
    return escape(_UNIT.sub("\u00a0", value), quote=True)


def words(value: str) -> str:
    """Like `text`, for names: they may break after a dot, a slash, a dash or an underscore."""
    return _JOINT.sub(r"\1<wbr>", text(value))


def sheet(table: Table, about: str) -> str:
    """A table that scrolls inside its own box, by keyboard too."""
    head = "".join(
        f'<th scope="col"{_words(table, i)}>{text(h)}</th>' for i, h in enumerate(table.head)
    )
    rows = "".join(f"<tr>{_cells(table, row)}</tr>" for row in table.rows)
    return scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", about)


def scroll(inner: str, about: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(about)}">{inner}</div>'
    )


def details(table: Table, about: str) -> str:
    return f"<details><summary>The numbers as a table</summary>{sheet(table, about)}</details>"


def figure(title: str, about: str, drawing: str, table: Table | None) -> str:
    """A chart with its title, a line of explanation, and its numbers for who cannot see it."""
    small = f" <small>{text(about)}</small>" if about else ""
    numbers = details(table, title) if table else ""
    caption = f"<figcaption>{text(title)}{small}</figcaption>"
    return f"<figure>{caption}{drawing}{numbers}</figure>"


def section(title: str, about: str, inner: str) -> str:
    lead = f'<p class="about">{text(about)}</p>' if about else ""
    return f"<section><h2>{text(title)}</h2>{lead}{inner}</section>"


def _cells(table: Table, row: tuple[str, ...]) -> str:
    first = f'<th scope="row" class="words">{words(row[0])}</th>'
    rest = (
        f'<td class="words">{words(cell)}</td>' if i < table.text else f"<td>{text(cell)}</td>"
        for i, cell in enumerate(row)
        if i
    )
    return first + "".join(rest)


def _words(table: Table, column: int) -> str:
    return ' class="words"' if column < table.text else ""
