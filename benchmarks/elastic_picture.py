"""Small plots as SVG files: points and lines over a logarithmic axis.

    python benchmarks/elastic.py runs/quickstart --json FILE
    python benchmarks/elastic_picture.py FILE... OUT.svg

draws what `elastic.py` found: accuracy by size, means and spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from elastic import _SHAPES

_WIDTH, _HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 40, 46
_FONT = 'font-family="sans-serif" font-size="12" fill="#333"'


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]  # (x, y), by x
    colour: str
    line: bool = True
    hollow: bool = False
    spread: Sequence[tuple[float, float]] = ()  # lowest and highest y of each point


def draw(path: Path, title: str, x_label: str, series: Sequence[Series]) -> None:
    """Writes the file; the y axis is in %."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [y for s in series for e in s.spread for y in e]
    x_low, x_high = math.log10(min(xs)) - 0.06, math.log10(max(xs)) + 0.06
    step = next(step for step in (1, 2, 5, 10, 20) if (max(ys) - min(ys)) / step <= 8)
    y_low, y_high = step * math.floor(min(ys) / step), step * math.ceil(max(ys) / step)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    body = [
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="18" {_FONT} font-weight="bold">{escape(title)}</text>',
        f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 8}" {_FONT} text-anchor="middle">'
        f"{escape(x_label)}</text>",
    ]
    for k in range(round((y_high - y_low) / step) + 1):
        y = y_low + k * step
        _, py = at(10**x_low, y)
        body.append(f'<path d="M{_LEFT} {py:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        body.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" {_FONT} text-anchor="end">{y}</text>')
    for tick in _ticks(x_low, x_high):
        px, bottom = at(tick, y_low)
        body.append(f'<path d="M{px:.1f} {bottom:.1f}v4" stroke="#888"/>')
        body.append(f'<text x="{px:.1f}" y="{bottom + 18:.1f}" {_FONT} text-anchor="middle">'
                    f"{tick:g}</text>")  # fmt: skip
    for at_series, s in enumerate(series):
        places = [at(x, y) for x, y in s.points]
        if s.line:
            d = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
            body.append(f'<path d="{d}" fill="none" stroke="{s.colour}" stroke-width="1.5"/>')
        for (x, _), ends in zip(s.points, s.spread, strict=False):
            (px, low), (_, high) = at(x, ends[0]), at(x, ends[1])
            body.append(f'<path d="M{px:.1f} {low:.1f}V{high:.1f}" stroke="{s.colour}"/>')
        fill = "#fff" if s.hollow else s.colour
        for px, py in places:
            body.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{fill}" '
                        f'stroke="{s.colour}"/>')  # fmt: skip
        down = _HEIGHT - _BOTTOM - 12 - 17 * (len(series) - 1 - at_series)
        right = _WIDTH - _RIGHT - 215
        body.append(f'<circle cx="{right}" cy="{down}" r="3.5" fill="{fill}" stroke="{s.colour}"/>')
        body.append(f'<text x="{right + 10}" y="{down + 4}" {_FONT}>{escape(s.name)}</text>')
    inner = "\n".join(body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}">\n{inner}\n</svg>\n',
        encoding="utf-8",
    )


def _ticks(low: float, high: float) -> list[float]:
    every = [m * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [tick for tick in every if low <= math.log10(tick) <= high]


_COLOURS = {
    "dedicated": "#222", "elastic 0.25": "#9cc3e6", "elastic 0.5": "#4a90c8",
    "elastic 1": "#1f4f8f",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("found", type=Path, nargs="+", help="JSON of elastic.py")
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    rows = [row for path in options.found for row in json.loads(path.read_text(encoding="utf-8"))]
    series = []
    for what, colour in _COLOURS.items():
        of_it = sorted((_weights(row["size"]), row) for row in rows if row["setting"] == what)
        if of_it:
            name = what.replace("elastic ", "family, cost ")
            series.append(Series(
                name, [(x, row["ours"]) for x, row in of_it], colour,
                spread=[(min(row["by_seed"]), max(row["by_seed"])) for _, row in of_it],
            ))  # fmt: skip
    draw(options.svg, "Five sizes: accuracy on test rows, %", "% of the encoder's weights", series)


def _weights(size: str) -> float:
    """Of a student's encoder, % of MiniLM's."""
    heads, ffn, layers = _SHAPES[size]
    width = 32 * heads
    return 100 * layers * (4 * width**2 + 2 * width * ffn) / (6 * (4 * 384**2 + 2 * 384 * 1536))


if __name__ == "__main__":
    main()
