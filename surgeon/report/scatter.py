"""Pareto plots as lists of drawn things, independent of the file they are drawn into.

`svg.py` and `png.py` draw the same scene, so that both show the same places, ticks and labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.report import labels
from surgeon.report.axis import Axis, accuracy_axis, round_step, tokens_axis
from surgeon.report.labels import Box, Wanted, text_width
from surgeon.report.pareto import Point, front, staircase

SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "cross")
"""Markers; as many as there are colours, s0 to s5."""


CROWDED = 24
"""From so many models on, labels are short names without figures: the front has to be named."""


def look(series: int) -> tuple[str, str]:
    """Return colour and shape of a series: both differ among the first six, their pair among 36."""
    count = len(SHAPES)
    return f"s{series % count}", SHAPES[(series + series // count) % count]


@dataclass(frozen=True)
class Plane:
    """What a plot compares: a quality upwards, more is better, and a cost or a gain to the right.

    Attributes:
        up: name of the quality, a fraction.
        right: name of what lies to the right.
        more: whether more of it is better.
        order: how the front is ordered, in words.
        unit: written behind the ticks to the right.
    """

    up: str
    right: str
    more: bool
    order: str
    unit: str = ""


TOKENS = Plane("Accuracy", "Mean tokens per answer", False, "shortest answers first")


@dataclass(frozen=True)
class Dot:
    """One model of the plot; ``point.tokens`` is its place to the right, whatever the plane compares."""

    name: str
    point: Point
    series: int = 0
    baseline: bool = False
    figures: str = ""
    """The second line of the label on the front."""
    detail: str = ""
    """What a pointer resting on the marker shows."""


@dataclass(frozen=True)
class Line:
    points: tuple[tuple[float, float], ...]
    role: str
    width: float = 1.0
    dash: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Area:
    points: tuple[tuple[float, float], ...]
    role: str
    opacity: float
    detail: str = ""
    """What a pointer resting on it shows."""


@dataclass(frozen=True)
class Marker:
    x: float
    y: float
    size: float
    shape: str
    role: str
    ring: bool = False
    filled: bool = True
    detail: str = ""


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    size: float
    role: str = "ink"
    anchor: str = "start"
    bold: bool = False
    halo: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything drawn, in order; pixels, y downwards."""

    width: float
    height: float
    items: tuple[Line | Area | Marker | Text, ...]
    title: str
    description: str
    boxes: tuple[Box | None, ...] = ()
    """Where the label of each dot went, in the order of the dots; None where there was no room."""


@dataclass(frozen=True)
class Style:
    """The sizes that differ between the wide and the narrow plot."""

    width: float
    height: float
    font: float
    ticks_x: int
    ticks_y: int
    name_length: int
    figures: bool
    left: float
    named: int


WIDE = Style(1000, 520, 13, 9, 7, 34, True, 52, 40)
NARROW = Style(400, 420, 12.5, 5, 6, 22, False, 44, 16)


def layout(
    dots: Sequence[Dot],
    series: Sequence[str],
    *,
    style: Style = WIDE,
    log_tokens: bool = False,
    iso_lines: bool = False,
    title: str = "Accuracy against mean tokens per answer",
    plane: Plane = TOKENS,
) -> Scene:
    """Lay out the plot: accuracy upwards, mean tokens per answer to the right, intervals as bars.

    Args:
        dots: at least one.
        series: names by `Dot.series`, for the legend.
        iso_lines: lines of equal accuracy per 1,000 tokens.
        plane: what is compared, where it is not accuracy and tokens.
    """
    legend, legend_bottom = _legend(dots, series, style)
    right, bottom = style.width - 16, style.height - 44
    top = legend_bottom + 42
    x = tokens_axis([v for d in dots for v in _span(d.point.tokens, d.point.tokens_low, d.point.tokens_high)],
                    style.left, right, log_tokens)  # fmt: skip
    y = accuracy_axis([v for d in dots for v in _span(d.point.accuracy, d.point.accuracy_low, d.point.accuracy_high)],
                      bottom, top)  # fmt: skip
    best = best_of(dots, plane)
    items: list[Line | Area | Marker | Text] = [*legend]
    items += _grid(x, y, style, plane)
    solid: list[Box] = []
    if iso_lines:
        drawn, occupied = _iso_lines(x, y, style)
        items += drawn
        solid += occupied
    stairs, soft = _front_line([dots[i].point for i in best], x, y, plane)
    items += stairs
    for dot in dots:
        bars, boxes = _bars(dot, x, y)
        items += bars
        soft += boxes
    named, boxes = _labels(
        dots, best, x, y, Box(x.start, top - 8, right - x.start + 10, bottom - top), solid, soft, style
    )
    for dot in sorted(range(len(dots)), key=lambda i: (i in best, -i)):
        items.append(_marker(dots[dot], dot in best, x, y))
    items += named
    return Scene(style.width, style.height, tuple(items), title, describe(dots, plane), boxes)


