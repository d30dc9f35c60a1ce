"""The model card that lies in a student's Hugging Face folder as README.md.

Text that came from elsewhere (class names, paths, package metadata) is escaped: it can neither end
the front matter nor become markup or code.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from limbeck.export.snippets import kind_of
from limbeck.report.document import holds
from limbeck.report.wording import (
    BUDGETS,
    bound,
    budget_value,
    bytes_text,
    count_text,
    energy_text,
    joined,
    latency_text,
    percent,
    quality_text,
    shape_text,
)

if TYPE_CHECKING:
    from limbeck.report.document import Artifact, Report, StudentEntry

_WEAKEST = 5  # classes shown


class Origin(Protocol):
    """Where the teacher or the data came from."""

    @property
    def uri(self) -> str: ...

    @property
    def origin(self) -> str: ...  # 'pypi', 'apt', 'hub' or 'local'

    @property
    def licence(self) -> str | None: ...  # as its package or card says; None: it does not say


def model_card(report: Report, student: StudentEntry, *, teacher: Origin, data: Origin) -> str:
    """Markdown with YAML front matter. What was not measured is said to be so, never left blank.

    Its two snippets work as they stand when they are run in the folder that the card lies in.
    """
    parts = [
        f"---\n{_front_matter(report, teacher)}---",
        f"# {_plain(student.name)}",
        f"{kind_of(report.recipe).noun} of {count_text(student.params)} parameters"
        + (f" and {len(report.labels)} classes" if report.labels else "")
        + f", distilled from {_plain(report.teacher.name)} by Limbeck {_plain(report.limbeck)}.",
        _table(("", ""), _origins(report, student, teacher, data)),
        "## What it keeps",
        _kept(report, student),
        *_weakest(student),
        "## Budget",
        _budget(student),
        "## Files",
        _table(
            ("format", "size", "latency, batch 1", "peak memory", "same answer as this folder"),
            [_file(artifact) for artifact in student.artifacts],
        ),
        _conditions(report, student),
        "## How to load",
        *_snippets(report, student),
        "## Energy",
        _energy(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report, teacher: Origin) -> str:
    tag = kind_of(report.recipe).tag
    fields: dict[str, Any] = {
        "license": _licence_id(teacher.licence),
        "base_model": teacher.uri if teacher.origin == "hub" else None,
        "library_name": kind_of(report.recipe).library,
        "pipeline_tag": tag,
        "tags": ["limbeck", "knowledge-distillation", tag],
        "metrics": ["accuracy"],
    }
    given = {key: value for key, value in fields.items() if value is not None}
    text: str = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    return text


def _licence_id(text: str | None) -> str:
    """The hub's identifier where the text is one word of that kind, else `other` or `unknown`."""
    if not text:
        return "unknown"
    return text.lower() if re.fullmatch(r"[A-Za-z0-9.+-]{2,40}", text) else "other"


def _origins(
    report: Report, student: StudentEntry, teacher: Origin, data: Origin
) -> list[tuple[str, ...]]:
    unknown = "not stated; ask its owner before you publish this model"
    rows: list[tuple[str, ...]] = [
        ("teacher", teacher.uri),
        ("teacher's licence", teacher.licence or unknown),
        ("data", data.uri),
        ("data's licence", data.licence or unknown),
        ("shape", shape_text(student.shape)),
        ("why this shape", student.reason),
    ]
    if takes := kind_of(report.recipe).takes(report.recipe.get("task", {})):
        rows.append(("input", takes))
    return rows


