"""A view of a result as HTML for a notebook, as Markdown, and as text for a terminal.

The HTML stands alone and leaves the page around it as it is: every rule begins with the class of its own element, text
has the colour of the notebook, and lines are half transparent, so that light and dark themes need no rules of their own.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from surgeon.report.svg import FONT
from surgeon.report.text import escaped, in_markdown, visible

ROWS = 40
"""Rows of a table that are shown; the rest is counted."""


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        header: names of the columns; the first is text, others are figures unless ``texts`` says so.
        texts: columns of text.
        failed: rows that say that something failed.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    texts: frozenset[int] = frozenset({0})
    failed: frozenset[int] = frozenset()

    @property
    def shown(self) -> tuple[tuple[str, ...], ...]:
        return self.rows[:ROWS]

    @property
    def hidden(self) -> str:
        more = len(self.rows) - len(self.shown)
        return f"and {more:,} more" if more else ""


@dataclass(frozen=True)
class View:
    """What a result shows of itself.

    Attributes:
        title: what was done, in a few words.
        verdict: "passed", "dry run", ...; ``good`` says whether it is good news, None that it is neither.
        facts: name and value, one line each.
    """

    title: str
    verdict: str = ""
    good: bool | None = None
    facts: tuple[tuple[str, str], ...] = ()
    grids: tuple[Grid, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


STYLE = (
    """