def best_of(dots: Sequence[Dot], plane: Plane = TOKENS) -> list[int]:
    """Return the indices of the dots on the Pareto front, the best to the right first."""
    return front([_mirrored(d.point) if plane.more else d.point for d in dots])


def _mirrored(point: Point) -> Point:
    return replace(point, tokens=-point.tokens)


def describe(dots: Sequence[Dot], plane: Plane = TOKENS) -> str:
    """Return the plot in words."""
    best = best_of(dots, plane)
    told = "; ".join(f"{dots[i].name} {dots[i].figures}" for i in best[:40])
    return f"{len(dots)} model{'s' if len(dots) != 1 else ''}. On the Pareto front, {plane.order}: {told}."


def _span(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    return (value if low is None else low, value if high is None else high)


def _legend(dots: Sequence[Dot], series: Sequence[str], style: Style) -> tuple[list, float]:
    """Draw one entry per series in use, then the meaning of ring and line; wrapped to the width."""
    size = style.font - 0.5
    entries = [(str(i), labels.shortened(series[i], 28)) for i in sorted({d.series for d in dots})]
    if any(d.baseline for d in dots):
        entries.append(("ring", "baseline"))
    entries.append(("front", "Pareto front"))
    x, y = 4.0, 4 + style.font
    items: list = []
    for kind, text in entries:
        width = 22 + text_width(text, size)
        if x > 4 and x + width > style.width - 4:
            x, y = 4.0, y + style.font + 9
        middle = y - size * 0.36
        if kind == "front":
            items.append(Line(((x, middle), (x + 16, middle)), "front", 2))
        elif kind == "ring":
            items.append(Marker(x + 8, middle, 4, "circle", "muted", ring=True))
        else:
            role, shape = look(int(kind))
            items.append(Marker(x + 8, middle, 5.5, shape, role))
        items.append(Text(x + 22, y, text, size, "muted"))
        x += width + 18
    return items, y


def _grid(x: Axis, y: Axis, style: Style, plane: Plane) -> list:
    size = style.font - 1
    ticks_x, ticks_y = x.ticks(style.ticks_x), y.ticks(style.ticks_y)
    items: list = []
    step = round_step(y.high - y.low, style.ticks_y)
    decimals = (
        0
        if step >= 0.00999 and all(abs(t * 100 - round(t * 100)) < 1e-6 for t in ticks_y)
        else 1
        if step >= 0.00099
        else 2
    )
    for tick in ticks_y:
        place = y.place(tick)
        items.append(Line(((x.start, place), (x.end, place)), "grid"))
        items.append(Text(x.start - 8, place + size * 0.36, f"{tick:.{decimals}%}", size, "muted", "end"))
    items.append(Line(((x.start, y.start), (x.end, y.start)), "axis"))
    for tick in ticks_x:
        place = x.place(tick)
        items.append(Line(((place, y.start), (place, y.start + 5)), "axis"))
        items.append(Text(place, y.start + 6 + size, f"{tick:,.10g}{plane.unit}", size, "muted", "middle"))
    items.append(Text(4, y.end - 14, f"{plane.up}, higher is better", size, "ink"))
    scale = " (logarithmic)" if x.log else ""
    items.append(
        Text(
            x.end,
            y.start + 12 + 2 * style.font,
            f"{plane.right}{scale}, {'more' if plane.more else 'fewer' if plane is TOKENS else 'less'} is better",
            size,
            "ink",
            "end",
        )
    )
    return items


def _iso_lines(x: Axis, y: Axis, style: Style) -> tuple[list, list[Box]]:
    """Draw lines of equal accuracy per 1,000 tokens through the shown part of the plane."""
    values = [k * 10.0**p for p in range(-6, 6) for k in (1, 2, 5)]
    size = style.font - 2
    items: list = []
    boxes: list[Box] = []
    for value in values:
        # accuracy = value * tokens / 1000, cut to the shown accuracies; a point at length 0 has no such value
        begin = max(y.low / value * 1000, x.low, 1e-9)
        end = min(y.high / value * 1000, x.high)
        if end <= begin or x.place(end) - x.place(begin) < 24:
            continue
        lengths = [begin + (end - begin) * i / 32 for i in range(33)]
        items.append(Line(tuple((x.place(t), y.place(t * value / 1000)) for t in lengths), "iso", 1, "2 4"))
        text = f"{value:,.10g}"
        left, top = x.place(end), y.place(end * value / 1000)
        width = text_width(text, size)
        at_top = end < x.high * (1 - 1e-9)
        place = (left, top - 4, "middle") if at_top else (left - 2, top - 5, "end")
        items.append(Text(place[0], place[1], text, size, "muted", place[2]))
        boxes.append(Box(place[0] - (width / 2 if at_top else width), place[1] - size, width, size + 3))
    if items:
        items.append(Text(x.end, y.end - 18, "dotted: accuracy per 1,000 tokens", size, "muted", "end"))
    return items, boxes


def _front_line(points: list[Point], x: Axis, y: Axis, plane: Plane) -> tuple[list, list[Box]]:
    if plane.more:
        stairs = [(-t, a) for t, a in staircase([_mirrored(p) for p in points], -x.low, y.low)]
    else:
        stairs = staircase(points, x.high, y.low)
    corners = [(x.place(t), y.place(a)) for t, a in stairs]
    base = [(corners[-1][0], y.start), (corners[0][0], y.start)]
    soft = []
    for (ax, ay), (bx, by) in itertools.pairwise(corners):
        soft.append(Box(min(ax, bx) - 1, min(ay, by) - 1, abs(bx - ax) + 2, abs(by - ay) + 2))
    return [Area((*corners, *base), "front", 0.07), Line(tuple(corners[1:]), "front", 2)], soft


def _bars(dot: Dot, x: Axis, y: Axis) -> tuple[list, list[Box]]:
    p, role = dot.point, look(dot.series)[0]
    cx, cy = x.place(p.tokens), y.place(p.accuracy)
    items: list = []
    boxes: list[Box] = []
    if p.accuracy_low is not None and p.accuracy_high is not None:
        low, high = y.place(p.accuracy_low), y.place(p.accuracy_high)
        items.append(Line(((cx, low), (cx, high)), role, 1.25, opacity=0.55))
        items += [Line(((cx - 3, v), (cx + 3, v)), role, 1.25, opacity=0.55) for v in (low, high)]
        boxes.append(Box(cx - 2, high, 4, low - high))
    if p.tokens_low is not None and p.tokens_high is not None:
        low, high = x.place(p.tokens_low), x.place(p.tokens_high)
        items.append(Line(((low, cy), (high, cy)), role, 1.25, opacity=0.55))
        items += [Line(((v, cy - 3), (v, cy + 3)), role, 1.25, opacity=0.55) for v in (low, high)]
        boxes.append(Box(low, cy - 2, high - low, 4))
    return items, boxes


def _marker(dot: Dot, on_front: bool, x: Axis, y: Axis) -> Marker:
    role, shape = look(dot.series)
    px = x.place(dot.point.tokens)
    return Marker(px, y.place(dot.point.accuracy), 6.5 if on_front else 5.5, shape, role,
                  ring=dot.baseline, filled=on_front, detail=dot.detail or f"{dot.name}: {dot.figures}")  # fmt: skip


def _labels(
    dots: Sequence[Dot],
    best: list[int],
    x: Axis,
    y: Axis,
    bounds: Box,
    solid: list[Box],
    soft: list[Box],
    style: Style,
) -> tuple[list, tuple[Box | None, ...]]:
    """Name the front first, then baselines, then the rest as far as there is room."""
    order = sorted(range(len(dots)), key=lambda i: (i not in best, not dots[i].baseline, i))[: style.named]
    places = [(x.place(d.point.tokens), y.place(d.point.accuracy)) for d in dots]
    markers = [Box(px - 8, py - 8, 16, 16) for px, py in places]
    crowded = len(dots) > CROWDED
    wanted, texts = [], []
    for i in order:
        name = labels.shortened(dots[i].name, min(18, style.name_length) if crowded else style.name_length)
        second = dots[i].figures if style.figures and i in best and not crowded else ""
        size = style.font if i in best else style.font - 1
        width = max(text_width(name, size) * (1.06 if i in best else 1), text_width(second, style.font - 1.5))
        wanted.append(Wanted(*places[i], width + 2, size * 1.25 + (style.font * 1.15 if second else 0)))
        texts.append((name, second, size))
    found = labels.place(wanted, bounds, [*markers, *solid], soft)
    items: list = []
    boxes: list[Box | None] = [None] * len(dots)
    for i, want, box, (name, second, size) in zip(order, wanted, found, texts, strict=True):
        if box is None:
            continue
        boxes[i] = box
        end = box.nearest(want.x, want.y)
        if (end[0] - want.x) ** 2 + (end[1] - want.y) ** 2 > labels.LEADER**2:
            items.append(Line(((want.x, want.y), end), "muted", 0.75, opacity=0.7))
        # Text hugs the side that faces its point.
        anchor, at = ("end", box.right) if box.right <= want.x else ("start", box.left)
        if box.left < want.x < box.right:
            anchor, at = "middle", box.left + box.width / 2
        items.append(
            Text(
                at, box.top + size, name, size, "ink" if i in best else "muted", anchor, i in best, halo=True
            )
        )
        if second:
            items.append(
                Text(
                    at,
                    box.top + size + style.font * 1.15,
                    second,
                    style.font - 1.5,
                    "muted",
                    anchor,
                    halo=True,
                )
            )
    return items, tuple(boxes)
