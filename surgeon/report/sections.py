"""What a page about runs says, as titled tables, lists and charts; `run_page` writes them as HTML and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.report import charts, coverage, folders, provenance, scatter, tradeoff
from surgeon.report.charts import Bars, Heat
from surgeon.report.documents import number
from surgeon.report.figures import DASH, minus
from surgeon.report.layers import ByLayer, mapping, sequence
from surgeon.report.provenance import Provenance
from surgeon.report.runs import Point, Run, Size, Step, by_layer, found_by
from surgeon.report.scatter import Scene, Style
from surgeon.report.tradeoff import Candidate

CHARTED = 4
"""Models of a sweep or a family whose layers are drawn; tables name the others."""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        alignment: "l" or "r" for each column.
        verdict: column of "holds" and "failed", None without.
        page: whether the page has it too, which shows charts in its place.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    alignment: str
    verdict: int | None = None
    page: bool = True


@dataclass(frozen=True)
class Chart:
    """A drawing, laid out anew for the width there is."""

    draw: Callable[[bool], Scene]
    caption: str = ""


@dataclass(frozen=True)
class Listing:
    """Sentences, each with what it is about or ""."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Table | Chart | Listing, ...]
    note: str = ""
    anchor: str = ""


def sections(runs: Sequence[Run], evaluations: Sequence[Mapping[str, Any]] = ()) -> list[Section]:
    """Return the sections about runs and single commands, those without content left out."""
    found: list[Section | None] = []
    several = len(runs) > 1
    for run in runs:
        head = f"{run.name}: " if several else ""
        found += [_points(run, head), _gates(run, head)]
    found.append(_trade(tradeoff.candidates(runs, evaluations)))
    for run in runs:
        head = f"{run.name}: " if several else ""
        known = _known(run)
        found += [_sizes(run, head), _steps(run, head), *_layers(run, head, known), _schemes(run, head), _calibration(run, head, known),
                  _sentences(run, head), _made(run, head)]  # fmt: skip
    return [section for section in found if section is not None]


# ---- the run ------------------------------------------------------------------------------------------


def _points(run: Run, head: str) -> Section | None:
    if not any(point.name for point in run.points):
        return None
    rows = []
    for point in run.points:
        values = ", ".join(f"{k} {provenance.value(v)}" for k, v in point.values.items())
        verdict = DASH if point.passed is None or not point.gates else "holds" if point.passed else "failed"
        figures = "; ".join(_figures(point))
        rows.append(
            (verdict, point.name, values or DASH, figures or DASH, "yes" if point.published else "no")
        )
    heads = ("Gates", "Point", "Values", "Figures of its gates", "Published")
    return Section(f"{head}Points of the sweep", (Table(heads, tuple(rows), "lllll", 0),))


def _figures(point: Point) -> Iterable[str]:
    for gate in point.gates:
        yield f"{gate.get('metric') or gate.get('gate')} {figure(gate.get('value'))}"


def _gates(run: Run, head: str) -> Section | None:
    rows = []
    swept = any(point.name for point in run.points)
    for point in run.points:
        for gate in point.gates:
            row = ["holds" if gate.get("passed") else "failed", point.name, str(gate.get("gate")), str(gate.get("step") or DASH),
                   figure(gate.get("value")), figure(gate.get("threshold")), figure(gate.get("baseline"))]  # fmt: skip
            if not swept:
                del row[1]
            rows.append(tuple(row))
    if not rows:
        return None
    heads = (
        "Result",
        *(("Point",) if swept else ()),
        "Gate",
        "Measured by",
        "Value",
        "Threshold",
        "Baseline",
    )
    alignment = "lllrrr" if not swept else "llllrrr"
    return Section(
        f"{head}Gates", (Table(heads, tuple(rows), alignment, 0),), anchor="" if head else "run-gates"
    )


def _steps(run: Run, head: str) -> Section | None:
    rows = []
    for point in run.points:
        for step in point.steps:
            name = f"{point.name} / {step.id}" if point.name else step.id
            seconds = DASH if step.seconds is None else f"{step.seconds:,.1f}"
            rows.append((name, step.verb, step.status, seconds, "; ".join(found_by(step)) or DASH))
    if not rows or run.command == "diff":
        return None
    return Section(
        f"{head}Steps" if run.published is not None else f"{head}Result",
        (Table(("Step", "Command", "Status", "Seconds", "What it found"), tuple(rows), "lllrl"),),
        ""
        if run.published is None
        else "Seconds of a step that was unchanged are those of the run that made it.",
    )


