"""How numbers are written, and the plain sentences that the page and the text share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.report.document import (
    Artifact,
    BudgetKey,
    Latency,
    Quality,
    Report,
    Retention,
    ShapeEntry,
    TeacherEntry,
    holds,
)

NONE = "–"  # not measured
BUDGETS: dict[str, str] = {
    "params": "parameters", "size_mb": "size", "latency_ms": "latency", "memory_mb": "memory",
    "energy_mj": "energy", "retention": "retention",
}  # fmt: skip
_UNITS = {"size_mb": "MB", "latency_ms": "ms", "memory_mb": "MB", "energy_mj": "mJ"}
BASELINES = {
    "hard_labels": "hard labels", "random_init": "random start", "untaught": "untaught",
    "dedicated": "trained alone",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing a reader would check, and whether it holds."""

    text: str
    ok: bool


def verdicts(report: Report) -> list[Verdict]:
    """Budgets, then the teacher against the linear model, then each student without its teacher."""
    found = [
        _budget(student.name, key, limit, student.budget.measured[key])
        for student in report.students
        for key, limit in student.budget.asked.items()
    ]
    teacher = report.teacher.main.quality
    if teacher and report.linear:
        found.append(_against("The teacher", teacher, "the linear model on TF-IDF", report.linear))
    for student in report.students:
        quality, plain = student.main.quality, student.baselines.hard_labels
        if quality and plain:
            found.append(_against(student.name, quality, "the same model without a teacher", plain))
        if quality and (alone := student.baselines.dedicated):
            found.append(_against(student.name, quality, "the same model trained alone", alone))
    return found


def _budget(name: str, key: BudgetKey, limit: float, measured: float | None) -> Verdict:
    asked, what = f"{bound(key)} {budget_value(key, limit)} asked", BUDGETS[key]
    if measured is None:
        return Verdict(f"{name}: {what} of {asked}, but not measured.", False)
    found = budget_value(key, measured)
    if holds(key, limit, measured):
        return Verdict(f"{name} meets its {what} budget: {found}, {asked}.", True)
    miss = 100 * abs(measured / limit - 1)
    by = f"{miss:.1f} %" if miss >= 0.1 else "less than 0.1 %"
    return Verdict(f"{name} misses its {what} budget by {by}: {found}, {asked}.", False)


def bound(key: str) -> str:
    return "at least" if key == "retention" else "at most"


def _against(who: str, ours: Quality, other: str, theirs: Quality) -> Verdict:
    gap = 100 * (ours.value - theirs.value)
    part = ours.low > theirs.high or theirs.low > ours.high
    chance = "the 95 % intervals part" if part else "the 95 % intervals overlap"
    numbers = f"{quality_text(ours)} against {quality_text(theirs)}; {chance}"
    if gap > 0:
        return Verdict(f"{who} beats {other} by {gap:.1f} points: {numbers}.", True)
    how = f"is {-gap:.1f} points worse" if gap < 0 else "is exactly as good"
    return Verdict(f"{who} does not beat {other}, it {how}: {numbers}.", False)


def summary(report: Report) -> str:
    """The run in one sentence."""
    students, quality = report.students, report.teacher.main.quality
    kept = [s.retention.value for s in students if s.retention]
    many = len(students) > 1
    subject = f"{_count(len(students)).capitalize()} student{'s' if many else ''}"
    if not kept or not quality:
        return f"{subject} of {report.teacher.name}."
    few = len(kept) <= 4
    span = joined([percent(v) for v in kept]) if few else _between(min(kept), max(kept))
    text = f"{subject} of {report.teacher.name} keep{'' if many else 's'} {span}"
    text += f" of its {percent(quality.value)} {report.metric}"
    smallest = min(students, key=lambda s: s.main.size_bytes)
    gains = []
    if less := smaller(report, smallest):
        gains.append(f"{less} than the teacher's {report.teacher.main.format} file")
    if sooner := faster(report, smallest):
        gains.append(f"{sooner} than its {timed_against(report, smallest).format} file")
    if gains:
        text += f"; {'the smallest' if many else 'it'} is {' and '.join(gains)}"
    return text + "."


def smaller(report: Report, student: TeacherEntry) -> str | None:
    """`4.1× smaller`: the student's primary file against the teacher's."""
    ours, theirs = student.main.size_bytes, report.teacher.main.size_bytes
    return _times(theirs, ours, "smaller", "larger")


def faster(report: Report, student: TeacherEntry) -> str | None:
    """`6.3× faster`: median batch-1 latency in the same format; None if not measured."""
    ours, theirs = student.main.latency_ms, timed_against(report, student).latency_ms
    return _times(theirs.median, ours.median, "faster", "slower") if ours and theirs else None


def timed_against(report: Report, student: TeacherEntry) -> Artifact:
    """The teacher's file in the student's own format: what int8 gains is no merit of the student.

    Where there is none, the teacher's primary file.
    """
    return report.teacher.artifact(student.primary) or report.teacher.main


def _times(before: float, after: float, better: str, worse: str) -> str | None:
    if not before or not after:
        return None
    ratio = before / after
    word, ratio = (better, ratio) if ratio >= 1 else (worse, 1 / ratio)
    return f"{ratio:.1f}× {word}" if ratio < 99.5 else f"{ratio:,.0f}× {word}"


def shape_text(shape: ShapeEntry) -> str:
    sizes = [f"{axis} {size}" for axis, size in shape.sizes.items()]
    if not shape.layers and sizes:  # of stages, each with a number of layers among its sizes
        return " · ".join(sizes)
    layers = ", ".join(str(layer) for layer in shape.layers) or "none"
    return " · ".join([*sizes, f"layers {layers}"])


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def quality_text(found: Quality | Retention | None, digits: int = 1) -> str:
    """`81.0 % (80.1–81.9)`."""
    if found is None:
        return NONE
    low, high = f"{100 * found.low:.{digits}f}", f"{100 * found.high:.{digits}f}"
    return f"{percent(found.value, digits)} ({low}–{high})"


def budget_value(key: str, value: float | None) -> str:
    """To four digits, so that a narrow miss does not look like a hit."""
    if value is None:
        return NONE
    if key == "params":
        return f"{value:,.0f}"
    return percent(value, 2) if key == "retention" else f"{value:,.4g} {_UNITS[key]}"


def count_text(value: int) -> str:
    """`22.7 M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{digits3(value / limit)} {unit}"
    return str(value)


def bytes_text(value: float | None) -> str:
    """In MB = 10^6 bytes."""
    return NONE if value is None else f"{digits3(value / 1e6)} MB"


def latency_text(found: Latency | None) -> str:
    """`1.23 ms (p95 1.40)`."""
    return f"{digits3(found.median)} ms (p95 {digits3(found.p95)})" if found else NONE


def rate_text(value: float | None) -> str:
    return NONE if value is None else f"{digits3(value)}/s"


def digits3(value: float) -> str:
    """Three digits, never an exponent for what people meet: 0.012, 1.23, 12.3, 1,234."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def seconds_text(seconds: float) -> str:
    """`3 min 20 s`."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def energy_text(watt_hours: float | None) -> str:
    return NONE if watt_hours is None else f"{digits3(watt_hours)} Wh"


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _between(low: float, high: float) -> str:
    return f"between {percent(low)} and {percent(high)}"


def _count(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[number] if number < len(words) else str(number)
