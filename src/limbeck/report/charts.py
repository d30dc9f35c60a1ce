"""Charts as inline SVG: pure functions from numbers to text, coloured by the page's CSS classes.

Drawn for a viewBox about as wide as a phone, so that the text stays readable there; wide pages put
charts side by side. Every mark carries a `<title>`, the tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from limbeck.report.drawing import (
    LETTER,
    LINE,
    Box,
    Label,
    leader,
    leader_boxes,
    place,
    place_around,
    short,
    svg,
    svg_text,
)

WIDTH, HEIGHT = 420, 370
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 50  # margins of the scatter's plot


@dataclass(frozen=True, kw_only=True, slots=True)
class Hollow:
    """A baseline of a point, at the same place on the x axis."""

    y: float
    kind: str  # mark: hard_labels, random_init, untaught, dedicated
    name: str  # in words
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    label: str
    x: float
    y: float
    low: float
    high: float
    style: str  # CSS class
    title: str
    hollow: tuple[Hollow, ...] = ()
    radius: float = 6.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A horizontal line with its interval as a band."""

    label: str
    y: float
    low: float
    high: float
    title: str


PLOT = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
ROOM = Box(LEFT, TOP - 8, WIDTH - 2, HEIGHT - BOTTOM + 4)  # where labels may stand
STRIP = 26  # at the foot of the plot, for the arrows of baselines that lie below it


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot's two scales."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    floor: float  # where y_low lies

    def x(self, value: float) -> float:
        share = math.log(value / self.x_low) / math.log(self.x_high / self.x_low)
        return PLOT.left + share * (PLOT.right - PLOT.left)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.floor - share * (self.floor - PLOT.top)

    def shown(self, point: Point) -> list[Hollow]:
        return [h for h in point.hollow if h.y >= self.y_low]

    def below(self, point: Point) -> list[Hollow]:
        return [h for h in point.hollow if h.y < self.y_low]


def scatter(
    points: Sequence[Point], level: Level | None, *, title: str, x_label: str, y_label: str
) -> str:
    """Quality (fractions, shown in %) against a cost on a logarithmic axis."""
    x_ticks, x_low, x_high = log_axis([p.x for p in points])
    y_ticks, y_low, y_high = linear_axis(_worth_showing(points, level))
    below = any(h.y < y_low for p in points for h in p.hollow)
    frame = Frame(x_low, x_high, y_low, y_high, PLOT.bottom - (STRIP if below else 0))
    taken = [box for p in points for box in _covered(p, frame)]
    body = [*_grid(x_ticks, y_ticks, frame), *_axis_labels(x_label, y_label)]
    if level:
        body.append(_level(level, frame))
        if spot := place(_beside_line(level.label, frame.y(level.y)), taken, ROOM, must=False):
            taken.append(spot.box)
            body.append(spot.draw(level.label, "note"))
    body += [_whiskers(p, frame) for p in points]
    body += [_mark(p, frame.x(p.x), frame.y(p.y)) for p in points]
    # then a label that fits nowhere is left to the tooltip
    crowded = sum(bool(p.label) for p in points) > 14
    for p in (p for p in points if p.label):
        x, y, label = frame.x(p.x), frame.y(p.y), short(p.label)
        own = [*_covered(p, frame)]
        if spot := place_around(label, x, y, own=own, taken=taken, within=ROOM, must=not crowded):
            taken += [spot.box, *leader_boxes(x, y, spot.box)]
            body += [leader(x, y, spot.box), spot.draw(label, f"name {p.style}")]
    for p in points:
        if low := frame.below(p):
            words = ", ".join(f"{h.name} {100 * h.y:.0f} %" for h in low)
            if spot := place(_beside_arrow(words, frame.x(p.x)), taken, ROOM, must=False):
                taken.append(spot.box)
                body.append(spot.draw(words, "note"))
    return svg(WIDTH, HEIGHT, title, body)


def _worth_showing(points: Sequence[Point], level: Level | None) -> list[float]:
    """Values the y axis spans. A baseline far below would press the rest flat: it gets an arrow."""
    main = [v for p in points for v in (p.low, p.high, p.y)]
    main += [level.low, level.high] if level else []
    span = max(max(main) - min(main), 0.02)
    return main + [h.y for p in points for h in p.hollow if h.y > min(main) - 0.8 * span]


def _covered(p: Point, frame: Frame) -> Iterator[Box]:
    """What a point, its whiskers and its baselines hide."""
    x, y = frame.x(p.x), frame.y(p.y)
    yield Box(x - 8, y - 8, x + 8, y + 8)
    yield Box(x - 4, frame.y(p.high), x + 4, frame.y(p.low))
    for h in frame.shown(p):
        yield Box(x - 6, frame.y(h.y) - 6, x + 6, frame.y(h.y) + 6)
    if frame.below(p):
        yield Box(x - 6, PLOT.bottom - 16, x + 6, PLOT.bottom)