def _sizes(run: Run, head: str) -> Section | None:
    rows: list[tuple[str, ...]] = []
    before: Size | None = None
    for point in run.points:
        sizes = point.sizes()
        first = sizes[0] if sizes else None
        for size in sizes:
            if size is first and size == before:  # points of a sweep begin with the same model
                continue
            made = size.name in {step.id for step in point.steps}
            name = f"{point.name} / {size.name}" if point.name and (made or size is not first) else size.name
            rows.append((name, amount(size.bytes, BYTES), _change(size, first, "bytes"), amount(size.parameters, COUNTS),
                         _change(size, first, "parameters"), _bits(size.bits_each), _bits(size.bits)))  # fmt: skip
        before = first
    if not rows:
        return None
    heads = (
        "Model",
        "Bytes",
        "Change",
        "Parameters",
        "Change",
        "Bits a parameter",
        "Bits of quantized matrices",
    )
    if all(row[-1] == DASH for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return Section(
        f"{head}Size",
        (Table(heads, tuple(rows), "lrrrrrr"),),
        "Changes are against the first line."
        if not any(p.name for p in run.points)
        else "Changes are against the model each point began with.",
    )


def _change(size: Size, first: Size | None, key: str) -> str:
    now, before = getattr(size, key), getattr(first, key)
    if size is first or now is None or not before:
        return DASH
    return minus(f"{100 * now / before - 100:+.1f}%")


def _bits(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


# ---- several models -----------------------------------------------------------------------------------


def _trade(found: Sequence[Candidate]) -> Section | None:
    count = len(tradeoff.scenes(found))
    if not count:
        return None

    def chart(number: int) -> Chart:
        return Chart(lambda wide: tradeoff.scenes(found, scatter.WIDE if wide else scatter.NARROW)[number])

    key = tradeoff.measure_of(found)
    rows = []
    for candidate in found:
        quality = candidate.quality.get(key or "")
        rows.append((candidate.name + (" (baseline)" if candidate.baseline else ""), DASH if quality is None else f"{quality.value:.1%}",
                     figure(candidate.tokens), DASH if candidate.speedup is None else f"{candidate.speedup:.2f}×",
                     amount(candidate.bytes, BYTES), amount(candidate.parameters, COUNTS)))  # fmt: skip
    heads = ("Model", tradeoff.heading(key or ""), "Mean tokens", "Speedup", "Bytes", "Parameters")
    shown = [i for i in range(len(heads)) if any(row[i] != DASH for row in rows)]
    table = Table(
        tuple(heads[i] for i in shown),
        tuple(tuple(row[i] for i in shown) for row in rows),
        "l" + "r" * (len(shown) - 1),
    )
    note = "Filled markers are on the Pareto front: no other model here is at least as good in both."
    if any(c.speedup is not None for c in found):
        note += " A speedup is against the model the command was given."
    return Section("What quality costs", (*map(chart, range(count)), table), note)


# ---- layers -------------------------------------------------------------------------------------------


def _known(run: Run) -> list[tuple[str, ByLayer]]:
    """Return what is known by layer of each model, published points first; equal ones once."""
    found: list[tuple[str, ByLayer]] = []
    for point in sorted(run.points, key=lambda p: not p.published):
        for step in point.steps:
            for name, known in by_layer(step):
                named = f"{point.name} / {name}" if point.name else name
                if known != ByLayer() and known not in [other for _, other in found]:
                    found.append((named, known))
    return found


def _layers(run: Run, head: str, known: Sequence[tuple[str, ByLayer]]) -> Iterable[Section]:
    drawable = [(name, one) for name, one in known if one.bars or one.heat]
    for name, one in drawable[:CHARTED]:
        blocks: list[Table | Chart | Listing] = [_bars_chart(chart) for chart in one.bars]
        blocks += [_heat_chart(one.heat)] if one.heat else []
        blocks += [_layer_table(one.bars)] if one.bars else []
        blocks += [Listing(tuple(("", note) for note in one.notes))] if one.notes else []
        title = "Layers" if name == run.command else f"Layers of {name}"
        yield Section(f"{head}{title}", tuple(blocks))
    rest = [
        (name, "not drawn: a report of this model alone shows its layers") for name, _ in drawable[CHARTED:]
    ]
    rest += [(name, note) for name, one in known if not (one.bars or one.heat) for note in one.notes]
    if rest:
        yield Section(f"{head}Layers that are not shown", (Listing(tuple(rest)),))


def _style(wide: bool) -> Style:
    return charts.WIDE if wide else charts.NARROW


def _bars_chart(chart: Bars) -> Chart:
    return Chart(lambda wide: charts.bars(chart, _style(wide)))


def _heat_chart(chart: Heat) -> Chart:
    said = "The stronger the colour, the more is lost (logarithmic scale); the number is the bits that were chosen."
    return Chart(lambda wide: charts.heat(chart, _style(wide)), said)


def _layer_table(found: Sequence[Bars]) -> Table:
    """Return the bars as a table, for where nothing is drawn."""
    each = [{bar.layer: bar for bar in chart.bars} for chart in found]
    rows = []
    for layer in sorted({layer for bars in each for layer in bars}):
        cells = [
            chart.written(bars[layer].value) if layer in bars else DASH
            for chart, bars in zip(found, each, strict=True)
        ]
        rows.append((str(layer), *cells))
    return Table(
        ("Layer", *(chart.title for chart in found)), tuple(rows), "r" * (1 + len(found)), page=False
    )


def _schemes(run: Run, head: str) -> Section | None:
    rows = []
    for name, step in named_steps(run):
        for scheme in map(mapping, sequence(step.document.get("schemes"))):
            rows.append((name, str(scheme.get("scheme")), figure(scheme.get("matrices")), amount(scheme.get("parameters"), COUNTS),
                         amount(scheme.get("bytes"), BYTES), _bits(number(scheme.get("bits")))))  # fmt: skip
    if not rows:
        return None
    heads = ("Step", "Scheme", "Matrices", "Parameters", "Bytes", "Bits a weight")
    return Section(f"{head}Schemes", (Table(heads, tuple(rows), "llrrrr"),))


def _calibration(run: Run, head: str, known: Sequence[tuple[str, ByLayer]]) -> Section | None:
    rows = coverage.rows(named_steps(run))
    blocks: list[Table | Chart | Listing] = []
    if rows:
        blocks.append(Table(coverage.HEADS, tuple(tuple(row) for row in rows), coverage.ALIGNMENT))
    reached = [("", said) for name, one in known for said in coverage.idle(name, one.idle)]
    if reached:
        blocks.append(Listing(tuple(reached)))
    return Section(f"{head}Calibration coverage", tuple(blocks)) if blocks else None


def named_steps(run: Run) -> list[tuple[str, Step]]:
    """Return the steps of all points with their names; those that points have in common once."""
    found: list[tuple[str, Step]] = []
    for point in run.points:
        for step in point.steps:
            if step.document and step.document not in [other.document for _, other in found]:
                found.append((f"{point.name} / {step.id}" if point.name else step.id, step))
    return found


# ---- words --------------------------------------------------------------------------------------------


def _sentences(run: Run, head: str) -> Section | None:
    items = [("warning", warning) for warning in run.warnings]
    items += [(name, note) for name, note in run.notes]
    return Section(f"{head}Warnings and notes", (Listing(tuple(items)),)) if items else None


def _made(run: Run, head: str) -> Section | None:
    """Return how the models were made, from the manifests that lie beside them."""
    rows = []
    for name, step in named_steps(run):
        made = manifest_of(step)
        if made is not None:
            inputs = "; ".join(
                " ".join(part for part in (i, f"({said})" if said else "", digests) if part)
                for i, said, digests in made.inputs
            )
            parameters = ", ".join(f"{k} {v}" for k, v in made.parameters)
            rows.append((name, made.method, inputs or DASH, parameters or DASH, made.plan[:12], made.program))
    if not rows:
        return None
    heads = ("Step", "Method", "Inputs", "Parameters", "Plan", "Program")
    note = "From the surgeon.json of each model that is still there; codes are the first digits of sha256 digests."
    return Section(f"{head}How they were made", (Table(heads, tuple(rows), "llllll"),), note)


def manifest_of(step: Step) -> Provenance | None:
    """Return what the manifest of a step's model says; None where that is not there or is another plan's."""
    if step.verb in ("eval", "measure", "diff"):
        return None
    places = (*step.folders, *(str(member.get("path")) for member in step.members))
    manifest = folders.read(places, folders.MANIFEST)
    plan = mapping(step.document.get("plan")).get("id")
    if manifest is None or (plan is not None and manifest.get("plan") != plan):
        return None
    return provenance.read(manifest)


BYTES = ("B", "kB", "MB", "GB", "TB")
COUNTS = ("", "K", "M", "B", "T")


def amount(value: Any, units: Sequence[str]) -> str:
    """Return a large number with its unit: 2.37 MB, 1.18M."""
    count = number(value)
    if count is None:
        return DASH
    space = " " if units[0] else ""
    for unit in units[:-1]:
        if abs(count) < 1000:
            return f"{count:.3g}{space}{unit}".strip()
        count /= 1000
    return f"{count:.3g}{space}{units[-1]}"


def figure(value: Any) -> str:
    """Return a number as it is read best, a dash where there is none."""
    found = number(value)
    if found is None:
        return DASH
    return minus(f"{found:,.0f}" if abs(found) >= 1e5 else f"{found:,.6g}")
