"""From a summary to the dots of its Pareto plot."""

from __future__ import annotations

from surgeon.report import figures, scatter, summary
from surgeon.report.scatter import Dot, Scene, Style


def dots(found: summary.Summary) -> list[Dot]:
    """Return a dot for every row that has both coordinates."""
    tokens, accuracy = found.places("tokens_mean"), found.places("accuracy")
    marked = []
    for row in found.rows:
        if not row.plotted:
            continue
        a, t = row.metrics["accuracy"], row.metrics["tokens_mean"]
        short = f"{figures.written(a.value, 'percent', accuracy)}, {figures.written(t.value, 'number', tokens)} tokens"
        detail = [f"{row.name}: {short}"]
        if a.low is not None and a.high is not None:
            detail.append(f"accuracy {figures.interval(a.low, a.high, 'percent', accuracy)}%")
        if t.low is not None and t.high is not None:
            detail.append(f"tokens {figures.interval(t.low, t.high, 'number', tokens)}")
        if row.beaten:
            detail.append("another model is both shorter and more accurate, beyond the intervals")
        marked.append(Dot(row.name, row.point, row.series, row.baseline, short, "; ".join(detail)))
    return marked


def scene(
    found: summary.Summary, *, style: Style = scatter.WIDE, log_tokens: bool = False, iso_lines: bool = False
) -> Scene | None:
    """Return the Pareto plot of a summary, None when no row has accuracy and mean tokens."""
    marked = dots(found)
    if not marked:
        return None
    return scatter.layout(
        marked, found.series, style=style, log_tokens=log_tokens, iso_lines=iso_lines,
        title="Accuracy against mean tokens per answer",
    )  # fmt: skip
