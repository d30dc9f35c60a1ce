"""SVG text, and places for labels that hide neither points nor each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

LETTER, LINE = 8.4, 17  # generous: a letter of a name on a phone, where text is 15 px


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * high if wide > 0 and high > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Label:
    """Where a label may stand, and from which end its letters run."""

    box: Box
    anchor: str

    def draw(self, text: str, style: str) -> str:
        at = {"start": self.box.left, "end": self.box.right}
        middle = (self.box.left + self.box.right) / 2
        return svg_text(
            at.get(self.anchor, middle), self.box.bottom - 4.5, text, style, anchor=self.anchor
        )


def _around(label: str, x: float, y: float) -> Iterator[Label]:
    """Places for a label, the best first: beside the point, then in growing circles."""
    wide = len(label) * LETTER
    for reach in (12, 20, 32, 46, 62, 80, 100, 125, 150):
        for angle in (0, 180, -35, 215, 35, 145, -70, 250, 70, 110, -90, 90):
            across = math.cos(math.radians(angle))
            cx = x + reach * across
            cy = y + reach * math.sin(math.radians(angle))
            left = cx - wide * (0.5 - 0.5 * across)  # right of the point, it begins there
            anchor = "start" if across > 0.7 else "end" if across < -0.7 else "middle"
            yield Label(Box(left, cy - LINE / 2, left + wide, cy + LINE / 2), anchor)


def place(
    spots: Iterable[Label],
    taken: Sequence[Box],
    within: Box,
    *,
    must: bool,
    crosses: Callable[[Box], bool] = lambda _: False,
) -> Label | None:
    """The first spot that covers nothing and whose leader crosses nothing.

    If there is none: the one that is least in the way (`must`), or None.
    """
    best, least = None, math.inf
    for spot in spots:
        box = spot.box
        if box.left < within.left or box.right > within.right:
            continue
        if box.top < within.top or box.bottom > within.bottom:
            continue
        covered = sum(box.overlap(other) for other in taken)
        if covered >= least:
            continue
        if not crosses(box):
            if covered == 0:
                return spot
            best, least = spot, covered
        elif covered + LINE < least:
            best, least = spot, covered + LINE  # a crossed line is a small nuisance
    return best if must else None


def place_around(
    label: str,
    x: float,
    y: float,
    *,
    own: Sequence[Box],
    taken: Sequence[Box],
    within: Box,
    must: bool,
) -> Label | None:
    """A spot near (x, y); its leader may cross only the point's own marks."""
    others = [box for box in taken if box not in own]

    def crosses(spot: Box) -> bool:
        return any(hair.overlap(box) for hair in leader_boxes(x, y, spot) for box in others)

    return place(_around(label, x, y), taken, within, must=must, crosses=crosses)


def leader(x: float, y: float, spot: Box) -> str:
    """A hair from a label to its point, if it is not right beside it."""
    ends = _leader_ends(x, y, spot)
    if ends is None:
        return ""
    x0, y0, x1, y1 = ends
    return f'<path class="leader" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'


def _leader_ends(x: float, y: float, spot: Box) -> tuple[float, float, float, float] | None:
    near_x = min(max(x, spot.left), spot.right)
    near_y = min(max(y, spot.top + 3), spot.bottom - 3)
    far = math.hypot(near_x - x, near_y - y)
    if far < 17:
        return None
    return x + (near_x - x) * 8 / far, y + (near_y - y) * 8 / far, near_x, near_y


def leader_boxes(x: float, y: float, spot: Box) -> list[Box]:
    """What a hair covers, as small boxes along it."""
    ends = _leader_ends(x, y, spot)
    if ends is None:
        return []
    x0, y0, x1, y1 = ends
    count = int(math.hypot(x1 - x0, y1 - y0) // 4)
    along = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return [Box(px - 1, py - 1, px + 1, py + 1) for px, py in along]


def short(label: str, most: int = 20) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    name = escape(title, quote=True)
    inner = "".join(body)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">{inner}</svg>'


def svg_text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {at}>{escape(text)}</text>'
