"""What carries the teacher's skill, as inline SVG: unit by unit, or how few of many carry most."""

from __future__ import annotations

import math
from html import escape

from limbeck.report.document import Report
from limbeck.report.drawing import svg, svg_text
from limbeck.report.shapes import UnitImportance
from limbeck.report.tables import Table
from limbeck.report.tags import figure
from limbeck.report.wording import percent

_WIDTH, _LEFT, _ROW = 420, 96, 22
_MOST_LINES = 48
_ABOUT = {
    "taylor": "How much the loss depends on each unit (Taylor, squared)",
    "activation": "How large what each unit gives is (mean of |x|)",
    "magnitude": "How large the weights of each unit are (sum of squares)",
}


def unit_figures(report: Report) -> str:
    """A map of units for axes of few, curves for axes of many."""
    found = ""
    for axis in dict.fromkeys(group.axis for group in report.unit_importance):
        groups = [g for g in report.unit_importance if g.axis == axis]
        if all(group.by_unit is not None for group in groups):
            found += _map(report, axis, groups)
        else:
            found += _curves(report, axis, groups)
    return found


def _map(report: Report, axis: str, groups: list[UnitImportance]) -> str:
    """A row for each group, a cell for each unit; the darker, the more it matters to the whole."""
    values = [[share * g.total for share in g.by_unit or ()] for g in groups]
    most = max((v for row in values for v in row), default=0.0) or 1.0
    columns = max(len(row) for row in values)
    wide = (_WIDTH - _LEFT - 8) / columns
    body = []
    for at, (group, row) in enumerate(zip(groups, values, strict=True)):
        y = 4 + _ROW * at
        body.append(svg_text(_LEFT - 8, y + 15, group.group, "tick", anchor="end"))
        for unit, value in enumerate(row):
            shade = math.sqrt(max(value, 0.0) / most)
            part = percent(value / most)
            title = f"{group.group}, unit {unit}: {value:.3g}, {part} of the largest"
            body.append(
                f"<g><title>{escape(title)}</title>"
                f'<rect class="cell" x="{_LEFT + wide * unit:.1f}" y="{y}" '
                f'width="{wide - 2:.1f}" height="{_ROW - 3}" rx="2" '
                f'fill-opacity="{0.04 + 0.96 * shade:.3f}"/></g>'
            )
    bottom = 4 + _ROW * len(groups)
    body.append(svg_text((_LEFT + _WIDTH) / 2, bottom + 15, "unit", "axis", anchor="middle"))
    title = f"Importance of {axis}"
    rows = tuple(
        (g.group, f"{g.total:.3g}", *(percent(share, 0) for share in g.by_unit or ()))
        for g in groups
    )
    heads = ("group", "total", *(str(i) for i in range(columns)))
    about = f"{_ABOUT[report.importance.get('units', 'taylor')]}: the darker, the more."
    return figure(title, about, svg(_WIDTH, bottom + 22, title, body), Table(heads, rows))


def _curves(report: Report, axis: str, groups: list[UnitImportance]) -> str:
    """A line for each group: what share of the importance its best units carry together."""
    left, top, bottom, right = 46, 10, 210, _WIDTH - 10
    body = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = bottom - (bottom - top) * tick, left + (right - left) * tick
        body.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(svg_text(left - 6, y + 4, f"{100 * tick:.0f}", "tick", anchor="end"))
        body.append(svg_text(x, bottom + 16, f"{100 * tick:.0f}", "tick", anchor="middle"))
    full = _full_size(report, axis)
    for index, student in enumerate(report.students):
        if full and axis in student.shape.sizes:
            share = student.shape.sizes[axis] / full
            x = left + (right - left) * share
            title = f"{student.name} keeps {percent(share, 0)} of {axis}"
            body.append(
                f"<g><title>{escape(title)}</title>"
                f'<path class="join s{index % 8}" d="M{x:.1f} {top}V{bottom}"/></g>'
            )
    for at, group in enumerate(groups[:_MOST_LINES]):
        steps = len(group.cumulative) - 1
        line = "L".join(
            f"{left + (right - left) * k / steps:.1f} {bottom - (bottom - top) * value:.1f}"
            for k, value in enumerate(group.cumulative)
        )
        half = group.cumulative[steps // 2]
        title = f"{group.group}: half of {group.units:,} units carry {percent(half, 0)}"
        body.append(
            f"<g><title>{escape(title)}</title>"
            f'<path class="curve s{at % 8}" d="M{line}"/></g>'
        )
    middle = (left + right) / 2
    body.append(svg_text(middle, bottom + 33, "best units, %", "axis", anchor="middle"))
    title = f"Importance of {axis}"
    rows = tuple(
        (g.group, f"{g.units:,}", f"{g.total:.3g}",
         *(percent(g.cumulative[k], 0) for k in _quarters(g)))
        for g in groups
    )  # fmt: skip
    heads = ("group", "units", "total", "best 25 %", "best 50 %", "best 75 %")
    about = "Share of the importance, %, that the best units carry; upright: what students keep."
    return figure(title, about, svg(_WIDTH, bottom + 40, title, body), Table(heads, rows))


def _quarters(group: UnitImportance) -> tuple[int, int, int]:
    steps = len(group.cumulative) - 1
    return steps // 4, steps // 2, 3 * steps // 4


def _full_size(report: Report, axis: str) -> int | None:
    sizes = [g.units for g in report.unit_importance if g.axis == axis]
    return max(sizes, default=None)