.surgeon-view{font:13px/1.45 FONT;font-variant-numeric:tabular-nums;color:inherit;max-width:64em;margin:4px 0}
.surgeon-view .sv-head{font-size:15px;margin:0 0 4px;overflow-wrap:anywhere}
.surgeon-view .sv-head b{font-weight:650}
.surgeon-view .sv-verdict{margin-left:.8em;font-weight:600}
.surgeon-view .sv-good{color:#16865f}
.surgeon-view .sv-bad,.surgeon-view table.sv-table td.sv-bad{color:#d0453b;font-weight:600}
.surgeon-view table.sv-table{border-collapse:collapse;border:0;margin:8px 0 0;width:auto;min-width:24em;max-width:none;font-size:13px;table-layout:auto}
.surgeon-view table.sv-table caption{text-align:left;caption-side:top;padding:0 0 2px;font-weight:600;color:inherit}
.surgeon-view table.sv-table tr,.surgeon-view table.sv-table tr:nth-child(odd),.surgeon-view table.sv-table tr:hover{background:none!important}
.surgeon-view table.sv-table th,.surgeon-view table.sv-table td{background:none;border:0;border-bottom:1px solid rgba(128,128,128,.35);color:inherit;padding:3px 18px 3px 0;text-align:right;vertical-align:top;white-space:nowrap;max-width:none;line-height:1.45}
.surgeon-view table.sv-table thead th{font-weight:500;opacity:.72;border-bottom-color:rgba(128,128,128,.7)}
.surgeon-view table.sv-table tbody th{font-weight:400}
.surgeon-view table.sv-table .sv-text{text-align:left;white-space:normal;overflow-wrap:break-word;min-width:6em}
.surgeon-view dl.sv-facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:1px 16px;margin:4px 0 0;padding:0}
.surgeon-view dl.sv-facts dt{margin:0;padding:0;font-weight:400;opacity:.72}
.surgeon-view dl.sv-facts dd{margin:0;padding:0;overflow-wrap:anywhere}
.surgeon-view p.sv-note{margin:6px 0 0;padding:0;overflow-wrap:anywhere;opacity:.85}
.surgeon-view p.sv-warning{margin:6px 0 0;padding:2px 0 2px 10px;border-left:3px solid #c98a1b;overflow-wrap:anywhere}
.surgeon-view .sv-scroll{overflow-x:auto}
""".replace("FONT", FONT.replace('"', "'"))
    .replace("\n", "")
    .strip()
)


def as_html(view: View) -> str:
    """Return the view as one element with its rules."""
    verdict = ""
    if view.verdict:
        kind = {True: " sv-good", False: " sv-bad", None: ""}[view.good]
        verdict = f'<span class="sv-verdict{kind}">{escaped(view.verdict)}</span>'
    parts = [f'<div class="sv-head"><b>{escaped(view.title)}</b>{verdict}</div>']
    if view.facts:
        entries = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in view.facts)
        parts.append(f'<dl class="sv-facts">{entries}</dl>')
    parts += [_grid(grid) for grid in view.grids]
    parts += [f'<p class="sv-warning">{escaped(text)}</p>' for text in view.warnings]
    parts += [f'<p class="sv-note">{escaped(text)}</p>' for text in view.notes]
    return f'<div class="surgeon-view"><style>{STYLE}</style>{"".join(parts)}</div>'


def _grid(grid: Grid) -> str:
    def kind(column: int, bad: bool = False) -> str:
        names = ["sv-text"] * (column in grid.texts) + ["sv-bad"] * bad
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f'<th scope="col"{kind(c)}>{escaped(text)}</th>' for c, text in enumerate(grid.header))
    rows = [
        "".join(
            f"<td{kind(c, c == 0 and number in grid.failed)}>{escaped(text)}</td>"
            for c, text in enumerate(row)
        )
        for number, row in enumerate(grid.shown)
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    title = f"<caption>{escaped(grid.title)}</caption>" if grid.title else ""
    more = f'<p class="sv-note">{escaped(grid.hidden)}</p>' if grid.hidden else ""
    return (f'<div class="sv-scroll"><table class="sv-table">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f"{more}")  # fmt: skip


def as_markdown(view: View) -> str:
    """Return the view as Markdown."""
    verdict = f": {in_markdown(view.verdict)}" if view.verdict else ""
    parts = [f"**{in_markdown(view.title)}**{verdict}"]
    if view.facts:
        parts.append("\n".join(f"- {in_markdown(name)}: {in_markdown(value)}" for name, value in view.facts))
    for grid in view.grids:
        if grid.title:
            parts.append(in_markdown(grid.title))
        rule = [":--" if column in grid.texts else "--:" for column in range(len(grid.header))]
        rows = [[in_markdown(text) for text in row] for row in (grid.header, *grid.shown)]
        rows.insert(1, rule)
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        if grid.hidden:
            parts.append(grid.hidden)
    parts += [f"> {in_markdown(text)}" for text in (*view.warnings, *view.notes)]
    return "\n\n".join(parts) + "\n"


def as_text(view: View) -> str:
    """Return the view as lines for a terminal."""
    lines = [visible(view.title) + (f"   {visible(view.verdict)}" if view.verdict else "")]
    width = max((len(name) for name, _ in view.facts), default=0)
    lines += [f"  {visible(name):<{width}}  {visible(value)}" for name, value in view.facts]
    for grid in view.grids:
        lines += ["", *([f"  {visible(grid.title)}"] if grid.title else []), *_aligned(grid)]
        lines += [f"  {grid.hidden}"] if grid.hidden else []
    lines += [f"  warning: {visible(text)}" for text in view.warnings]
    lines += [f"  note: {visible(text)}" for text in view.notes]
    return "\n".join(lines)


def _aligned(grid: Grid) -> Iterable[str]:
    rows: Sequence[Sequence[str]] = [[visible(text) for text in row] for row in (grid.header, *grid.shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(grid.header))]
    for row in rows:
        cells = [t.ljust(w) if c in grid.texts else t.rjust(w)
                 for c, (t, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        yield f"  {'  '.join(cells)}".rstrip()


def framed(page: str, height: int = 640) -> str:
    """Return a whole page for a notebook: in a frame, so that neither its styles nor its links touch the notebook."""
    return (f'<iframe sandbox="" srcdoc="{html.escape(page, quote=True)}" title="report of surgeon" '
            f'style="width:100%;height:{height}px;border:1px solid rgba(128,128,128,.35)"></iframe>')  # fmt: skip
