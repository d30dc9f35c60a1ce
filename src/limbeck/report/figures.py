"""The page's charts, from a report to a `<figure>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from limbeck.report.charts import Hollow, Level, Point, mark_path, scatter
from limbeck.report.curves import LOSSES, Bar, bars, loss_of, training_panel
from limbeck.report.document import Quality, Report, TeacherEntry, TrainingPoint
from limbeck.report.tables import Table, cost_text, stages_table
from limbeck.report.tags import figure, text
from limbeck.report.wording import (
    BASELINES,
    NONE,
    bytes_text,
    count_text,
    energy_text,
    latency_text,
    percent,
    quality_text,
    seconds_text,
    shape_text,
)

Costs = Callable[[TeacherEntry], tuple[float, str] | None]  # on the x axis, and in words


def scatters(report: Report) -> str:
    """Quality against size and against latency, each if at least one model has both."""
    charts = [
        _scatter(report, "size", "size of the file, MB (logarithmic)", _size),
        _scatter(report, "latency", "median latency, ms (logarithmic)", _latency),
    ]
    drawn = "".join(charts)
    return f'{_keys(report, below="hollow below" in drawn)}<div class="grid wide">{drawn}</div>'


def _size(model: TeacherEntry) -> tuple[float, str]:
    return model.main.size_bytes / 1e6, bytes_text(model.main.size_bytes)


def _latency(model: TeacherEntry) -> tuple[float, str] | None:
    found = model.main.latency_ms
    return (found.median, latency_text(found)) if found else None


def _scatter(report: Report, cost: str, axis: str, cost_of: Costs) -> str:
    title = f"{report.metric.capitalize()} against {cost}"
    models: list[tuple[str, str, TeacherEntry]] = [("teacher", "teacher", report.teacher)]
    models += [(s.name, f"s{i % 8}", s) for i, s in enumerate(report.students)]
    points, rows = [], []
    for name, style, model in models:
        quality, found = model.main.quality, cost_of(model)
        if quality is None or found is None or found[0] <= 0:
            continue
        baselines = _baselines(report, name)
        hollow = tuple(
            Hollow(y=q.value, kind=k, name=BASELINES[k], title=_title(name, k, q))
            for k, q in baselines
        )
        points.append(
            Point(
                label=name, x=found[0], y=quality.value, low=quality.low, high=quality.high,
                style=style, title=f"{name}: {quality_text(quality)} {report.metric}, {found[1]}",
                hollow=hollow,
            )
        )  # fmt: skip
        known = dict(baselines)
        others = [quality_text(known.get(kind)) for kind in BASELINES]
        rows.append((name, found[1], quality_text(quality), *others))
    if not points:
        return figure(title, f"The {cost} was not measured.", "", None)
    level = None
    if linear := report.linear:
        level = Level(
            label=f"linear {percent(linear.value)}", y=linear.value, low=linear.low,
            high=linear.high, title=f"linear model on TF-IDF: {quality_text(linear)}",
        )  # fmt: skip
        rows.append(("linear on TF-IDF", NONE, quality_text(linear), *(NONE for _ in BASELINES)))
    missing = len(models) - len(points)
    about = f"of the teacher's {report.teacher.primary} file"
    about += f" and the students' {report.students[0].primary} files; up and to the left is better"
    if missing:
        about += f"; {missing} model{'s' if missing > 1 else ''} without a measured {cost} left out"
    drawing = scatter(points, level, title=title, x_label=axis, y_label=f"{report.metric}, %")
    return figure(
        title, about, drawing,
        Table(("model", cost, report.metric, *BASELINES.values()), tuple(rows)),
    )  # fmt: skip


def _baselines(report: Report, name: str) -> list[tuple[str, Quality]]:
    student = next((s for s in report.students if s.name == name), None)
    found = [(kind, getattr(student.baselines, kind)) for kind in BASELINES] if student else []
    return [(kind, quality) for kind, quality in found if quality]


def _title(name: str, kind: str, quality: Quality) -> str:
    return f"{name}, {BASELINES[kind]}: {quality_text(quality)}"


def _keys(report: Report, *, below: bool) -> str:
    marks = [
        ('<path class="dot teacher" d="M11 1l7 7l-7 7l-7 -7Z"/>', "teacher"),
        ('<circle class="dot s0" cx="11" cy="8" r="6"/>', "student"),
        ('<path class="whisker" d="M11 1V15M7 1h8M7 15h8"/>', "95 % interval"),
    ]
    shown = [k for k in BASELINES if any(getattr(s.baselines, k) for s in report.students)]
    for kind in shown:
        path = f'<path class="hollow" d="{mark_path(kind, 11, 8)}"/>'
        marks.append((path, f"baseline: {BASELINES[kind]}"))
    if below:
        marks.append(('<path class="hollow" d="M6 3h10L11 13Z"/>', "baseline below the chart"))
    if report.linear:
        marks.append(('<path class="level" d="M0 8h22"/>', "linear model on TF-IDF"))
    items = "".join(
        f'<li><svg viewBox="0 0 22 16" aria-hidden="true">{mark}</svg>{text(name)}</li>'
        for mark, name in marks
    )
    return f'<ul class="keys">{items}</ul>'


def training_figures(report: Report) -> str:
    """A panel for each model that was trained: losses above, validation quality below."""
    panels = [
        figure(name, "", training_panel(name, points), _training_table(points))
        for name, points in report.training.items()
        if any(p.loss is not None or p.validation is not None for p in points)
    ]
    if not panels:
        return ""
    found = [p for points in report.training.values() for p in points]
    shown = [k for k in LOSSES if any(loss_of(p, k) is not None for p in found)]
    marks = [
        (f'<path class="curve {k}" d="M0 8h22"/>', f"loss: {LOSSES[k]}, mean per example")
        for k in shown
    ]
    if any(p.cosines for p in found):
        note = "gradients: norm of each part's; cosine below 0: the parts pull against each other"
        marks.append(('<path class="curve loss" d="M0 8h22"/>', note))
    if any(p.validation is not None for p in found):
        marks.append(
            ('<circle class="dot validation" cx="11" cy="8" r="4"/>', "validation quality")
        )
    items = "".join(
        f'<li><svg viewBox="0 0 22 16" aria-hidden="true">{mark}</svg>{text(name)}</li>'
        for mark, name in marks
    )
    return f'<ul class="keys">{items}</ul><div class="grid panels">{"".join(panels)}</div>'


def _training_table(points: Sequence[TrainingPoint]) -> Table:
    """At most some twenty rows; report.json has all of them."""
    every = -(-len(points) // 20)
    chosen = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    shown = [key for key in LOSSES if any(loss_of(p, key) is not None for p in points)]
    writes = any(p.writing is not None for p in points)
    rows = tuple(
        (
            f"{p.step:,}",
            *("" if (v := loss_of(p, key)) is None else f"{v:.4f}" for key in shown),
            "" if p.examples_per_s is None else f"{p.examples_per_s:,.0f}",
            *([NONE if p.writing is None else percent(p.writing, 0)] if writes else []),
            percent(p.validation) if p.validation is not None else "",
        )
        for p in chosen
    )
    titles = [*(LOSSES[key] for key in shown), "examples/s", *(["writing"] if writes else [])]
    return Table(("step", *titles, "validation"), rows)


def frontier_figure(report: Report) -> str:
    """What an elastic run holds: its sizes, and what may be cut between them."""
    students = {s.name: i for i, s in enumerate(report.students)}
    points, rows = [], []
    for p in report.frontier:
        said = f"{count_text(p.params)} parameters, {p.size_mb:.2f} MB"
        kind = "trained" if p.trained else "not trained"
        style = f"s{students[p.name] % 8}" if p.name in students else "between"
        who, shape = p.name or "between", shape_text(p.shape)
        title = f"{who}: {percent(p.quality)}, {said}, {shape}, {kind}"
        points.append(
            Point(
                label=p.name or "", x=p.params / 1e6, y=p.quality, low=p.quality, high=p.quality,
                style=style, title=title, radius=6.5 if p.name else 3.5,
            )
        )  # fmt: skip
        cells = (count_text(p.params), f"{p.size_mb:.2f}", percent(p.quality), f"{p.loss:.3f}")
        rows.append((p.name or NONE, kind, *cells, shape_text(p.shape)))
    title, first = "Sizes that one run holds", report.frontier[0]
    about = (
        f"Small dots were never trained: `limbeck scale` cuts them in a minute. fp32, "
        f"{first.n:,} validation rows, which the choice between them is made on."
    )
    axis = "parameters, millions (logarithmic)"
    drawing = scatter(points, None, title=title, x_label=axis, y_label=f"{report.metric}, %")
    heads = ("student", "", "parameters", "MB", report.metric, "loss", "shape")
    return figure(title, about, drawing, Table(heads, tuple(rows)))


def stages_figure(report: Report) -> str:
    rows = []
    for stage in report.stages:
        seconds, energy = seconds_text(stage.seconds), energy_text(stage.energy_wh)
        note = seconds if stage.energy_wh is None else f"{seconds} · {energy}"
        said = f"{stage.name}: {note}, {stage.energy_source}{', reused' if stage.reused else ''}"
        name = stage.name + (" (reused)" if stage.reused else "")
        rows.append(Bar(label=name, value=stage.seconds, note=note, title=said, faded=stage.reused))
    sources = "; ".join(dict.fromkeys(stage.energy_source for stage in report.stages))
    about = f"{cost_text(report.stages)} Energy: {sources}."
    title = "Time and energy of each stage"
    drawing = bars(rows, title=title, axis="wall time, seconds")
    return figure(title, about, drawing, stages_table(report))


_LAYERS_ABOUT = {
    "leave-one-out": "By how much the loss rises without the layer.",
    "block-influence": "How far the layer turns what runs through it.",
}


def importance_figure(report: Report) -> str:
    """How much each of the teacher's layers matters, and who keeps it."""
    rows, cells = [], []
    for layer, value in enumerate(report.layer_importance or ()):
        keepers = [s.name for s in report.students if layer in s.shape.layers]
        kept = f"kept by {len(keepers)} of {len(report.students)}"
        label, named = f"layer {layer}", ", ".join(keepers) or "no one"
        rows.append(
            Bar(
                label=label, value=value, note=f"{value:.3g} · {kept}",
                title=f"{label}: {value:.4g}, kept by {named}", faded=not keepers,
            )
        )  # fmt: skip
        cells.append((label, f"{value:.4g}", named))
    title = "Importance of the teacher's layers"
    drawing = bars(rows, title=title, axis="importance (more matters more)")
    table = Table(("layer", "importance", "kept by"), tuple(cells))
    about = _LAYERS_ABOUT[report.importance.get("layers", "leave-one-out")]
    return figure(title, f"{about} Pale bars: layers that no student keeps.", drawing, table)
