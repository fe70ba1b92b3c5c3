"""Several models at a glance: quality against speed and against size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgeon.report import figures, scatter
from surgeon.report.documents import number
from surgeon.report.figures import Measure
from surgeon.report.layers import mapping
from surgeon.report.pareto import Point as Place
from surgeon.report.runs import Point, Run, Step, speedup_of
from surgeon.report.scatter import Dot, Plane, Scene, Style

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
TASK = ("exact_match,strict-match", "exact_match", "acc", "exact_match,flexible-extract", "acc_norm")
"""Metrics of tasks that are shares of right answers, the first one that is there."""

AGREEMENT = "top1:"
"""Begins the name of a share of equal first choices; the model it agrees with follows, for others do not compare."""


@dataclass(frozen=True)
class Candidate:
    """One model with what is known of it; ``quality`` by the name of the measure."""

    name: str
    series: str
    quality: Mapping[str, Measure]
    tokens: float | None = None
    speedup: float | None = None
    bytes: float | None = None
    parameters: float | None = None
    baseline: bool = False


def candidates(runs: Sequence[Run], evaluations: Sequence[Mapping[str, Any]] = ()) -> list[Candidate]:
    """Return the models of runs, of single commands and of results of eval, and what they are compared with."""
    found: list[Candidate] = []
    for run in runs:
        for point in run.points:
            found += _of_point(run, point)
    for document in evaluations:
        model = mapping(document.get("model"))
        found.append(Candidate(str(model.get("name")), "results", _quality(document), *_tokens(document), None,
                               number(model.get("bytes")), number(model.get("parameters"))))  # fmt: skip
    baselines = [p.baseline for r in runs for p in r.points] + [
        mapping(d.get("baseline")) for d in evaluations
    ]
    for baseline in baselines:
        named = [i for i, c in enumerate(found) if c.name == str(baseline.get("name"))]
        if named:
            found[named[0]] = replace(found[named[0]], baseline=True)
        elif baseline:
            found.append(Candidate(str(baseline.get("name")), "other models", _quality(baseline), *_tokens(baseline), None,
                                   number(baseline.get("bytes")), number(baseline.get("parameters")), True))  # fmt: skip
    return list(_apart(found))


def _of_point(run: Run, point: Point) -> Iterable[Candidate]:
    if run.command in ("diff", "measure", "export"):
        return
    name = point.name or run.name
    last = next((s for s in reversed(point.steps) if s.verb not in ("eval", "measure") and s.document), None)
    if last is not None and len(last.members) > 1:
        for member in last.members:
            speed = {"speedup": mapping(member.get("speedup"))}
            yield Candidate(f"{name} {member.get('name')}", run.name, _own(mapping(member.get("quality")), last), None, speedup_of(speed),
                            number(member.get("bytes")), number(member.get("parameters")))  # fmt: skip
        return
    scores = [s.document for s in point.steps if s.verb == "eval"]
    quality: dict[str, Measure] = {}
    if last is not None:
        quality |= (
            _own(mapping(last.document.get("metrics")), last)
            if last.verb in ("prune", "quantize", "edit")
            else {}
        )
    tokens = None
    for document in scores:
        quality |= _quality(document)
        tokens = _tokens(document)[0] or tokens
    speeds = [
        s for step in point.steps if (s := speedup_of(mapping(step.document.get("metrics")))) is not None
    ]
    output = mapping(last.document.get("output")) if last is not None else {}
    yield Candidate(name, run.name, quality, tokens, speeds[-1] if speeds else None, number(output.get("bytes")),
                    number(output.get("parameters")))  # fmt: skip


def _quality(document: Mapping[str, Any]) -> dict[str, Measure]:
    """Return shares of an evaluation that say how good a model is."""
    metrics = mapping(document.get("metrics"))
    found = {
        key: measure for key in ("accuracy", "top1_agreement") if (measure := Measure.read(metrics.get(key)))
    }
    tasks: dict[str, dict[str, Any]] = {}
    for key, entry in metrics.items():
        if key.startswith("task:"):
            task, _, name = key.removeprefix("task:").partition(":")
            tasks.setdefault(task, {})[name] = entry
    for task, known in tasks.items():
        name = next((name for name in TASK if name in known), None)
        measure = Measure.read(known[name]) if name is not None else None
        if measure is not None:
            found[f"task:{task}"] = measure
    return found


def _own(metrics: Mapping[str, Any], step: Step) -> dict[str, Measure]:
    """Return what a command measured itself: agreement with the model it changed."""
    value, before = number(metrics.get("top1")), mapping(step.document.get("model")).get("name")
    return {} if value is None or before is None else {f"{AGREEMENT}{before}": Measure(value)}


def _tokens(document: Mapping[str, Any]) -> tuple[float | None]:
    measure = Measure.read(mapping(document.get("metrics")).get("tokens_mean"))
    return (None if measure is None else measure.value,)


def _apart(found: Sequence[Candidate]) -> Iterable[Candidate]:
    """Number candidates that share a name, equal ones left out; the first keeps it."""
    seen: list[Candidate] = []
    for candidate in found:
        if candidate in seen:
            continue
        seen.append(candidate)
        taken = sum(other.name == candidate.name for other in seen)
        yield candidate if taken == 1 else replace(candidate, name=f"{candidate.name} ({taken})")


def measure_of(found: Sequence[Candidate]) -> str | None:
    """Return the quality to plot: the one that most models have, accuracy before others."""
    keys = dict.fromkeys(key for candidate in found for key in candidate.quality)
    ranked = sorted(keys, key=lambda k: (k != "accuracy", not k.startswith("task:"), k))
    return max(ranked, key=lambda k: sum(k in c.quality for c in found), default=None)


def heading(key: str) -> str:
    """Return what a quality is called."""
    if key.startswith(AGREEMENT):
        return f"Top-1 agreement with {key.removeprefix(AGREEMENT)}"
    return (
        f"Accuracy on {key.removeprefix('task:')}" if key.startswith("task:") else figures.metric(key).heading
    )


def scenes(found: Sequence[Candidate], style: Style = scatter.WIDE) -> list[Scene]:
    """Return quality against speedup and against size, as far as at least two models have both and differ."""
    key = measure_of(found)
    if key is None:
        return []
    largest = max((c.bytes or 0.0 for c in found), default=0.0)
    scale, unit = next(((s, u) for s, u in UNITS if largest >= s), UNITS[-1])
    word = heading(key)
    drawn = []
    for right, what, more, order, sign, values in (
        ("Speedup", "speedup", True, "fastest first", "×", [c.speedup for c in found]),
        (f"Size in {unit}", "size", False, "smallest first", "", [None if c.bytes is None else c.bytes / scale for c in found]),
    ):  # fmt: skip
        plane = Plane(word, right, more, order, sign)
        placed = [(c, v) for c, v in zip(found, values, strict=True) if v is not None and key in c.quality]
        if len({v for _, v in placed}) < 2:
            continue
        series = tuple(dict.fromkeys(c.series for c, _ in placed))
        dots = [_dot(c, v, key, sign or f" {unit}", series.index(c.series)) for c, v in placed]
        drawn.append(scatter.layout(dots, series, style=style, plane=plane, title=f"{word} against {what}"))
    return drawn


def _dot(candidate: Candidate, value: float, key: str, unit: str, series: int) -> Dot:
    quality = candidate.quality[key]
    said = f"{figures.written(quality.value, 'percent', 1)}, {value:,.4g}{unit}"
    place = Place(value, quality.value, None, None, quality.low, quality.high)
    return Dot(candidate.name, place, series, candidate.baseline, said)
