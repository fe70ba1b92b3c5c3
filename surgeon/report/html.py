"""The report as one page: no scripts, nothing fetched, light and dark, fit for paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgeon import __version__
from surgeon.report import figures, plot, scatter, svg
from surgeon.report.documents import SCHEMAS
from surgeon.report.figures import DASH, Measure
from surgeon.report.page_style import STYLE
from surgeon.report.scatter import Marker, look
from surgeon.report.summary import Gate, Row, Summary
from surgeon.report.text import escaped


def render(found: Summary, *, log_tokens: bool = False, iso_lines: bool = False) -> str:
    """Return the page."""
    return page(found.title, [_head(found), *evaluation(found, log_tokens=log_tokens, iso_lines=iso_lines)])


def evaluation(found: Summary, *, log_tokens: bool = False, iso_lines: bool = False) -> list[str]:
    """Return the sections about results of eval."""
    return [
        _cautions(found.cautions), _front(found), _plot(found, log_tokens, iso_lines), _models(found),
        *(_groups(found, *grouping) for grouping in found.groupings), _gates(found.gates), _warnings(found),
        _provenance(found), _setup(found), _meanings(found),
    ]  # fmt: skip


def page(title: str, sections: Iterable[str]) -> str:
    """Return a page of its own around sections, empty ones left out."""
    body = "\n".join(s for s in sections if s)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="surgeon {__version__}">
<title>{escaped(title)}</title>
<style>{_colours()}{svg.style_sheet()}{STYLE}</style>
</head>
<body>
<main>
{body}
<footer>surgeon {__version__} · result schema {", ".join(map(str, SCHEMAS))} · intervals are 95 %. The page says
“not distinguishable” where a paired interval includes no change: this much data cannot tell the two apart,
which is not to say that they are equal.</footer>
</main>
</body>
</html>
"""


