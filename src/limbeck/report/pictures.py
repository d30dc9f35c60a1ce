"""The page's pictures: images on which a student parts with its teacher."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.report.document import Report, StudentEntry
from limbeck.report.parting import Answer, Parting
from limbeck.report.tags import text, words
from limbeck.report.wording import digits3, percent


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
    parted = round((1 - found.agreement) * found.n)
    return f"parts with the teacher on {parted:,} of {found.n:,} images"


def _card(index: int, student: StudentEntry) -> str:
    shown = "".join(_picture(parting, student.name) for parting in student.partings)
    return (
        f'<article class="card s{index % 8}"><h3><strong>{text(student.name)}</strong></h3>'
        f'<p class="small">{text(parting_text(student))}</p>'
        f'<ul class="partings">{shown}</ul></article>'
    )


def _picture(parting: Parting, name: str) -> str:
    about = f"an image of {parting.label}"
    title = f"{parting.label}; KL {digits3(parting.kl)} nats"
    return (
        f'<li><img src="{text(parting.image)}" alt="{text(about)}" title="{text(title)}">'
        f"{_answers('teacher', parting.teacher, parting.label)}"
        f"{_answers(name, parting.student, parting.label)}</li>"
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
