"""report.html: one self-contained page, light and dark, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import Template

from limbeck.report.anatomy import unit_figures
from limbeck.report.document import (
    Capability,
    Report,
    StudentEntry,
    holds,
)
from limbeck.report.figures import (
    frontier_figure,
    importance_figure,
    scatters,
    stages_figure,
    training_figures,
)
from limbeck.report.markdown import REPEAT
from limbeck.report.pictures import pictures, pictures_words
from limbeck.report.tables import (
    Table,
    baselines_table,
    benchmarks_table,
    benchmarks_text,
    budgets_table,
    capability_names,
    capability_of,
    environment_table,
    files_table,
    models_table,
    recipe_lines,
)
from limbeck.report.tags import scroll, section, sheet, text, words
from limbeck.report.wording import (
    BUDGETS,
    bound,
    budget_value,
    bytes_text,
    count_text,
    faster,
    latency_text,
    percent,
    quality_text,
    shape_text,
    smaller,
    summary,
    timed_against,
    verdicts,
)
from limbeck.report.writing import texts_words, writing

_HERE = Path(__file__).parent
_MOST_VERDICTS = 16  # with more, those that hold are folded away
_WORST = 0.6  # retention that gets the full colour


def page(report: Report) -> str:
    """The text of report.html."""
    name = str(report.recipe.get("name", "report"))
    template = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=text(f"Limbeck: {name}"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        name=text(name),
        summary=text(summary(report)),
        lead=text(_lead(report)),
        sections="\n".join(_sections(report)),
        version=text(report.limbeck),
    )


def _sections(report: Report) -> Iterator[str]:
    yield _verdicts(report)
    cards = "".join(_card(report, i, student) for i, student in enumerate(report.students))
    yield section("The family", _family_words(report), f'<div class="grid">{cards}</div>')
    yield section("What it costs", "", scatters(report))
    if report.frontier:
        said = (
            "One set of weights holds all of these sizes, the smaller as parts of the larger; the "
            "largest trained one has weights of its own, from before the others learnt in them."
        )
        drawn = f'<div class="grid wide">{frontier_figure(report)}</div>'
        yield section("Between the sizes", said, drawn)
    if any(student.capabilities for student in report.students):
        yield section("What each student kept", _kept_words(report), _kept(report))
    if shown := pictures(report):
        yield section("Where they part", pictures_words(report), shown)
    if report.texts:
        yield section("What they write", texts_words(report.texts), writing(report))
    if report.benchmarks:
        drawn = _sheet(benchmarks_table(report), "Public benchmarks")
        yield section("Public benchmarks", benchmarks_text(report.benchmarks), drawn)
    yield section("Budgets", "", _sheet(budgets_table(report), "Budgets"))
    if (baselines := baselines_table(report)).rows:
        said = "The same students made in other ways"
        said += ", and a model that needs no transformer." if report.linear else "."
        yield section("Baselines", said, _sheet(baselines, "Baselines"))
    said = "Measured on the exported files. In brackets: 95 % intervals."
    yield section("All numbers", said, _sheet(models_table(report), "Teacher and students"))
    if curves := training_figures(report):
        yield section("Training", "", curves)
    charts = importance_figure(report) if report.layer_importance else ""
    charts += unit_figures(report)
    if charts:
        said = "Measured on training rows before anything was cut; the most important is kept."
        yield section("What carries the skill", said, f'<div class="grid wide">{charts}</div>')
    if report.stages:
        charts = f'<div class="grid wide">{stages_figure(report)}</div>'
        yield section("Where the time went", "", charts)
    yield section("Files", "", _sheet(files_table(report), "Files"))
    yield _repeat(report)


def _lead(report: Report) -> str:
    main = report.teacher.main
    said = f"Teacher: {report.teacher.name}"
    if report.teacher.params is not None:
        said += f", {count_text(report.teacher.params)} parameters"
    if main.quality:
        said += f", {quality_text(main.quality)} {report.metric}"
        said += f" on {main.quality.n:,} held-out examples"
    if report.labels:
        said += f" of {len(report.labels)} classes"
    return said + "."


def _verdicts(report: Report) -> str:
    marks = {
        True: '<b class="ok" role="img" aria-label="yes">✓</b>',
        False: '<b class="not" role="img" aria-label="no">✗</b>',
    }
    found = [(v.ok, f"<li>{marks[v.ok]}{text(v.text)}</li>") for v in verdicts(report)]
    held = [item for ok, item in found if ok]
    folded = ""
    if len(found) > _MOST_VERDICTS:
        folded = f"<details><summary>{len(held)} that hold</summary>"
        folded += f'<ul class="verdicts">{"".join(held)}</ul></details>'
        found = [(ok, item) for ok, item in found if not ok]
    shown = "".join(item for _, item in found)
    warnings = "".join(f'<p class="warning">{text(said)}</p>' for said in report.warnings)
    return f'<ul class="verdicts">{shown}</ul>{folded}{warnings}'


def _family_words(report: Report) -> str:
    main, timed = report.teacher.main, timed_against(report, report.students[0])
    said = f"Quality and size against the teacher's {main.format} file"
    said += f" ({quality_text(main.quality)}, {bytes_text(main.size_bytes)})"
    if timed.latency_ms:
        said += f", speed against its {timed.format} file ({latency_text(timed.latency_ms)})"
    return said + f"; {main.device}, {main.threads} thread{'s' if main.threads > 1 else ''}."


def _card(report: Report, index: int, student: StudentEntry) -> str:
    main = student.main
    facts = [
        (smaller(report, student) or "size", bytes_text(main.size_bytes)),
        (faster(report, student) or "latency", latency_text(main.latency_ms)),
        (report.metric, quality_text(main.quality)),
    ]
    if student.fidelity:
        facts.append(("agreement", percent(student.fidelity.agreement)))
    rows = "".join(f"<li><b>{text(a)}</b><span>{text(b)}</span></li>" for a, b in facts)
    for key, limit in student.budget.asked.items():
        found = student.budget.measured[key]
        met = holds(key, limit, found)
        mark = '<b class="ok">✓' if met else '<b class="not">✗'
        brief, briefly = _brief(key, found), _brief(key, limit)
        if brief == briefly:  # a narrow thing is written out
            brief, briefly = budget_value(key, found), budget_value(key, limit)
        said, at_most = f"{BUDGETS[key]} {brief}", f"{bound(key)} {briefly}"
        rows += f"<li>{mark} {text(said)}</b><span>{text(at_most)}</span></li>"
    kept, about = "–", "retention not measured"
    if student.retention:
        low, high = 100 * student.retention.low, 100 * student.retention.high
        kept = percent(student.retention.value)
        about = f"of the teacher's {report.metric} ({low:.1f}–{high:.1f})"
    return (
        f'<article class="card s{index % 8}"><h3><strong>{text(student.name)}</strong>'
        f"<span>{text(count_text(student.params))} parameters</span></h3>"
        f'<p class="big">{text(kept)}</p><p class="small">{text(about)}</p>'
        f'<ul class="facts">{rows}</ul>'
        f'<p class="small">{text(shape_text(student.shape))}. {text(student.reason)}</p></article>'
    )


def _brief(key: str, value: float | None) -> str:
    return count_text(int(value)) if key == "params" and value else budget_value(key, value)


def _kept_words(report: Report) -> str:
    names = capability_names(report)
    kept = [(c.retention.value, s.name) for s, c in _worst(report, names[0]) if c.retention]
    said = "Retention: the student's quality divided by the teacher's, the worst kept at the top, "
    said += "with its 95 % interval. The stronger the colour, the more was lost (green: gained)."
    if kept:
        value, who = min(kept)
        said += f" Least kept: {names[0]} by {who}, {percent(value, 0)}."
    return said


def _worst(report: Report, name: str) -> list[tuple[StudentEntry, Capability]]:
    return [(s, s.capabilities[name]) for s in report.students if name in s.capabilities]


def _kept(report: Report) -> str:
    """Rows are capabilities, columns students; the colour only repeats the number."""
    students = "".join(
        f'<th scope="col" class="student">{words(s.name)}</th>' for s in report.students
    )
    head = f'<th scope="col" class="words">capability</th><th scope="col">n</th>{students}'
    head += '<th scope="col">teacher</th>'
    rows = ""
    for name in capability_names(report):
        common = capability_of(report, name)
        cells = "".join(_kept_cell(s, name) for s in report.students)
        rows += (
            f'<tr><th scope="row" class="words">{words(name)}</th><td>{common.n:,}</td>{cells}'
            f"<td>{text(quality_text(common.teacher_quality))}</td></tr>"
        )
    table = f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="sheet">{scroll(table, "Retention by capability and student")}</div>'


def _kept_cell(student: StudentEntry, name: str) -> str:
    capability = student.capabilities.get(name)
    if capability is None or capability.retention is None:
        return "<td>–</td>"
    kept = capability.retention
    if kept.value < 1:
        shade, part = "lost", min((1 - kept.value) / (1 - _WORST), 1) * 72
    else:
        shade, part = "gained", min((kept.value - 1) / 0.25, 1) * 50
    about = (
        f"{student.name}, {name}: {quality_text(capability.quality)} against "
        f"{quality_text(capability.teacher_quality)} of the teacher, n = {capability.n:,}"
    )
    return (
        f'<td class="kept" style="--shade:var(--{shade});--part:{part:.0f}" title="{text(about)}">'
        f"{text(percent(kept.value, 0))}"
        f"<small>{100 * kept.low:.0f}–{100 * kept.high:.0f}</small></td>"
    )


def _repeat(report: Report) -> str:
    recipe = text("\n".join(recipe_lines(report.recipe)))
    return section(
        "How to repeat",
        "In this run's folder; the same recipe and versions give the same weights.",
        f"<pre>{text(REPEAT)}</pre>"
        f"{_sheet(environment_table(report), 'Environment')}"
        f"<details><summary>The resolved recipe</summary><pre>{recipe}</pre></details>",
    )


def _sheet(table: Table, about: str) -> str:
    return f'<div class="sheet">{sheet(table, about)}</div>'
