"""Where the names go: greedy placement of labels beside points, none over another."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_NARROW = frozenset("fijltrI.,:;'|!()[]{}-/ ")
_WIDE = frozenset("mwMW@%&GOQ—")


def text_width(text: str, size: float) -> float:
    """Return the width of a text in pixels, on the generous side: which font a reader has is not known."""
    ems = 0.0
    for c in text:
        if unicodedata.combining(c):
            continue
        if unicodedata.east_asian_width(c) in "WF":
            ems += 1.05
        elif c in _WIDE:
            ems += 0.92
        elif c in _NARROW:
            ems += 0.4
        else:
            ems += 0.74 if c.isupper() else 0.64
    return ems * size


def shortened(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters; the middle goes, names differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def overlap(self, other: Box) -> float:
        """Return the common area."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across * down if across > 0 and down > 0 else 0.0

    def holds(self, other: Box) -> bool:
        """Say whether the other lies inside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the rectangle closest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


@dataclass(frozen=True)
class Wanted:
    """A label to place: its point and size in pixels."""

    x: float
    y: float
    width: float
    height: float


# Beside, above and below the point, then the corners; the share of the label's width and height by which
# its left upper corner lies off the point, and the direction of the gap.
_SIDES = (
    (0.0, -0.5, 1, 0), (-1.0, -0.5, -1, 0), (-0.5, -1.0, 0, -1), (-0.5, 0.0, 0, 1),
    (0.0, -1.0, 0.8, -0.8), (0.0, 0.0, 0.8, 0.8), (-1.0, -1.0, -0.8, -0.8), (-1.0, 0.0, -0.8, 0.8),
)  # fmt: skip
_GAPS = (11, 16, 24, 36, 52, 72, 96, 128)
LEADER = 20
"""A label whose edge is further than this from its point is tied to it by a line."""


def place(
    wanted: Sequence[Wanted], bounds: Box, solid: Sequence[Box] = (), soft: Sequence[Box] = ()
) -> list[Box | None]:
    """Return a rectangle for each label, the first ones served first; None where no free place is near.

    Args:
        wanted: in order of importance.
        bounds: labels stay inside.
        solid: what no label may cover: markers and other text.
        soft: what labels cover only where everything else is worse: error bars, lines.
    """
    placed: list[Box] = []
    found: list[Box | None] = []
    soft = list(soft)
    for label in wanted:
        best, least = None, float("inf")
        for distance, gap in enumerate(_GAPS):
            for side, (across, down, gx, gy) in enumerate(_SIDES):
                left = label.x + across * label.width + gap * gx
                top = label.y + down * label.height + gap * gy
                box = Box(left, top, label.width, label.height)
                cost = 6.0 * distance + side
                if cost >= least or not bounds.holds(box):
                    continue
                if any(box.overlap(o) for o in (*placed, *solid)):
                    continue
                if gap > LEADER and _crossed(label, box, placed):
                    continue
                cost += sum(min(8.0, 1.0 + box.overlap(o) / 12) for o in soft if box.overlap(o))
                if cost < least:
                    best, least = box, cost
        found.append(best)
        if best is not None:
            placed.append(best)
            soft += [Box(px - 2, py - 2, 4, 4) for px, py in _way(label, best)]
    return found


def _crossed(label: Wanted, box: Box, placed: Sequence[Box]) -> bool:
    """Say whether the line from the point to its label would run through another label."""
    way = _way(label, box)
    return any(o.left <= x <= o.right and o.top <= y <= o.bottom for x, y in way for o in placed)


def _way(label: Wanted, box: Box) -> list[tuple[float, float]]:
    """Return places along the line from the point to its label."""
    x, y = box.nearest(label.x, label.y)
    steps = 24
    return [
        (label.x + (x - label.x) * i / steps, label.y + (y - label.y) * i / steps) for i in range(3, steps)
    ]
