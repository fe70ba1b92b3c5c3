"""A scene as PNG, through matplotlib where it is installed."""

from __future__ import annotations

import io
import warnings

from surgeon import __version__
from surgeon.errors import EnvironmentFault
from surgeon.report import svg
from surgeon.report.scatter import Area, Line, Marker, Scene, Text
from surgeon.report.text import visible

SCALE = 2
"""Pixels per unit of the scene: sharp on today's screens."""


def draw(scene: Scene, colours: dict[str, str] | None = None) -> bytes:
    """Return the PNG of a scene.

    Raises:
        EnvironmentFault: E512 matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault("E512", "matplotlib is not installed: PNG files are drawn with it",
                               help="pip install matplotlib; or --format svg, which needs nothing") from None  # fmt: skip
    table = svg.LIGHT if colours is None else colours
    figure = Figure(
        figsize=(scene.width / 100, scene.height / 100), dpi=100 * SCALE, facecolor=table["paper"]
    )
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    for order, item in enumerate(scene.items):
        _draw(axes, item, table, order + 1)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph its font lacks is drawn as a box; the report's text has it
        figure.savefig(
            stream,
            format="png",
            metadata={"Software": f"surgeon {__version__}", "Title": visible(scene.title)},
        )
    return stream.getvalue()


def _draw(axes, item: Line | Area | Marker | Text, table: dict[str, str], order: int) -> None:
    points = 0.72
    """Points per unit: the scene has 100 units to the inch, a point is 1/72 inch."""
    if isinstance(item, Line):
        style = (0, tuple(float(v) for v in item.dash.split())) if item.dash else "-"
        axes.plot(*zip(*item.points, strict=True), color=table[item.role], linewidth=item.width * points,
                  linestyle=style, alpha=item.opacity, zorder=order, solid_capstyle="butt")  # fmt: skip
    elif isinstance(item, Area):
        axes.fill(
            *zip(*item.points, strict=True),
            color=table[item.role],
            alpha=item.opacity,
            zorder=order,
            linewidth=0,
        )
    elif isinstance(item, Marker):
        _marker(axes, item, table, order)
    else:
        _text(axes, item, table, order)


def _marker(axes, item: Marker, table: dict[str, str], order: int) -> None:
    from matplotlib.patches import Circle, Polygon

    face = table[item.role] if item.filled else table["paper"]
    edge, width = (table["paper"], 0.8) if item.filled else (table[item.role], 1.4)
    if item.ring:
        axes.add_patch(
            Circle(
                (item.x, item.y),
                item.size + 3.5,
                fill=False,
                edgecolor=table["ink"],
                linewidth=0.9,
                zorder=order,
            )
        )
    if item.shape == "circle":
        patch = Circle((item.x, item.y), item.size)
    else:
        patch = Polygon(svg.corners(item), closed=True)
    patch.set(facecolor=face, edgecolor=edge, linewidth=width, zorder=order)
    axes.add_patch(patch)


def _text(axes, item: Text, table: dict[str, str], order: int) -> None:
    from matplotlib.patheffects import withStroke

    axes.text(
        item.x, item.y, visible(item.text), fontsize=item.size * 0.72 * 0.97, color=table[item.role], zorder=order,
        ha={"start": "left", "middle": "center", "end": "right"}[item.anchor], va="baseline", parse_math=False,
        fontweight="bold" if item.bold else "normal",
        path_effects=[withStroke(linewidth=2.5, foreground=table["paper"])] if item.halo else None,
    )  # fmt: skip
