"""What language models wrote: a table of scores, and some texts side by side."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from limbeck.report.document import Report
from limbeck.report.tables import Table
from limbeck.report.tags import sheet, text, words
from limbeck.report.texts import Score, TextExample, Texts, WrittenText
from limbeck.report.wording import BASELINES, percent

_MOST = 2000  # signs of a text that are shown


def texts_table(report: Report) -> Table:
    """A row for each model that wrote."""
    head = ("model", "exact match", "ROUGE-L", "chrF", "came to an end", "texts")
    if report.texts is None:
        return Table(head, ())
    rows = tuple(
        (
            model_text(name), *map(_score, (found.exact_match, found.rouge_l, found.chrf)),
            percent(found.ended, 0), f"{found.chrf.n:,}",
        )
        for name, found in report.texts.scores.items()
    )  # fmt: skip
    return Table(head, rows)


def model_text(name: str) -> str:
    """`small/hard_labels` as `small, hard labels`."""
    student, _, baseline = name.rpartition("/")
    return f"{student}, {BASELINES[baseline]}" if baseline in BASELINES else name


def _score(found: Score) -> str:
    return f"{percent(found.value)} ({100 * found.low:.1f}–{100 * found.high:.1f})"


def texts_words(texts: Texts) -> str:
    """What was done, in plain sentences."""
    n = next(iter(texts.scores.values())).chrf.n
    said = f"Each wrote on from the same {n:,} prompts of the test rows, up to "
    said += f"{texts.max_new_tokens:,} tokens, the likeliest each time. In brackets: 95 % "
    said += "intervals, texts resampled."
    return " ".join([said, *texts.notes])


def writing(report: Report) -> str:
    """The table, and a card for each example."""
    texts = report.texts
    assert texts is not None
    shown = sheet(texts_table(report), "What they write")
    found = f'<div class="sheet">{shown}</div>'
    if not texts.examples:
        return found
    colours = {student.name: f"s{i % 8}" for i, student in enumerate(report.students)}
    cards = "".join(_example(example, colours) for example in texts.examples)
    said = "The first of the prompts, as they were drawn. Words that a text has in common with the "
    said += "reference, in its order, are marked; … is where a text was cut."
    return f'{found}<p class="about examples">{text(said)}</p>{cards}'


def _example(example: TextExample, colours: dict[str, str]) -> str:
    prompt = example.prompt
    if len(prompt) > _MOST:
        prompt = f"…{prompt[-_MOST:]}"
    columns = _column("reference", "", text(example.reference[:_MOST]), "in the data")
    for name, said in example.written.items():
        colour = "teacher" if name == "teacher" else colours.get(name, "")
        score = f"ROUGE-L {percent(said.rouge_l, 0)}"
        columns += _column(name, colour, _marked(said, example.reference), score)
    return (
        f'<article class="card example"><p class="prompt"><b>prompt</b>{text(prompt)}</p>'
        f'<div class="said">{columns}</div></article>'
    )


def _column(name: str, colour: str, inner: str, about: str) -> str:
    return (
        f'<div class="{colour}"><p class="who"><b>{words(name)}</b><span>{text(about)}</span></p>'
        f'<p class="words">{inner}</p></div>'
    )


def _marked(said: WrittenText, reference: str) -> str:
    """Escaped, with what it shares with the reference inside of <mark>."""
    written = said.text[:_MOST]
    spans = [found.span() for found in re.finditer(r"\w+", written)]
    ours = [written[a:b].lower() for a, b in spans]
    theirs = [word.lower() for word in re.findall(r"\w+", reference)]
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    shown, done = "", 0
    for block in matcher.get_matching_blocks()[:-1]:
        start, end = spans[block.a][0], spans[block.a + block.size - 1][1]
        shown += f"{text(written[done:start])}<mark>{text(written[start:end])}</mark>"
        done = end
    shown += text(written[done:])
    if not written.strip():
        return '<span class="cut">nothing</span>'
    return shown if said.ended else f'{shown}<span class="cut">…</span>'
