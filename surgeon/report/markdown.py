"""The report as Markdown tables, for pull-request comments and job summaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgeon import __version__
from surgeon.report import figures, summary
from surgeon.report.figures import DASH, Measure
from surgeon.report.summary import Row, Summary
from surgeon.report.text import in_markdown


def render(found: Summary) -> str:
    """Return the report."""
    parts = [f"## {in_markdown(found.title)}", *evaluation(found), FOOTER]
    return "\n\n".join(parts) + "\n"


FOOTER = (
    f"<sub>surgeon {__version__}. Intervals are 95 %. A difference whose paired interval includes no "
    "change is called not distinguishable.</sub>"
)


def evaluation(found: Summary) -> list[str]:
    """Return the parts about results of eval."""
    parts: list[str] = []
    for sentence in found.lead:
        parts.append(
            "".join(f"**{in_markdown(s)}**" if i % 2 else in_markdown(s) for i, s in enumerate(sentence))
        )
    failed = [g for g in found.gates if not g.passed]
    if found.gates:
        passed = len(found.gates) - len(failed)
        parts.append(
            f"**Gates: {'passed' if not failed else 'FAILED'}** ({passed} of {len(found.gates)} hold)"
        )
    if found.cautions:
        parts.append("\n".join(f"> **Caution** {in_markdown(c)}  " for c in found.cautions))
    if found.front:
        parts += ["### Best at each length", _front(found)]
    parts += ["### All models", _models(found)]
    for grouping, names, each in found.groupings:
        parts += [f"### By {in_markdown(grouping)}", _groups(found, names, each)]
    if found.gates:
        rows = [
            ["yes" if g.passed else "**NO**", g.model, g.text, _plain(g.value), _plain(g.threshold)]
            for g in found.gates
        ]
        parts += [
            "### Gates",
            table(["Holds", "Model", "Gate", "Value", "Threshold"], rows, "lllrr", raw={0}),
        ]
    for title, sentences in (("Warnings", found.warnings), ("Notes", found.notes)):
        if sentences:
            parts += [
                f"### {title}",
                "\n".join(f"- {in_markdown(m)}: {in_markdown(s)}" for m, s in sentences),
            ]
    if found.provenance:
        parts += ["### How they were made", _provenance(found)]
    return [*parts, "### Measured on", _setup(found)]


def _front(found: Summary) -> str:
    rows = []
    for row in found.front:
        rows.append(
            [row.name, _measure(found, row, "tokens_mean"), _measure(found, row, "accuracy"), *_against(row)]
        )
    return table(
        ["Model", "Mean tokens", "Accuracy", "Tokens against baseline", "Accuracy against baseline"],
        rows,
        "lrrll",
    )


def _models(found: Summary) -> str:
    compared = any(r.compared for r in found.rows)
    heads = ["Model", *(figures.metric(k).heading for k in found.columns)]
    heads += ["Tokens against baseline", "Accuracy against baseline"] if compared else []
    rows = []
    for row in found.rows:
        notes = [n for n, on in (("baseline", row.baseline), ("front", row.on_front)) if on]
        name = row.name + (f" ({', '.join(notes)})" if notes else "")
        rows.append(
            [name, *(_measure(found, row, k) for k in found.columns), *(_against(row) if compared else [])]
        )
    return table(heads, rows, "l" + "r" * len(found.columns) + "ll")


def _against(row: Row) -> list[str]:
    return (
        ["baseline", "baseline"]
        if row.baseline and not row.against
        else [summary.tokens_change(row), summary.accuracy_change(row)]
    )


def _groups(found: Summary, names: Sequence[str], each: Sequence[dict[str, dict[str, Measure]]]) -> str:
    rows = []
    for name in names:
        for row, groups in zip(found.rows, each, strict=True):
            if name in groups:
                rows.append(
                    [name, row.name, *(_one(found, groups[name], k) for k in ("accuracy", "tokens_mean"))]
                )
    return table(["Group", "Model", "Accuracy", "Mean tokens"], rows, "llrr")


def _provenance(found: Summary) -> str:
    rows = []
    for name, made in found.provenance:
        inputs = "; ".join(f"{i} ({said})" if said else i for i, said, _ in made.inputs)
        rows.append(
            [
                name,
                made.method,
                inputs,
                _pairs(made.parameters),
                _pairs(made.calibration) or DASH,
                made.plan[:12],
            ]
        )
    return table(["Model", "Method", "Inputs", "Parameters", "Calibration", "Plan"], rows, "llllll")


def _setup(found: Summary) -> str:
    rows = [["data", k, v] for k, v in found.data] + [["settings", k, v] for k, v in found.settings]
    for key, values in found.differing:
        part, _, name = key.partition(": ")
        given = [r.name for r in found.rows if r.document]
        rows.append([part, name, "; ".join(f"{m}: {v}" for m, v in zip(given, values, strict=True))])
    return table(["", "Key", "Value"], rows, "lll") if rows else "not recorded"


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{k} {v}" for k, v in pairs)


def _measure(found: Summary, row: Row, key: str) -> str:
    return _one(found, row.metrics, key)


def _one(found: Summary, metrics: dict[str, Measure], key: str) -> str:
    measure, shown = metrics.get(key), figures.metric(key)
    if measure is None:
        return DASH
    places = found.places(key)
    text = figures.written(measure.value, shown.kind, places)
    if shown.interval and measure.low is not None and measure.high is not None:
        text += f" ({figures.interval(measure.low, measure.high, shown.kind, places)})"
    return text


def _plain(value: float | None) -> str:
    return DASH if value is None else figures.minus(f"{value:,.6g}")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], alignment: str, raw: set[int] | None = None
) -> str:
    """Return a table; cells are escaped, but those of the columns in ``raw``."""
    lines = ["| " + " | ".join(in_markdown(h) for h in heads) + " |"]
    lines.append("|" + "|".join("---:" if a == "r" else ":---" for a in alignment[: len(heads)]) + "|")
    for row in rows:
        cells = [c if raw and i in raw else in_markdown(c) for i, c in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
