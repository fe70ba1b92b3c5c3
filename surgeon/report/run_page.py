"""The page about runs and single commands, and the same as Markdown: header, sections, results of eval.

render(document)      one document of ``surgeon run --json``, or of merge, prune, edit, quantize, export, measure, diff
markdown(document)    the same as tables
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgeon.report import charts, html, plot, runs, svg
from surgeon.report import markdown as markdown_
from surgeon.report import sections as sections_
from surgeon.report.layers import mapping
from surgeon.report.runs import Run
from surgeon.report.scatter import Scene
from surgeon.report.sections import Chart, Listing, Section, Table
from surgeon.report.summary import Summary, summarise
from surgeon.report.text import escaped, in_markdown

GOOD = {"ok": "done", "dry-run": "rehearsed: nothing was written"}
BAD = {"failed": "failed", "gate-failed": "a gate failed"}


def render(document: Mapping[str, Any], *, title: str | None = None) -> str:
    """Return the page about one document, complete: no scripts, nothing fetched, every name escaped.

    Folders named in the document are read for what each layer became (``plan.json``, ``pruning.json``,
    ``surgeon.json``); one that is not there any more is said to be gone.
    """
    return render_all([document], title=title)


def markdown(document: Mapping[str, Any], *, title: str | None = None) -> str:
    """Return what `render` says as Markdown tables."""
    return markdown_all([document], title=title)


def render_all(
    documents: Sequence[Mapping[str, Any]], *, title: str | None = None, log_tokens: bool = False, iso_lines: bool = False
) -> str:  # fmt: skip
    """Return one page about several documents, results of eval among them."""
    told, summary, plain = _told(documents)
    name = title or _title(told)
    parts = [_head(told, name)]
    parts += [_section(section, number) for number, section in enumerate(sections_.sections(told, plain))]
    if summary is not None:
        parts += html.evaluation(summary, log_tokens=log_tokens, iso_lines=iso_lines)
    return html.page(name, parts)


def markdown_all(documents: Sequence[Mapping[str, Any]], *, title: str | None = None) -> str:
    """Return several documents, results of eval among them, as Markdown tables."""
    told, summary, plain = _told(documents)
    parts = [f"## {in_markdown(title or _title(told))}"]
    for run in told:
        word, failed = _status(run)
        facts = " · ".join(in_markdown(fact) for fact in _facts(run))
        parts.append(f"**{'FAILED: ' if failed else ''}{in_markdown(word)}** {facts}".strip())
        if run.error.get("message"):
            parts.append(f"> **{in_markdown(run.error.get('code'))}** {in_markdown(run.error['message'])}")
    for section in sections_.sections(told, plain):
        parts.append(f"### {in_markdown(section.title)}")
        parts += [part for block in section.blocks if (part := _block_markdown(block))]
        if section.note:
            parts.append(in_markdown(section.note))
    if summary is not None:
        parts += markdown_.evaluation(summary)
    return "\n\n".join([*parts, markdown_.FOOTER]) + "\n"


def drawing(
    documents: Sequence[Mapping[str, Any]], *, log_tokens: bool = False, iso_lines: bool = False
) -> Scene | None:
    """Return every chart of the page, one below the other; None when there is nothing to draw."""
    told, summary, plain = _told(documents)
    tokens = plot.scene(summary, log_tokens=log_tokens, iso_lines=iso_lines) if summary is not None else None
    found = [tokens] if tokens is not None else []
    for section in sections_.sections(told, plain):
        drawn = [block.draw(True) for block in section.blocks if isinstance(block, Chart)]
        found += [charts.heading(section.title), *drawn] if drawn else []
    return charts.stacked(found, _title(told)) if found else None


def _told(
    documents: Sequence[Mapping[str, Any]],
) -> tuple[list[Run], Summary | None, list[Mapping[str, Any]]]:
    """Return what there is to tell: runs, the summary of all evaluations, and those that were given alone."""
    documents = [d for i, d in enumerate(documents) if d not in documents[:i]]
    plain = [d for d in documents if d.get("command") == "eval"]
    told = [runs.tell(d) for d in documents if d.get("command") != "eval"]
    evaluated = runs.evaluations(documents)
    return told, summarise(evaluated) if evaluated else None, plain


# ---- the head -----------------------------------------------------------------------------------------


def _title(told: Sequence[Run]) -> str:
    if len(told) > 1:
        return (
            f"{len(told)} results: {', '.join(run.name for run in told[:4])}{', …' if len(told) > 4 else ''}"
        )
    return told[0].name if told[0].command == "run" else f"{told[0].command} {told[0].name}"


def _status(run: Run) -> tuple[str, bool]:
    """Return how a run ended, in words, and whether badly."""
    if run.status in BAD:
        return BAD[run.status], True
    word = GOOD.get(run.status, run.status)
    gates = [gate for point in run.points for gate in point.gates]
    if run.published is not None and run.status == "ok":
        word = "published" if run.published else "done, nothing published"
        swept = [point for point in run.points if point.name]
        if swept and run.published:
            word = f"published {sum(point.published for point in swept)} of {len(swept)} points"
        if gates and all(gate.get("passed") for gate in gates):
            word += f", {html.all_hold(len(gates))}"
    return word, False


def _facts(run: Run) -> Iterable[str]:
    recipe, output = mapping(run.document.get("recipe")), mapping(run.document.get("output"))
    yield f"surgeon {run.command}"
    if recipe.get("sha256"):
        yield f"recipe {run.name}, sha256 {str(recipe['sha256'])[:12]}"
    plan = mapping(run.document.get("plan")).get("id")
    if plan:
        yield f"plan {str(plan)[:12]}"
    if run.document.get("method"):
        yield f"method {run.document['method']}"
    if output.get("path"):
        yield f"output {output['path']}"
    seconds = run.document.get("seconds")
    if isinstance(seconds, int | float):
        yield f"{seconds:,.0f} s"


def _head(told: Sequence[Run], title: str) -> str:
    parts = [f"<header><h1>{escaped(title)}</h1>"]
    for run in told:
        word, failed = _status(run)
        name = f"{run.name}: " if len(told) > 1 else ""
        gated = len(told) == 1 and any(point.gates for point in run.points)
        mark = f"{'✕' if failed else '✓'} {escaped(name + word)}"
        parts.append(f'<p class="facts">{" · ".join(map(escaped, _facts(run)))}</p>')
        link = f'<a href="#run-gates">{mark}</a>' if gated else f"<span>{mark}</span>"
        parts.append(f'<p class="verdict {"bad" if failed else "good"}">{link}</p>')
        if run.error.get("message"):
            help_ = f"<p>{escaped(run.error['help'])}</p>" if run.error.get("help") else ""
            parts.append(f'<section class="caution" aria-label="Error"><p><b>{escaped(run.error.get("code"))}</b> '
                         f"{escaped(run.error['message'])}</p>{help_}</section>")  # fmt: skip
    return "".join([*parts, "</header>"])


# ---- sections -----------------------------------------------------------------------------------------


def _section(section: Section, number: int) -> str:
    note = f'<p class="note">{escaped(section.note)}</p>' if section.note else ""
    blocks = [_block(block, f"c{number}-{i}", section.title) for i, block in enumerate(section.blocks)]
    anchor = f' id="{section.anchor}"' if section.anchor else ""
    return f"<section{anchor}><h2>{escaped(section.title)}</h2>{note}{''.join(blocks)}</section>"


def _block(block: Table | Chart | Listing, name: str, title: str) -> str:
    if isinstance(block, Table):
        return _table(block, title) if block.page else ""
    if isinstance(block, Listing):
        items = "".join(
            f"<li>{f'<b>{escaped(what)}</b> ' if what else ''}{escaped(said)}</li>"
            for what, said in block.items
        )
        return f'<ul class="plain">{items}</ul>'
    drawn = "".join(
        f'<div class="{width}">{svg.draw(block.draw(width == "wide"), prefix=f"{name}-{width}", background=False, style=False)}</div>'
        for width in ("wide", "narrow")
    )
    caption = f"<figcaption>{escaped(block.caption)}</figcaption>" if block.caption else ""
    return f"<figure>{drawn}{caption}</figure>"


def _table(table: Table, title: str) -> str:
    kinds = ["" if a == "r" else ' class="text"' for a in table.alignment]
    heads = "".join(
        f'<th scope="col"{kind}>{escaped(head)}</th>' for head, kind in zip(table.heads, kinds, strict=False)
    )
    rows = []
    for row in table.rows:
        cells = [_cell(cell, number == table.verdict) for number, cell in enumerate(row)]
        rest = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells[1:], kinds[1:], strict=False))
        rows.append(f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>')
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(title)}"><table class="facts-table"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>")  # fmt: skip


def _cell(cell: str, verdict: bool) -> str:
    if verdict and cell in ("holds", "failed"):
        return f'<span class="{"good" if cell == "holds" else "bad"}">{"✓" if cell == "holds" else "✕"} {cell}</span>'
    return escaped(cell)


def _block_markdown(block: Table | Chart | Listing) -> str:
    if isinstance(block, Chart):
        return ""
    if isinstance(block, Listing):
        return "\n".join(
            f"- {f'{in_markdown(what)}: ' if what else ''}{in_markdown(said)}" for what, said in block.items
        )
    rows = [
        ["**FAILED**" if i == block.verdict and c == "failed" else in_markdown(c) for i, c in enumerate(row)]
        for row in block.rows
    ]
    return markdown_.table(block.heads, rows, block.alignment, raw=set(range(len(block.heads))))
