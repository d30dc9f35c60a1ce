"""report.md: the whole report as text that reads well unrendered too."""

from __future__ import annotations

import html
import re

from limbeck.report.document import Report
from limbeck.report.pictures import parting_text
from limbeck.report.tables import (
    Table,
    baselines_table,
    benchmarks_table,
    benchmarks_text,
    budgets_table,
    capabilities_table,
    cost_text,
    environment_table,
    files_table,
    models_table,
    recipe_lines,
    stages_table,
)
from limbeck.report.wording import quality_text, shape_text, summary, verdicts
from limbeck.report.writing import texts_table, texts_words

REPEAT = "limbeck distill recipe.yaml --out ../again"


def markdown(report: Report) -> str:
    """The text of report.md."""
    parts = [
        f"# {_plain(str(report.recipe.get('name', 'Limbeck')))}: report",
        _paragraph(report),
        "\n".join(f"- {'✓' if v.ok else '✗'} {_plain(v.text)}" for v in verdicts(report)),
    ]
    if report.warnings:
        parts.append("\n".join(f"> **Note.** {_plain(text)}" for text in report.warnings))
    parts += [
        "## Teacher and students",
        _table(models_table(report)),
        "Latency is of one example, throughput of batches of 32, memory the peak of the process; "
        "all of the exported file. In brackets: 95 % intervals.",
        "\n".join(
            f"- **{_plain(s.name)}**: {_plain(shape_text(s.shape))}. {_plain(s.reason)}"
            for s in report.students
        ),
        "## Budgets",
        _table(budgets_table(report)),
    ]
    if report.texts:
        about = f"{texts_words(report.texts)} report.html shows some of the texts."
        parts += ["## What they write", _table(texts_table(report)), _plain(about)]
    if report.benchmarks:
        about = _plain(benchmarks_text(report.benchmarks))
        parts += ["## Public benchmarks", _table(benchmarks_table(report)), about]
    sections = [
        ("Baselines", baselines_table(report)),
        ("Capabilities, the worst kept first", capabilities_table(report)),
        ("Files", files_table(report)),
    ]
    if parted := [s for s in report.students if s.partings]:
        said = "; ".join(f"{s.name} {parting_text(s)}" for s in parted)
        parts += ["## Where they part", _plain(f"{said}. report.html shows some of them.")]
    for title, table in sections:
        if table.rows:
            parts += [f"## {title}", _table(table)]
    parts += ["## Time and energy", cost_text(report.stages)]
    if report.stages:
        parts.append(_table(stages_table(report)))
    parts += [
        "## Environment",
        _table(environment_table(report)),
        "## How to repeat",
        "In this folder:",
        f"```\n{REPEAT}\n```",
        "The resolved recipe:",
        _fenced("\n".join(recipe_lines(report.recipe))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraph(report: Report) -> str:
    main = report.teacher.main
    text = summary(report)
    if main.quality:
        text += f" The teacher, {report.teacher.name}, reaches {quality_text(main.quality)}"
        text += f" {report.metric} on {main.quality.n:,} held-out examples as {main.format}"
        if report.labels:
            text += f", {len(report.labels)} classes"
        text += "."
    return _plain(f"{text} {cost_text(report.stages)}")


def _table(table: Table) -> str:
    align = ["---" if i < table.text else "---:" for i in range(len(table.head))]
    rows = [table.head, *table.rows]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(align) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "&#124;")


def _plain(text: str) -> str:
    """One line of literal text: no HTML, no emphasis, no links out of somebody's class name."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]])|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], text)


def _fenced(text: str) -> str:
    longest = max((len(ticks) for ticks in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text}\n{fence}"