def _kept(report: Report, student: StudentEntry) -> str:
    ours, theirs = student.main.quality, report.teacher.main.quality
    if ours is None or theirs is None:
        return "Not measured yet."
    text = f"As {student.primary}, on {ours.n:,} held-out examples: {ours.metric} "
    text += f"{quality_text(ours)}, the teacher's {quality_text(theirs)}."
    if ours.perplexity and theirs.perplexity:
        text += f" Perplexity {ours.perplexity:.2f}, the teacher's {theirs.perplexity:.2f}."
    if student.retention:
        text += f" It keeps {quality_text(student.retention)} of it."
    if student.fidelity:
        text += f" It gives the teacher's answer in {percent(student.fidelity.agreement)} of cases"
        if student.fidelity.mean_kl is not None:
            text += f" (mean KL {student.fidelity.mean_kl:.3f} nats)"
        text += "."
    if hard := student.baselines.hard_labels:
        text += f" Trained alike without the teacher, it reaches {quality_text(hard)}."
    if report.texts and student.name in report.texts.scores:
        mine, of_teacher = (report.texts.scores[name] for name in (student.name, "teacher"))
        text += f" Of {mine.chrf.n:,} texts that it wrote to test prompts chrF is "
        text += f"{percent(mine.chrf.value)} ({100 * mine.chrf.low:.1f}–{100 * mine.chrf.high:.1f})"
        text += f", of the teacher's {percent(of_teacher.chrf.value)}."
    return _plain(text) + " In brackets: 95 % bootstrap intervals."


def _weakest(student: StudentEntry) -> Sequence[str]:
    """The classes of which the student finds the least, compared with its teacher."""
    found = [(name, c) for name, c in student.capabilities.items() if c.retention is not None]
    found.sort(key=lambda item: (item[1].retention.value if item[1].retention else 0, item[0]))
    if not found:
        return ()
    rows = [
        (name, quality_text(c.quality), percent(c.teacher_quality.value),
         quality_text(c.retention), f"{c.n:,}")
        for name, c in found[:_WEAKEST]
    ]  # fmt: skip
    head = ("class", "it finds", "teacher finds", "kept", "examples")
    return ("Where it lost most:", _table(head, rows))


def _budget(student: StudentEntry) -> str:
    rows = []
    for key, limit in student.budget.asked.items():
        found = student.budget.measured[key]
        met = "met" if holds(key, limit, found) else "missed"
        met = "not measured yet" if found is None else met
        asked = f"{bound(key)} {budget_value(key, limit)}"
        rows.append((BUDGETS[key], asked, budget_value(key, found), met))
    return _table(("budget", "limit", "measured", ""), rows)


def _file(artifact: Artifact) -> tuple[str, ...]:
    same = percent(artifact.parity.agreement) if artifact.parity else ""
    return (
        artifact.format, bytes_text(artifact.size_bytes), latency_text(artifact.latency_ms),
        bytes_text(artifact.peak_memory_bytes), same,
    )  # fmt: skip


def _conditions(report: Report, student: StudentEntry) -> str:
    main, env = student.main, report.environment
    runtimes = [f"{n} {env.versions[n]}" for n in ("onnxruntime", "torch") if n in env.versions]
    text = f"Measured on {env.cpu} with {main.threads} thread{'s' if main.threads > 1 else ''}"
    return _plain(text + (f", {joined(runtimes)}." if runtimes else "."))


def _snippets(report: Report, student: StudentEntry) -> Sequence[str]:
    kind = kind_of(report.recipe)
    parts = [f"In this folder, with {kind.library}:", f"```python\n{kind.transformers}```"]
    here, file = student.artifact("hf"), student.main
    if not file.format.startswith(kind.runs):
        file = next((a for a in student.artifacts if a.format.startswith(kind.runs)), file)
    if here and file.format.startswith(kind.runs):
        path = json.dumps(os.path.relpath(file.path, here.path))
        code = kind.other(report.recipe.get("task", {})).replace("PATH", path)
        parts += [f"{kind.by} ({file.format}):", f"```python\n{code}```"]
    return parts


def _energy(report: Report) -> str:
    metered = [s for s in report.stages if s.energy_wh is not None]
    if not metered:
        return "Not metered."
    total = energy_text(sum(s.energy_wh or 0.0 for s in metered))
    sources = joined(sorted({s.energy_source for s in metered}))
    return _plain(
        f"The whole run, teacher and all {len(report.students)} students and their baselines "
        f"included: {total} ({sources})."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "&#124;")


def _plain(text: str) -> str:
    """One line of literal text: no HTML, no emphasis, no links out of somebody's class name."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]])|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], text)

