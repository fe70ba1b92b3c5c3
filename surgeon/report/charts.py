"""Bars by layer and heat maps as scenes, and scenes put one below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.report.axis import Axis, linear_ticks
from surgeon.report.figures import minus
from surgeon.report.labels import shortened, text_width
from surgeon.report.scatter import Area, Line, Marker, Scene, Style, Text

WIDE = Style(1000, 176, 13, 24, 4, 30, True, 52, 0)
NARROW = Style(400, 168, 12.5, 8, 4, 18, False, 44, 0)
WIDEST = 64.0
"""Pixels of a layer at most."""
FULL = 0.62
"""Opacity of the most sensitive cell; ink on top of it stays readable, on paper and on black."""


@dataclass(frozen=True)
class Bar:
    """One layer of a chart; None has no bar: the layer is gone."""

    layer: int
    value: float | None
    detail: str


@dataclass(frozen=True)
class Bars:
    """A figure by layer.

    Attributes:
        key: what it is, the same in every document: bits, channels, heads, experts, width, error, output_error, drift.
        whole: the figure of the model before, None where it is not known.
    """

    key: str
    title: str
    bars: tuple[Bar, ...]
    whole: float | None = None

    def written(self, value: float | None) -> str:
        """Return a figure as tables have it."""
        return "removed" if value is None else minus(f"{value:,.4g}")


@dataclass(frozen=True)
class Cell:
    """One place of a heat map: how much is lost there, what was chosen."""

    layer: int
    kind: str
    loss: float
    chosen: str
    detail: str


@dataclass(frozen=True)
class Heat:
    """Losses by layer and kind of matrix."""

    title: str
    cells: tuple[Cell, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.kind for cell in self.cells))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({cell.layer for cell in self.cells}))


def bars(chart: Bars, style: Style = WIDE) -> Scene:
    """Lay out one bar a layer, the first layer on the left."""
    known = [bar.value for bar in chart.bars if bar.value is not None]
    high = max([*known, chart.whole or 0.0]) or 1.0
    left, right, top, bottom = style.left, style.width - 8, 34.0, style.height - 40
    y = Axis(0.0, high * 1.04, bottom, top)
    slot = min(WIDEST, (right - left) / len(chart.bars))
    # Few layers make a narrow chart, not fat bars; the words on its right still need room.
    right = max(left + slot * len(chart.bars), left + 160)
    size = style.font - 1
    items: list[Line | Area | Marker | Text] = [Text(4, style.font, chart.title, size, "ink", bold=True)]
    for tick in linear_ticks(0.0, y.high, style.ticks_y):
        place = y.place(tick)
        items.append(Line(((left, place), (right, place)), "grid"))
        items.append(Text(left - 8, place + size * 0.36, _short(tick), size, "muted", "end"))
    gap = min(6.0, slot * 0.2)
    for number, bar in enumerate(chart.bars):
        start, end = left + number * slot + gap / 2, left + (number + 1) * slot - gap / 2
        if bar.value is None:
            items.append(_cross(start, end, bottom, bar.detail))
            continue
        # A bar of nothing still shows that it was measured.
        edge = min(y.place(bar.value), bottom - 0.75)
        items.append(
            Area(((start, bottom), (start, edge), (end, edge), (end, bottom)), "s1", 1.0, bar.detail)
        )
    items.append(Line(((left, bottom), (right, bottom)), "axis"))
    if chart.whole is not None:
        place = y.place(chart.whole)
        items.append(Line(((left, place), (right, place)), "ink", 1.0, "4 3"))
        items.append(Text(right, place - 4, f"before {_short(chart.whole)}", size, "muted", "end", halo=True))
    items += _numbers([bar.layer for bar in chart.bars], left, slot, bottom + size + 4, style)
    items.append(Text(right, style.height - 6, "Layer", size, "muted", "end"))
    return Scene(style.width, style.height, tuple(items), f"{chart.title} by layer", _told(chart))


def _cross(start: float, end: float, bottom: float, detail: str) -> Area:
    """Return the mark of a removed layer: a low bar, seen and not taken for a value."""
    return Area(((start, bottom), (start, bottom - 4), (end, bottom - 4), (end, bottom)), "s2", 1.0, detail)


def _numbers(layers: Sequence[int], left: float, slot: float, y: float, style: Style) -> list[Text]:
    """Number layers below their columns, as many as there is room for."""
    size = style.font - 1.5
    needed = max(text_width(str(layer), size) for layer in layers) + 8
    step = max(1, math.ceil(needed / slot))
    return [
        Text(left + (i + 0.5) * slot, y, str(layer), size, "muted", "middle")
        for i, layer in enumerate(layers)
        if i % step == 0
    ]


def _told(chart: Bars) -> str:
    known = [bar for bar in chart.bars if bar.value is not None]
    gone = len(chart.bars) - len(known)
    said = [f"{len(chart.bars)} layers"]
    if gone:
        said.append(f"{gone} removed")
    if known:
        least, most = min(known, key=_value), max(known, key=_value)
        said.append(
            f"least {_short(_value(least))} in layer {least.layer}, most {_short(_value(most))} in layer {most.layer}"
        )
    return "; ".join(said) + "."


def _value(bar: Bar) -> float:
    assert bar.value is not None
    return bar.value


def heat(chart: Heat, style: Style = WIDE) -> Scene:
    """Lay out a heat map: layers to the right, kinds downwards, the darker the more is lost (logarithmic)."""
    kinds, layers = chart.kinds, chart.layers
    size = style.font - 1
    names = [shortened(kind, style.name_length) for kind in kinds]
    left = max(text_width(name, size) for name in names) + 10
    right, top, row = style.width - 8, 34.0, 24.0
    slot = min(WIDEST, (right - left) / len(layers))
    bottom = top + row * len(kinds)
    items: list[Line | Area | Marker | Text] = [Text(4, style.font, chart.title, size, "ink", bold=True)]
    for number, name in enumerate(names):
        items.append(Text(left - 8, top + (number + 0.5) * row + size * 0.36, name, size, "muted", "end"))
    positive = [cell.loss for cell in chart.cells if cell.loss > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    places = {layer: i for i, layer in enumerate(layers)}
    for cell in chart.cells:
        x, y = left + places[cell.layer] * slot, top + kinds.index(cell.kind) * row
        share = 0.0 if cell.loss <= 0 else _share(cell.loss, low, high)
        corners = ((x + 1, y + 1), (x + slot - 1, y + 1), (x + slot - 1, y + row - 1), (x + 1, y + row - 1))
        items.append(Area(corners, "s1", round(0.06 + (FULL - 0.06) * share, 3), cell.detail))
        if cell.chosen and text_width(cell.chosen, size) + 4 <= slot:
            items.append(Text(x + slot / 2, y + row / 2 + size * 0.36, cell.chosen, size, "ink", "middle"))
    items += _numbers(layers, left, slot, bottom + size + 4, style)
    height = bottom + 2 * style.font + 16
    items.append(Text(left, height - 4, "Layer", size, "muted"))
    worst = max(chart.cells, key=lambda cell: cell.loss)
    told = f"{len(chart.cells)} cells; most is lost in layer {worst.layer}, {worst.kind}."
    return Scene(style.width, height, tuple(items), chart.title, told)


def _share(value: float, low: float, high: float) -> float:
    return 1.0 if high <= low else math.log(value / low) / math.log(high / low)


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):,.4g}{unit}"
    return minus(f"{value:,.4g}")


def stacked(scenes: Sequence[Scene], title: str) -> Scene:
    """Return scenes one below the other, as one."""
    items: list[Line | Area | Marker | Text] = []
    top = 0.0
    for scene in scenes:
        items += [_lowered(item, top) for item in scene.items]
        top += scene.height + 24
    width = max(scene.width for scene in scenes)
    return Scene(
        width, top - 24, tuple(items), title, " ".join(f"{s.title}: {s.description}" for s in scenes)
    )


def _lowered(item: Line | Area | Marker | Text, by: float) -> Line | Area | Marker | Text:
    if isinstance(item, Line | Area):
        return replace(item, points=tuple((x, y + by) for x, y in item.points))
    return replace(item, y=item.y + by)


def heading(text: str) -> Scene:
    """Return a title as a scene: what the charts below it belong to."""
    return Scene(WIDE.width, 18, (Text(4, 16, text, 16, "ink", bold=True),), text, "")
