"""What a report says, before it is a page or a table: rows, the front, comparisons, cautions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgeon.report import figures, pareto, provenance
from surgeon.report.figures import METRICS, Measure
from surgeon.report.provenance import Provenance

CUT_OFF = 0.01
"""A share of cut answers from which their mean length is called a lower bound."""


@dataclass
class Row:
    """One model of the table.

    Attributes:
        name: distinct within the report.
        method: how it was made, "" where that is not known.
        against: the baseline's name; the changes against it are accuracy_change (difference),
            tokens_change and per_token_change (ratios), None without paired figures.
        document: the result; empty for a baseline that is known from other results only.
    """

    name: str
    method: str
    metrics: dict[str, Measure]
    document: dict[str, Any]
    baseline: bool = False
    against: str = ""
    accuracy_change: Measure | None = None
    tokens_change: Measure | None = None
    per_token_change: Measure | None = None
    mcnemar: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    series: int = 0
    on_front: bool = False
    beaten: bool = False

    @property
    def plotted(self) -> bool:
        """Whether it has both coordinates."""
        return "accuracy" in self.metrics and "tokens_mean" in self.metrics

    @property
    def compared(self) -> bool:
        """Whether there are paired figures against a baseline."""
        return self.accuracy_change is not None or self.tokens_change is not None

    @property
    def point(self) -> pareto.Point:
        accuracy, tokens = self.metrics["accuracy"], self.metrics["tokens_mean"]
        return pareto.Point(
            tokens.value, accuracy.value, tokens.low, tokens.high, accuracy.low, accuracy.high
        )


@dataclass(frozen=True)
class Gate:
    """A gate of one model and how it went."""

    model: str
    text: str
    passed: bool
    value: float | None
    threshold: float | None


@dataclass(frozen=True)
class Summary:
    """Everything a report shows.

    Attributes:
        rows: shortest answers first; those without a length last, in the given order.
        front: rows on the Pareto front, shortest answers first.
        series: method names by `Row.series`.
        columns: metrics that at least one row has.
        lead: the sentences to read first, as texts of which every second one is a model's name.
        gates, cautions (this report's own), warnings and notes (model, sentence).
        data, settings: (key, value) where all results agree; ``differing`` has the rest by row.
        groupings: by grouping, group names and per row the metrics by group.
    """

    title: str
    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    series: tuple[str, ...]
    columns: tuple[str, ...]
    lead: tuple[tuple[str, ...], ...]
    gates: tuple[Gate, ...]
    cautions: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    data: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    groupings: tuple[tuple[str, tuple[str, ...], tuple[dict[str, dict[str, Measure]], ...]], ...]
    provenance: tuple[tuple[str, Provenance], ...]

    def places(self, key: str) -> int:
        """Return the decimals of a column."""
        found = [r.metrics[key] for r in self.rows if key in r.metrics]
        kind = figures.metric(key).kind
        return figures.decimals(kind, (m.value for m in found), max((m.n or 0 for m in found), default=0))


def summarise(results: Sequence[Mapping[str, Any]], title: str | None = None) -> Summary:
    """Collect what a report over some checked result documents says.

    Args:
        results: documents that passed `documents.validate`.
    """
    documents, repeated = _distinct(results)
    rows = sorted(
        _rows(documents),
        key=lambda r: r.metrics["tokens_mean"].value if "tokens_mean" in r.metrics else float("inf"),
    )
    methods = list(dict.fromkeys(r.method for r in rows if r.method))
    series = ("other models" if methods else "models", *methods)
    for row in rows:
        row.series = series.index(row.method) if row.method else 0
    plotted = [r for r in rows if r.plotted]
    points = [r.point for r in plotted]
    best = [plotted[i] for i in pareto.front(points)]
    for row, beaten in zip(plotted, pareto.clearly_beaten(points), strict=True):
        row.beaten = beaten
    for row in best:
        row.on_front = True
    known = [m.key for m in METRICS]
    measured = {key for r in rows for key in r.metrics}
    given = [r for r in rows if r.document]
    settings, settings_differ = _agreeing(given, "settings")
    data, data_differ = _agreeing(given, "data")
    return Summary(
        title=title or _title(given),
        rows=tuple(rows),
        front=tuple(best),
        series=series,
        columns=tuple([k for k in known if k in measured] + sorted(measured - set(known))),
        lead=tuple(_lead(rows, best)),
        gates=tuple(_gates(given)),
        cautions=tuple(_cautions(rows, settings_differ, data_differ, repeated)),
        warnings=tuple((r.name, w) for r in given for w in r.document.get("warnings") or []),
        notes=tuple((r.name, n) for r in given for n in r.document.get("notes") or []),
        data=tuple(data),
        settings=tuple(settings),
        differing=tuple((f"{part}: {k}", v) for part, found in (("data", data_differ), ("settings", settings_differ))
                        for k, v in found),
        groupings=tuple(_groupings(rows)),
        provenance=tuple((r.name, provenance.read(m)) for r in given if (m := _manifest(r.document))),
    )  # fmt: skip


def _title(rows: Sequence[Row]) -> str:
    if len(rows) == 1:
        return f"Evaluation of {rows[0].name}"
    return f"Accuracy and answer length of {len(rows)} models"


def _distinct(results: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Leave out documents that say the same as an earlier one."""
    seen: set[str] = set()
    kept = []
    for document in results:
        identity = json.dumps(document, sort_keys=True)
        if identity not in seen:
            seen.add(identity)
            kept.append(dict(document))
    return kept, len(results) - len(kept)


def _rows(documents: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    for document in documents:
        manifest = _manifest(document)
        method = provenance.read(manifest).method if manifest else ""
        row = Row(
            document["model"]["name"],
            method,
            _measures(document["metrics"]),
            document,
            groups=document.get("groups") or {},
        )
        baseline = document.get("baseline")
        if baseline:
            paired = baseline.get("paired") or {}
            row.against = baseline["name"]
            row.accuracy_change = Measure.read(paired.get("accuracy_difference"))
            row.tokens_change = Measure.read(paired.get("tokens_ratio"))
            row.per_token_change = Measure.read(paired.get("intelligence_per_token_ratio"))
            row.mcnemar = paired.get("mcnemar") or {}
        rows.append(row)
    for document in documents:
        baseline = document.get("baseline")
        if baseline:
            _mark_baseline(rows, baseline)
    _name_apart(rows)
    return rows


def _mark_baseline(rows: list[Row], baseline: Mapping[str, Any]) -> None:
    """Mark the row of a baseline; one that was not given as a result becomes a row of its own."""
    name, metrics = baseline["name"], _measures(baseline.get("metrics") or {})
    same = [r for r in rows if r.name == name]
    for row in same:
        shared = [k for k in ("accuracy", "tokens_mean") if k in row.metrics and k in metrics]
        if all(row.metrics[k].value == metrics[k].value for k in shared):
            row.baseline = True
            return
    rows.append(Row(name, "", metrics, {}, baseline=True, groups=baseline.get("groups") or {}))


def _name_apart(rows: list[Row]) -> None:
    """Number rows that share a name; the first keeps it."""
    taken: set[str] = set()
    for row in rows:
        name, count = row.name, 2
        while name in taken:
            name, count = f"{row.name} ({count})", count + 1
        taken.add(name)
        row.name = name


def _measures(metrics: Mapping[str, Any]) -> dict[str, Measure]:
    found = {key: Measure.read(entry) for key, entry in metrics.items()}
    return {key: measure for key, measure in found.items() if measure is not None}


def _manifest(document: Mapping[str, Any]) -> dict[str, Any]:
    return (document.get("model") or {}).get("manifest") or {}


def _agreeing(
    rows: Sequence[Row], part: str
) -> tuple[list[tuple[str, str]], list[tuple[str, tuple[str, ...]]]]:
    """Split settings into those all results share and those that differ (by row)."""
    each = [dict(_flat(r.document.get(part) or {})) for r in rows]
    keys = list(dict.fromkeys(k for entry in each for k in entry))
    same, differing = [], []
    for key in keys:
        values = tuple(entry.get(key, figures.DASH) for entry in each)
        if len(set(values)) == 1:
            same.append((key, values[0]))
        else:
            differing.append((key, values))
    return same, differing


def _flat(part: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, entry in part.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{name}: ")
        elif entry is not None:
            yield name, provenance.value(entry)


def _gates(rows: Sequence[Row]) -> Iterable[Gate]:
    for row in rows:
        for gate in row.document.get("gates") or []:
            yield Gate(row.name, gate["text"], gate["passed"], gate.get("value"), gate.get("threshold"))


def _cautions(
    rows: Sequence[Row],
    settings: Sequence[tuple[str, tuple[str, ...]]],
    data: Sequence[tuple[str, tuple[str, ...]]],
    repeated: int,
) -> Iterable[str]:
    if any(key.endswith("sha256") for key, _ in data):
        yield "The results are over different data: neither their figures nor the front through them compare."
    elif data:
        yield f"The results differ in their data ({', '.join(k for k, _ in data)}); compare with care."
    loud = [k for k, _ in settings if k not in {"batch size", "device", "threads"}]
    if loud:
        yield f"The results were measured with different settings ({', '.join(loud)}); compare with care."
    against = list(dict.fromkeys(r.against for r in rows if r.against))
    if len(against) > 1:
        yield f"The results are compared with different baselines: {', '.join(against)}."
    caps = {r.name: r.metrics["cap_rate"].value for r in rows if "cap_rate" in r.metrics}
    cut = [f"{name} ({figures.written(cap, 'percent', 1)})" for name, cap in caps.items() if cap >= CUT_OFF]
    if cut:
        yield f"Answers were cut off at the token limit, so that mean tokens are a lower bound: {', '.join(cut)}."
    missing = [r.name for r in rows if not r.plotted]
    if missing and len(missing) < len(rows):
        yield f"Not in the plot, for want of accuracy or mean tokens: {', '.join(missing)}."
    if repeated:
        yield f"{repeated} result{'s were' if repeated > 1 else ' was'} given twice and counted once."


def _lead(rows: Sequence[Row], best: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    """Name the shortest model whose accuracy cannot be told from the baseline's, else the ends of the front."""
    against = {r.against for r in rows if r.against}
    compared = [
        (r, a, t) for r in rows if r.plotted and (a := r.accuracy_change) is not None and (t := r.tokens_change) is not None
    ]  # fmt: skip
    if len(against) == 1 and compared:
        name = next(iter(against))
        kept = [
            (t.value, -r.metrics["accuracy"].value, i, r)
            for i, (r, a, t) in enumerate(compared)
            if a.verdict(0) in {"not distinguishable", "higher"} and t.verdict(1) == "lower"
        ]
        if kept:
            row = min(kept)[-1]
            yield (
                f"Fewest tokens without a distinguishable loss of accuracy against {name}: ", row.name,
                f", tokens {tokens_change(row)}, accuracy {accuracy_change(row)}.",
            )  # fmt: skip
        else:
            yield (f"No model has shorter answers than {name} without a distinguishable loss of accuracy.",)
    elif len(best) > 1:
        yield (
            "Shortest answers: ", best[0].name, ". Most accurate: ", best[-1].name,
            ". Nothing here says whether these differences are more than chance: there is no paired baseline.",
        )  # fmt: skip


def accuracy_change(row: Row) -> str:
    """Return the change of accuracy in words: what its interval allows to say, and no more."""
    change = row.accuracy_change
    if change is None:
        return figures.DASH
    if change.low is None or change.high is None:
        return f"{figures.in_points(change.value)} points (no interval)"
    span = f"{figures.in_points(change.low)} to {figures.in_points(change.high)}"
    if change.verdict(0) == "not distinguishable":
        return f"not distinguishable ({span} points)"
    return f"{figures.in_points(change.value)} points ({span})"


def tokens_change(row: Row) -> str:
    """Return the change of answer length in words."""
    change = row.tokens_change
    if change is None:
        return figures.DASH
    if change.low is None or change.high is None:
        return f"{figures.as_change(change.value)} (no interval)"
    span = f"{figures.as_change(change.low)} to {figures.as_change(change.high)}"
    if change.verdict(1) == "not distinguishable":
        return f"not distinguishable ({span})"
    return f"{figures.as_change(change.value)} ({span})"


def _groupings(
    rows: Sequence[Row],
) -> Iterable[tuple[str, tuple[str, ...], tuple[dict[str, dict[str, Measure]], ...]]]:
    each = [r.groups for r in rows]
    for grouping in dict.fromkeys(g for entry in each for g in entry):
        names = tuple(dict.fromkeys(n for entry in each for n in entry.get(grouping, {})))
        if names:
            yield (
                grouping,
                names,
                tuple({n: _measures(m) for n, m in entry.get(grouping, {}).items()} for entry in each),
            )