def _level(level: Level, frame: Frame) -> str:
    y, top = frame.y(level.y), frame.y(level.high)
    height = max(frame.y(level.low) - top, 1)
    return (
        f"<g><title>{escape(level.title)}</title>"
        f'<rect class="band" x="{PLOT.left}" y="{top:.1f}" width="{PLOT.right - PLOT.left}" '
        f'height="{height:.1f}"/><line class="level" x1="{PLOT.left}" x2="{PLOT.right}" '
        f'y1="{y:.1f}" y2="{y:.1f}"/></g>'
    )


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], frame: Frame) -> Iterator[str]:
    for tick in y_ticks:
        y = frame.y(tick)
        yield f'<line class="grid" x1="{PLOT.left}" x2="{PLOT.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield svg_text(PLOT.left - 7, y + 4.5, f"{100 * tick:.10g}", "tick", anchor="end")
    for tick in x_ticks:
        x = frame.x(tick)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{PLOT.top}" y2="{PLOT.bottom}"/>'
        yield svg_text(x, PLOT.bottom + 17, f"{tick:,.10g}", "tick", anchor="middle")


def _axis_labels(x_label: str, y_label: str) -> Iterator[str]:
    yield svg_text((PLOT.left + PLOT.right) / 2, HEIGHT - 10, x_label, "axis", anchor="middle")
    middle = (PLOT.top + PLOT.bottom) / 2
    yield (
        f'<text class="axis" text-anchor="middle" transform="translate(15 {middle:.1f}) '
        f'rotate(-90)">{escape(y_label)}</text>'
    )


def _whiskers(p: Point, frame: Frame) -> str:
    """The interval, and the thin line that joins a point with its baselines."""
    x, low, high = frame.x(p.x), frame.y(p.low), frame.y(p.high)
    path = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    body = f'<path class="whisker {p.style}" d="{path}"/>' if p.low < p.high else ""
    if p.hollow:
        ends = [frame.y(p.y), *(frame.y(h.y) for h in frame.shown(p))]
        ends += [PLOT.bottom - 10] if frame.below(p) else []
        join = f"M{x:.1f} {min(ends):.1f}V{max(ends):.1f}"
        body = f'<path class="join {p.style}" d="{join}"/>' + body
    for h in frame.shown(p):
        body += _hollow(h.title, mark_path(h.kind, x, frame.y(h.y)), p.style)
    if low_ones := frame.below(p):
        arrow = f"M{x - 5:.1f} {PLOT.bottom - 14:.1f}h10l-5 10Z"
        body += _hollow("; ".join(h.title for h in low_ones), arrow, f"below {p.style}")
    return body


def _hollow(title: str, path: str, style: str) -> str:
    return f'<g><title>{escape(title)}</title><path class="hollow {style}" d="{path}"/></g>'


def mark_path(kind: str, x: float, y: float) -> str:
    """A baseline's mark: circle, triangle, diamond or square."""
    match kind:
        case "hard_labels":
            return f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z"
        case "random_init":
            return f"M{x:.1f} {y - 5.5:.1f}l5.5 10h-11Z"
        case "dedicated":
            return f"M{x - 6:.1f} {y:.1f}l6 -6l6 6l-6 6Z"
        case _:
            return f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9Z"


def _mark(p: Point, x: float, y: float) -> str:
    title = f"<title>{escape(p.title)}</title>"
    if p.style == "teacher":
        shape = f'<path class="dot teacher" d="M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8 -8Z"/>'
    else:
        shape = f'<circle class="dot {p.style}" cx="{x:.1f}" cy="{y:.1f}" r="{p.radius:g}"/>'
    return f"<g>{title}{shape}</g>"


def _beside_line(label: str, y: float) -> Iterator[Label]:
    wide = len(label) * LETTER
    for left in (PLOT.left + 6, PLOT.right - wide - 6, (PLOT.left + PLOT.right - wide) / 2):
        for top in (y - LINE - 3, y + 3):
            yield Label(Box(left, top, left + wide, top + LINE), "start")


def _beside_arrow(words: str, x: float) -> Iterator[Label]:
    wide, top = len(words) * LETTER, PLOT.bottom - LINE - 1
    yield Label(Box(x + 9, top, x + 9 + wide, top + LINE), "start")
    yield Label(Box(x - 9 - wide, top, x - 9, top + LINE), "end")


def log_axis(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Ticks and ends of a logarithmic axis around positive values."""
    low, high = min(values) / 1.5, max(values) * 1.5
    while high / low < 8:
        low, high = low / 1.2, high * 1.2
    steps = (1, 2, 5) if high / low < 300 else (1,)
    every = max(1, math.ceil(math.log10(high / low) / 6))  # at most some six decades are named
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    return [tick for tick in ticks if low <= tick <= high], low, high


def linear_axis(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Ticks and ends of a linear axis, with some air."""
    low, high = min(values), max(values)
    air = max(0.06 * (high - low), 0.01 * abs(high), 1e-6)
    low, high = low - air, high + air
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    first = math.ceil(low / step)
    ticks = [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]
    return ticks, low, high
