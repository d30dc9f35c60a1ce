"""Training curves and bars as inline SVG; see charts.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from limbeck.report.charts import linear_axis
from limbeck.report.document import TrainingPoint
from limbeck.report.drawing import svg, svg_text

_WIDTH, _LEFT, _RIGHT = 400, 62, 12
_MOST = 150  # points drawn in a curve: means of as many equal stretches
LOSSES = {
    "loss": "total", "soft": "soft targets", "hard": "hard labels", "hidden": "hidden states",
    "embedding": "embeddings", "on_policy": "own texts",
}  # fmt: skip

Scale = Callable[[float], float]  # from a value to its place in the drawing
Pairs = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    label: str
    value: float
    note: str
    title: str
    faded: bool = False


def training_panel(name: str, points: Sequence[TrainingPoint]) -> str:
    """One model's losses, the gradients of their parts and the angle between them, and its
    validation quality, against the optimizer's steps."""
    losses = {key: series(points, partial(loss_of, key=key)) for key in LOSSES}
    losses = {key: pairs for key, pairs in losses.items() if pairs}
    validation = series(points, lambda p: p.validation)
    last = max((p.step for p in points), default=0) or 1
    body: list[str] = []
    bottom = 12.0
    if losses:
        values = [y for pairs in losses.values() for _, y in pairs]
        body += _frame(12, 142, [0.0, *values], "loss")
        for key, pairs in losses.items():
            line = _path(pairs, last, _scale([0.0, *values], 12, 142))
            title = f"{name}: {LOSSES[key]}, {pairs[0][1]:.3g} to {pairs[-1][1]:.3g}"
            body.append(
                f'<g><title>{escape(title)}</title><path class="curve {key}" d="{line}"/></g>'
            )
        bottom = 142.0
    looked = [p for p in points if p.gradients]
    norms = {
        key: [(float(p.step), p.gradients[key]) for p in looked]
        for key in LOSSES if all(key in p.gradients for p in looked)
    }  # fmt: skip
    cosines = {
        pair: [(float(p.step), p.cosines[pair]) for p in looked]
        for pair in (looked[0].cosines if looked else ())
    }
    if cosines:
        values = [0.0, *(y for pairs in norms.values() for _, y in pairs)]
        top, bottom = bottom + 22, bottom + 98
        body += _frame(top, bottom, values, "gradients", ticks=3)
        for key, pairs in norms.items():
            line = _path(pairs, last, _scale(values, top, bottom))
            title = (
                f"{name}: norm of the gradient of {LOSSES[key]}, {pairs[0][1]:.3g} to "
                f"{pairs[-1][1]:.3g}"
            )
            body.append(
                f'<g><title>{escape(title)}</title><path class="curve {key}" d="{line}"/></g>'
            )
        top, bottom = bottom + 22, bottom + 88
        body += _frame(top, bottom, [-1.0, 0.0, 1.0], "cosine", ticks=3)
        for pair, cosine in cosines.items():
            least = min(y for _, y in cosine)
            title = f"{name}: cosine between the gradients of {pair}, at least {least:.2f}"
            line = _path(cosine, last, _scale([-1.0, 1.0], top, bottom))
            body.append(
                f'<g><title>{escape(title)}</title><path class="curve loss" d="{line}"/></g>'
            )
    if validation:
        top = bottom + 22 if losses or cosines else bottom
        bottom = top + 76
        percents = [(x, 100 * y) for x, y in validation]
        values = [y for _, y in percents]
        body += _frame(top, bottom, values, "quality, %", ticks=3, most=100)
        scale = _scale(values, top, bottom)
        body.append(f'<path class="curve validation" d="{_path(percents, last, scale)}"/>')
        for x, y in percents:
            title = escape(f"{name}: {y:.1f} % on the validation rows after {x:,.0f} steps")
            at = f'cx="{_px(x, last):.1f}" cy="{scale(y):.1f}"'
            body.append(
                f'<g><title>{title}</title><circle class="dot validation" {at} r="3.5"/></g>'
            )
    body.append(svg_text(_LEFT, bottom + 16, "0", "tick", anchor="middle"))
    body.append(svg_text(_WIDTH - _RIGHT, bottom + 16, f"{last:,}", "tick", anchor="end"))
    body.append(svg_text((_LEFT + _WIDTH) / 2, bottom + 17, "step", "axis", anchor="middle"))
    return svg(_WIDTH, bottom + 24, f"Training of {name}", body)


def loss_of(point: TrainingPoint, key: str) -> float | None:
    """One of `LOSSES`."""
    return point.loss if key == "loss" else point.terms.get(key)


def series(
    points: Sequence[TrainingPoint], value: Callable[[TrainingPoint], float | None]
) -> Pairs:
    """The steps that have this value; long curves as the means of equal stretches."""
    found = [(float(p.step), float(v)) for p in points if (v := value(p)) is not None]
    stretch = -(-len(found) // _MOST)
    if stretch <= 1:
        return found
    parts = [found[i : i + stretch] for i in range(0, len(found), stretch)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def bars(rows: Sequence[Bar], *, title: str, axis: str) -> str:
    """Horizontal bars from zero; each with its name and its number in words above it."""
    wide, row, top = 420, 38, 4
    ticks, _, high = linear_axis([0.0, max((bar.value for bar in rows), default=0.0) or 1.0])
    bottom = top + row * len(rows)
    body = []
    for tick in (tick for tick in ticks if tick > 0):
        x = 6 + (wide - 20) * tick / high
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        body.append(svg_text(x, bottom + 16, f"{tick:,.10g}", "tick", anchor="middle"))
    for i, bar in enumerate(rows):
        y = top + row * i
        length = max((wide - 20) * max(bar.value, 0.0) / high, 1.5)
        style = "bar faded" if bar.faded else "bar"
        body.append(
            f"<g><title>{escape(bar.title)}</title>"
            f'<rect class="{style}" x="6" y="{y + 21}" width="{length:.1f}" height="11" rx="2"/>'
            f"{svg_text(6, y + 15, bar.label, 'row')}"
            f"{svg_text(wide - 4, y + 15, bar.note, 'row number', anchor='end')}</g>"
        )
    body.append(svg_text(wide / 2, bottom + 36, axis, "axis", anchor="middle"))
    return svg(wide, bottom + 44, title, body)


def _px(step: float, last: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last


def _scale(values: Sequence[float], top: float, bottom: float) -> Scale:
    _, low, high = linear_axis(values)
    return lambda y: bottom - (bottom - top) * (y - low) / (high - low)


def _path(pairs: Pairs, last: float, scale: Scale) -> str:
    return "M" + "L".join(f"{_px(x, last):.1f} {scale(y):.1f}" for x, y in pairs)


def _frame(
    top: float, bottom: float, values: Sequence[float], label: str, ticks: int = 6,
    most: float = math.inf,
) -> list[str]:  # fmt: skip
    found = [tick for tick in linear_axis(values)[0] if tick <= most]
    found = found[:: -(-len(found) // ticks)]
    scale = _scale(values, top, bottom)
    body = []
    for tick in found:
        y = scale(tick)
        body.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        body.append(svg_text(_LEFT - 6, y + 4, f"{tick:,.10g}", "tick", anchor="end"))
    middle = (top + bottom) / 2
    body.append(
        f'<text class="axis" text-anchor="middle" transform="translate(12 {middle:.1f}) '
        f'rotate(-90)">{escape(label)}</text>'
    )
    return body
