"""What a student answers otherwise than its teacher: images, rows of a table, series as curves."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.report.document import Report, StudentEntry
from limbeck.report.parting import Answer, Parting
from limbeck.report.tags import text, words
from limbeck.report.wording import digits3, percent

_WIDE, _HIGH = 160, 80  # of a series' curve
_NOUNS = {"image": "images", "row": "rows", "series": "series"}


def pictures_words(report: Report) -> str:
    """What a reader has to know of them."""
    kind = next(p.kind for s in report.students for p in s.partings)
    said = f"{_NOUNS[kind].capitalize()} that a student answers otherwise than its teacher, the "
    said += "furthest apart (KL) first; the label stands below. Each model's three most probable "
    said += "answers, the right one bold."
    if kind == "row":
        said += " Of many columns those are shown in which the row is furthest from the mean."
    return said


def pictures(report: Report) -> str:
    """A card for each student that has some."""
    cards = "".join(
        _card(index, student) for index, student in enumerate(report.students) if student.partings
    )
    return f'<div class="grid wide">{cards}</div>' if cards else ""


def parting_text(student: StudentEntry) -> str:
    """`parts with the teacher on 231 of 10,000 images`."""
    found = student.fidelity
    if found is None:
        return "parts with the teacher"
    parted, noun = round((1 - found.agreement) * found.n), _NOUNS[student.partings[0].kind]
    return f"parts with the teacher on {parted:,} of {found.n:,} {noun}"


def _card(index: int, student: StudentEntry) -> str:
    shown = "".join(_picture(parting, student.name) for parting in student.partings)
    return (
        f'<article class="card s{index % 8}"><h3><strong>{text(student.name)}</strong></h3>'
        f'<p class="small">{text(parting_text(student))}</p>'
        f'<ul class="partings">{shown}</ul></article>'
    )


def _picture(parting: Parting, name: str) -> str:
    return (
        f'<li class="{parting.kind}"><div title="{text(digits3(parting.kl))} nats">'
        f"{_shown(parting)}<p>{words(parting.label)}</p></div>"
        f"{_answers('teacher', parting.teacher, parting.label)}"
        f"{_answers(name, parting.student, parting.label)}</li>"
    )


def _shown(parting: Parting) -> str:
    if parting.image is not None:
        return f'<img src="{text(parting.image)}" alt="{text(f"an image of {parting.label}")}">'
    if parting.row is not None:
        cells = "".join(
            f"<div><dt>{words(name)}</dt><dd>{words(value)}</dd></div>"
            for name, value in parting.row
        )
        return f"<dl>{cells}</dl>"
    assert parting.series is not None
    return _curves(parting.series, f"a series of {parting.label}")


def _curves(series: Sequence[Sequence[float]], about: str) -> str:
    """All channels on one scale, which is the series' own."""
    low, high = min(map(min, series)), max(map(max, series))
    if low == high:  # a straight line, through the middle
        low, high = low - 1, high + 1
    drawn = ""
    for index, channel in enumerate(series):
        step = _WIDE / max(1, len(channel) - 1)
        points = " ".join(
            f"{i * step:.1f},{_HIGH * (high - v) / (high - low):.1f}" for i, v in enumerate(channel)
        )
        drawn += f'<polyline class="curve s{index}" points="{points}"/>'
    return (
        f'<svg viewBox="-2 -2 {_WIDE + 4} {_HIGH + 4}" role="img" aria-label="{text(about)}">'
        f"{drawn}</svg>"
    )


def _answers(who: str, answers: Sequence[Answer], label: str) -> str:
    rows = ""
    for answer in answers:
        right = answer.label == label
        style = f"--part:{100 * answer.probability:.0f}"
        name = f"<b>{words(answer.label)}</b>" if right else words(answer.label)
        rows += f'<li style="{style}"><span>{name}</span>'
        rows += f"<span>{text(percent(answer.probability, 0))}</span></li>"
    return f"<div><p>{words(who)}</p><ol>{rows}</ol></div>"
