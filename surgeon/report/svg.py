"""A scene as SVG: no scripts, no fonts or images from elsewhere, the same bytes for the same scene."""

from __future__ import annotations

from surgeon import __version__
from surgeon.report.scatter import Area, Line, Marker, Scene, Text
from surgeon.report.text import escaped

# Hues after Okabe and Ito, told apart with the usual kinds of colour blindness; darkened on white and
# lightened on black until each has a contrast of at least 3 to 1 against the background.
LIGHT = {
    "paper": "#ffffff", "ink": "#1b1f24", "muted": "#5b6470", "grid": "#e6e8eb", "axis": "#8a929c", "front": "#0b6e4f",
    "iso": "#a4abb3", "s0": "#3f4956", "s1": "#0b62a8", "s2": "#c2500a", "s3": "#9c3f88", "s4": "#8a6a00", "s5": "#0f7b6c",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "ink": "#eceef1", "muted": "#a3abb5", "grid": "#2a2f36", "axis": "#6d7681", "front": "#4cc79b",
    "iso": "#59616b", "s0": "#b9c1cb", "s1": "#62b0f0", "s2": "#f59a5c", "s3": "#e093cb", "s4": "#e0bd4a", "s5": "#54cdbb",
}  # fmt: skip

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"


def style_sheet() -> str:
    """Return the rules of the plot; the colours are custom properties, so that a page may set its own."""

    def colours(table: dict[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in table.items())

    rules = [
        f".plot{{{colours(LIGHT)}}}",
        f"@media screen and (prefers-color-scheme:dark){{.plot{{{colours(DARK)}}}}}",
    ]
    for name in LIGHT:
        rules.append(f".plot .f-{name}{{fill:var(--{name})}}.plot .l-{name}{{stroke:var(--{name})}}")
    rules.append(f".plot text{{font-family:{FONT};font-variant-numeric:tabular-nums}}")
    rules.append(
        ".plot .halo{stroke:var(--paper);stroke-width:3.5px;stroke-linejoin:round;paint-order:stroke}"
    )
    return "".join(rules)


def draw(scene: Scene, *, prefix: str = "plot", background: bool = True, style: bool = True) -> str:
    """Return the SVG element of a scene.

    Args:
        prefix: begins the ids of title and description; distinct within a page.
        background: paint the paper: a file of its own is shown on any colour.
        style: bring the style sheet along; a page with several plots holds it once.
    """
    width, height = _number(scene.width), _number(scene.height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="{prefix}-title {prefix}-description">',
        f'<title id="{prefix}-title">{escaped(scene.title)}</title>',
        f'<desc id="{prefix}-description">{escaped(scene.description)}</desc>',
    ]
    if style:
        parts.append(f"<style>{style_sheet()}</style>")
    if background:
        parts.append(f"<metadata>surgeon {__version__}</metadata>")
        parts.append(f'<rect width="{width}" height="{height}" {_fill("paper")}/>')
    parts += [_item(item) for item in scene.items]
    return "\n".join([*parts, "</svg>", ""])


def _item(item: Line | Area | Marker | Text) -> str:
    if isinstance(item, Line):
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in item.points)
        dash = f' stroke-dasharray="{item.dash}"' if item.dash else ""
        return (f'<polyline points="{points}" fill="none" {_stroke(item.role)} stroke-width="{_number(item.width)}"'
                f'{dash}{_opacity(item.opacity)}/>')  # fmt: skip
    if isinstance(item, Area):
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in item.points)
        shape = f'<polygon points="{points}" {_fill(item.role)}{_opacity(item.opacity)}'
        return f"{shape}><title>{escaped(item.detail)}</title></polygon>" if item.detail else f"{shape}/>"
    if isinstance(item, Marker):
        return marker(item)
    weight = ' font-weight="600"' if item.bold else ""
    anchor = f' text-anchor="{item.anchor}"' if item.anchor != "start" else ""
    halo = " halo" if item.halo else ""
    return (f'<text x="{_number(item.x)}" y="{_number(item.y)}" font-size="{_number(item.size)}"{weight}{anchor} '
            f'fill="{LIGHT[item.role]}" class="f-{item.role}{halo}">{escaped(item.text)}</text>')  # fmt: skip


def marker(item: Marker) -> str:
    """Return a marker: its shape, the ring of a baseline, what a pointer resting on it shows."""
    paint = _fill(item.role) if item.filled else _fill("paper")
    # An outline of the paper's colour keeps markers that touch apart; an open marker needs its own.
    if item.filled:
        edge = f'stroke="{LIGHT["paper"]}" stroke-width="1"'
        paint = paint.replace('class="', 'class="l-paper ')
    else:
        edge = f'stroke="{LIGHT[item.role]}" stroke-width="1.75"'
        paint = paint.replace('class="', f'class="l-{item.role} ')
    shape = f"{outline(item)} {paint} {edge}/>"
    ring = ""
    if item.ring:
        ring = (f'<circle cx="{_number(item.x)}" cy="{_number(item.y)}" r="{_number(item.size + 3.5)}" fill="none" '
                f'{_stroke("ink")} stroke-width="1.25"/>')  # fmt: skip
    detail = f"<title>{escaped(item.detail)}</title>" if item.detail else ""
    return f"<g>{detail}{ring}{shape}</g>"


def corners(item: Marker) -> list[tuple[float, float]]:
    """Return the corners of a marker's shape; shapes have about the same area. A circle has none."""
    x, y, s = item.x, item.y, item.size
    unit = {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "wedge": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "cross": [(-0.4, -1.15), (0.4, -1.15), (0.4, -0.4), (1.15, -0.4), (1.15, 0.4), (0.4, 0.4),
                  (0.4, 1.15), (-0.4, 1.15), (-0.4, 0.4), (-1.15, 0.4), (-1.15, -0.4), (-0.4, -0.4)],
        "circle": [],
    }[item.shape]  # fmt: skip
    return [(x + s * dx, y + s * dy) for dx, dy in unit]


def outline(item: Marker) -> str:
    """Return the opening of the element that draws a marker's shape."""
    if item.shape == "circle":
        return f'<circle cx="{_number(item.x)}" cy="{_number(item.y)}" r="{_number(item.size)}"'
    points = " ".join(f"{_number(px)},{_number(py)}" for px, py in corners(item))
    return f'<polygon points="{points}"'


def _fill(role: str) -> str:
    return f'fill="{LIGHT[role]}" class="f-{role}"'


def _stroke(role: str) -> str:
    return f'stroke="{LIGHT[role]}" class="l-{role}"'


def _opacity(value: float) -> str:
    return f' opacity="{_number(value)}"' if value != 1 else ""


def _number(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text