def _colours() -> str:
    def table(colours: dict[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in colours.items())

    return f":root{{{table(svg.LIGHT)}}}@media screen and (prefers-color-scheme:dark){{:root{{{table(svg.DARK)}}}}}"


def _head(found: Summary) -> str:
    data = dict(found.data)
    questions = data.get("questions")
    evaluated = sum(1 for r in found.rows if r.document)
    facts = [f"{evaluated} model{'s' if evaluated != 1 else ''}"]
    if questions:
        facts.append(f"{questions} questions" + (f" of {data['name']}" if data.get("name") else ""))
    if "sha256" in data:
        facts.append(f"data sha256 {data['sha256'][:12]}")
    settings = dict(found.settings)
    facts += [f"{k} {settings[k]}" for k in ("temperature", "max new tokens", "seed") if k in settings]
    lead = "".join(f'<p class="lead">{_emphasised(sentence)}</p>' for sentence in found.lead)
    gates = ""
    if found.gates:
        failed = sum(1 for g in found.gates if not g.passed)
        kind, text = (
            ("bad", f"{failed} of {len(found.gates)} gates failed")
            if failed
            else ("good", all_hold(len(found.gates)))
        )
        gates = f'<p class="verdict {kind}"><a href="#gates">{"✕" if failed else "✓"} {text}</a></p>'
    return f'<header><h1>{escaped(found.title)}</h1><p class="facts">{" · ".join(map(escaped, facts))}</p>{lead}{gates}</header>'


def _emphasised(sentence: Sequence[str]) -> str:
    return "".join(f"<b>{escaped(s)}</b>" if i % 2 else escaped(s) for i, s in enumerate(sentence))


def all_hold(count: int) -> str:
    """Say that so many gates hold."""
    return "the gate holds" if count == 1 else f"all {count} gates hold"


def _cautions(cautions: Sequence[str]) -> str:
    if not cautions:
        return ""
    return (
        '<section class="caution" aria-label="Cautions">'
        + "".join(f"<p>{escaped(c)}</p>" for c in cautions)
        + "</section>"
    )


def _front(found: Summary) -> str:
    if len(found.rows) < 2 or not found.front:
        return ""
    cards = []
    for row in found.front:
        accuracy, tokens = row.metrics["accuracy"], row.metrics["tokens_mean"]
        against = ""
        if row.against and row.tokens_change is not None and row.accuracy_change is not None:
            against = (f'<p class="against">against {escaped(row.against)}</p><ul class="plain"><li>{_change(row, "tokens", "tokens ")}</li>'
                       f'<li>{_change(row, "accuracy", "accuracy ", test=False)}</li></ul>')  # fmt: skip
        elif row.baseline:
            against = '<p class="against">the baseline</p>'
        cards.append(
            f"<li><h3>{_glyph(row)}<span>{escaped(row.name)}</span></h3>"
            f'<p class="pair"><b>{_data(found, tokens, "tokens_mean")}</b> tokens</p>'
            f'<p class="pair"><b>{_data(found, accuracy, "accuracy")}</b> accuracy</p>{_interval(found, accuracy, "accuracy")}{against}</li>'
        )
    return ('<section><h2>Best at each length</h2><p class="note">No other model here is both shorter and at least as '
            f'accurate, by the estimates. Shortest answers first.</p><ol class="front">{"".join(cards)}</ol></section>')  # fmt: skip


def _plot(found: Summary, log_tokens: bool, iso_lines: bool) -> str:
    parts = []
    for name, style in (("wide", scatter.WIDE), ("narrow", scatter.NARROW)):
        scene = plot.scene(found, style=style, log_tokens=log_tokens, iso_lines=iso_lines)
        if scene is None:
            return ""
        drawn = svg.draw(scene, prefix=name, background=False, style=False)
        parts.append(f'<div class="{name}">{drawn}</div>')
    note = "Bars are 95 % intervals. Filled markers are on the Pareto front; the line is the best accuracy within a length."
    return f"<section><h2>Accuracy against answer length</h2><figure>{''.join(parts)}<figcaption>{note}</figcaption></figure></section>"


def _models(found: Summary) -> str:
    compared = any(r.compared for r in found.rows)
    heads = "".join(f'<th scope="col">{escaped(figures.metric(k).heading)}</th>' for k in found.columns)
    if compared:
        heads += '<th scope="col">Tokens against baseline</th><th scope="col">Accuracy against baseline</th>'
    rows = []
    for row in found.rows:
        cells = "".join(
            f"<td>{_cell(found, row.metrics.get(k), k)}{_times(row, k)}</td>" for k in found.columns
        )
        if compared:
            cells += f"<td>{_change(row, 'tokens')}</td><td>{_change(row, 'accuracy')}</td>"
        rows.append(
            f'<tr{_class(row)}><th scope="row"><div>{_glyph(row)}<span>{escaped(row.name)}{_notes(row)}</span></div></th>{cells}</tr>'
        )
    return (f'<section><h2>All models</h2><div class="scroll" tabindex="0" role="region" aria-label="All models"><table class="models">'
            f'<thead><tr><th scope="col">Model</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>')  # fmt: skip


def _times(row: Row, key: str) -> str:
    """Return how many times the baseline's accuracy per token this is, below that metric."""
    ratio = row.per_token_change
    if key != "intelligence_per_token" or ratio is None:
        return ""
    span = ""
    if ratio.low is not None and ratio.high is not None:
        span = f" ({figures.interval(ratio.low, ratio.high, 'number', 2)})"
    return f'<small>×<data value="{ratio.value!r}">{ratio.value:.2f}</data>{span}</small>'


def _class(row: Row) -> str:
    return ' class="on-front"' if row.on_front else ""


def _notes(row: Row) -> str:
    notes = []
    if row.baseline:
        notes.append("baseline")
    if row.on_front:
        notes.append("on the front")
    if row.beaten:
        notes.append("clearly beaten")
    return f"<small>{' · '.join(notes)}</small>" if notes else ""


def _cell(found: Summary, measure: Measure | None, key: str) -> str:
    if measure is None:
        return f'<span class="none">{DASH}</span>'
    return _data(found, measure, key) + _interval(found, measure, key)


def _interval(found: Summary, measure: Measure, key: str) -> str:
    shown = figures.metric(key)
    if not shown.interval or measure.low is None or measure.high is None:
        return ""
    return f"<small>{figures.interval(measure.low, measure.high, shown.kind, found.places(key))}</small>"


def _change(row: Row, which: str, name: str = "", test: bool = True) -> str:
    """Return the change against the baseline: what the interval allows to say first, the figures below.

    Args:
        name: stands before it where no heading says what changes.
        test: with the p value of McNemar's test.
    """
    change = row.tokens_change if which == "tokens" else row.accuracy_change
    if change is None:
        return f'<span class="none">{DASH}</span>'
    write = figures.as_change if which == "tokens" else figures.in_points
    neutral, unit = (1.0, "") if which == "tokens" else (0.0, " points")
    value = f'<data value="{change.value!r}">{write(change.value)}</data>'
    if change.low is None or change.high is None:
        return f"{name}{value}{unit}<small>no interval</small>"
    span = f"{write(change.low)} to {write(change.high)}"
    p_value = row.mcnemar.get("p_value") if test and which == "accuracy" else None
    tail = f"<small>{escaped(figures.as_p_value(p_value))}</small>" if p_value is not None else ""
    if change.verdict(neutral) == "not distinguishable":
        return f'<span class="unclear">{name}not distinguishable</span><small>{value}, {span}</small>{tail}'
    return f"{name}{value}{unit}<small>{span}</small>{tail}"


def _data(found: Summary, measure: Measure, key: str) -> str:
    """Return a figure that keeps its exact value for whoever reads the page by machine."""
    text = figures.written(measure.value, figures.metric(key).kind, found.places(key))
    return f'<data value="{measure.value!r}">{text}</data>'


def _groups(
    found: Summary, grouping: str, names: Sequence[str], each: Sequence[dict[str, dict[str, Measure]]]
) -> str:
    """Return the table of a grouping: groups across where they are few, else down the page."""
    rows = [(row, groups) for row, groups in zip(found.rows, each, strict=True) if groups]

    def cell(groups: dict[str, dict[str, Measure]], name: str) -> str:
        measures = groups.get(name, {})
        accuracy, tokens = measures.get("accuracy"), measures.get("tokens_mean")
        if accuracy is None and tokens is None:
            return f'<td><span class="none">{DASH}</span></td>'
        first = _data(found, accuracy, "accuracy") if accuracy else f'<span class="none">{DASH}</span>'
        below = []
        if accuracy and accuracy.low is not None and accuracy.high is not None:
            below.append(figures.interval(accuracy.low, accuracy.high, "percent", found.places("accuracy")))
        if tokens:
            below.append(f"{_data(found, tokens, 'tokens_mean')} tokens")
        return f"<td>{first}<small>{' · '.join(below)}</small></td>"

    def model(row: Row, scope: str) -> str:
        return f'<th scope="{scope}"><div>{_glyph(row)}<span>{escaped(row.name)}</span></div></th>'

    if len(names) <= max(6, len(rows)):
        heads = '<th scope="col">Model</th>' + "".join(f'<th scope="col">{escaped(n)}</th>' for n in names)
        lines = [f"<tr>{model(r, 'row')}{''.join(cell(g, n) for n in names)}</tr>" for r, g in rows]
    else:
        heads = f'<th scope="col">{escaped(grouping)}</th>' + "".join(model(r, "col") for r, _ in rows)
        lines = [
            f'<tr><th scope="row">{escaped(n)}</th>{"".join(cell(g, n) for _, g in rows)}</tr>' for n in names
        ]
    title = f"By {escaped(grouping)}"
    return (f'<section><h2>{title}</h2><div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="groups">'
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>")  # fmt: skip


def _gates(gates: Sequence[Gate]) -> str:
    if not gates:
        return ""
    rows = []
    for gate in gates:
        mark = '<span class="good">✓ holds</span>' if gate.passed else '<span class="bad">✕ failed</span>'
        rows.append(f'<tr><th scope="row">{mark}</th><td class="text">{escaped(gate.model)}</td><td class="text"><code>{escaped(gate.text)}</code></td>'
                    f"<td>{_number(gate.value)}</td><td>{_number(gate.threshold)}</td></tr>")  # fmt: skip
    return ('<section id="gates"><h2>Gates</h2><div class="scroll" tabindex="0" role="region" aria-label="Gates"><table><thead><tr>'
            '<th scope="col">Result</th><th scope="col" class="text">Model</th><th scope="col" class="text">Gate</th>'
            f'<th scope="col">Value</th><th scope="col">Threshold</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>')  # fmt: skip


def _number(value: float | None) -> str:
    return DASH if value is None else f'<data value="{value!r}">{figures.minus(f"{value:,.6g}")}</data>'


def _warnings(found: Summary) -> str:
    sections = []
    for title, sentences in (("Warnings", found.warnings), ("Notes", found.notes)):
        if sentences:
            items = "".join(f"<li><b>{escaped(m)}</b> {escaped(s)}</li>" for m, s in sentences)
            sections.append(f'<section><h2>{title}</h2><ul class="plain">{items}</ul></section>')
    return "\n".join(sections)


def _provenance(found: Summary) -> str:
    """Return one block per model, equal parts of models merged alike named once."""
    if not found.provenance:
        return ""
    calibrated = any(made.calibration for _, made in found.provenance)
    rows = []
    for name, made in found.provenance:
        inputs = "".join(
            f"<li><b>{escaped(i)}</b>{f' {escaped(said)}' if said else ''}{f' <code>{escaped(digests)}</code>' if digests else ''}</li>"
            for i, said, digests in made.inputs
        )
        warnings = "".join(f"<p>{escaped(w)}</p>" for w in made.warnings)
        rows.append(
            f'<tr><th scope="row">{escaped(name)}<small>{escaped(made.method)}</small></th><td class="text"><ul class="plain">{inputs}</ul></td>'
            f'<td class="text">{_pairs(made.parameters)}{warnings}</td>{f"<td class=text>{_pairs(made.calibration) or DASH}</td>" if calibrated else ""}'
            f'<td class="text"><code>{escaped(made.plan[:12])}</code><small>{escaped(made.program)}</small></td></tr>'
        )
    calibration = '<th scope="col" class="text">Calibration</th>' if calibrated else ""
    return ('<section><h2>How they were made</h2><p class="note">From the surgeon.json of each model; codes are the first '
            'digits of sha256 digests.</p><div class="scroll" tabindex="0" role="region" aria-label="How they were made"><table class="made">'
            '<thead><tr><th scope="col">Model</th><th scope="col" class="text">Inputs</th><th scope="col" class="text">Parameters</th>'
            f'{calibration}<th scope="col" class="text">Plan</th></tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table></div></section>')  # fmt: skip


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{escaped(k)} <b>{escaped(v)}</b>" for k, v in pairs)


def _setup(found: Summary) -> str:
    blocks = []
    for title, pairs in (("Data", found.data), ("Settings", found.settings)):
        if pairs:
            entries = "".join(_entry(k, v) for k, v in pairs)
            blocks.append(f'<h3>{title}</h3><dl class="setup">{entries}</dl>')
    if found.differing:
        blocks.append(_differing(found))
    models = [r for r in found.rows if r.document and _model_facts(r)]
    if models:
        entries = "".join(_entry(r.name, _model_facts(r)) for r in models)
        blocks.append(f'<h3>Models</h3><dl class="setup">{entries}</dl>')
    return f"<section><h2>What was measured, and how</h2>{''.join(blocks)}</section>" if blocks else ""


def _differing(found: Summary) -> str:
    """Return the settings that differ, the longer side down the page."""
    names = [escaped(r.name) for r in found.rows if r.document]
    keys = [escaped(k) for k, _ in found.differing]
    cells = [[escaped(v) for v in values] for _, values in found.differing]
    first, across, down = "", names, keys
    if len(names) > len(keys):
        first, across, down = "Model", keys, names
        cells = [list(column) for column in zip(*cells, strict=True)]
    heads = "".join(f'<th scope="col" class="text">{h}</th>' for h in across)
    lines = "".join(
        f'<tr><th scope="row">{d}</th>{"".join(f"<td class=text>{c}</td>" for c in row)}</tr>'
        for d, row in zip(down, cells, strict=True)
    )
    return (
        '<h3>Where they differ</h3><div class="scroll" tabindex="0" role="region" aria-label="Where they differ"><table>'
        f'<thead><tr><th scope="col">{first}</th>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _entry(key: str, value: str) -> str:
    """Return a setting; a long one gets the whole width."""
    kind = ' class="long"' if len(key) + len(value) > 34 else ""
    return f"<div{kind}><dt>{escaped(key)}</dt><dd>{escaped(value)}</dd></div>"


def _model_facts(row: Row) -> str:
    model = row.document["model"]
    facts = []
    if model.get("parameters") is not None:
        facts.append(f"{_large(model['parameters'])} parameters")
    if model.get("dtype"):
        facts.append(str(model["dtype"]))
    if model.get("bytes") is not None:
        facts.append(f"{_large(model['bytes'], ('B', 'kB', 'MB', 'GB', 'TB'))}")
    if isinstance(model.get("path"), str) and model["path"] != model["name"]:
        facts.append(model["path"])
    return ", ".join(facts)


def _large(count: float, units: Sequence[str] = ("", "K", "M", "B", "T")) -> str:
    for unit in units[:-1]:
        if abs(count) < 1000:
            return f"{count:.3g} {unit}".strip() if units[0] else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} {units[-1]}" if units[0] else f"{count:.3g}{units[-1]}"


def _meanings(found: Summary) -> str:
    entries = "".join(
        f"<div><dt>{escaped(figures.metric(k).heading)}</dt><dd>{escaped(figures.metric(k).meaning)}</dd></div>"
        for k in found.columns if figures.metric(k).meaning
    )  # fmt: skip
    if any(r.beaten for r in found.rows):
        entries += "<div><dt>clearly beaten</dt><dd>another model is shorter and more accurate, and no interval of the two touches</dd></div>"
    if any(r.per_token_change for r in found.rows):
        entries += "<div><dt>× below it</dt><dd>times the baseline's accuracy per token, on the same questions</dd></div>"
    return (
        f'<section><h2>What the columns mean</h2><dl class="terms">{entries}</dl></section>'
        if entries
        else ""
    )


def _glyph(row: Row) -> str:
    """Return the row's marker as in the plot."""
    if not row.plotted:
        return '<svg class="plot glyph" viewBox="0 0 20 20" aria-hidden="true"></svg>'
    role, shape = look(row.series)
    drawn = svg.marker(Marker(10, 10, 5.5, shape, role, ring=row.baseline, filled=row.on_front))
    return f'<svg class="plot glyph" viewBox="0 0 20 20" aria-hidden="true">{drawn}</svg>'
