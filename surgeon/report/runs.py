"""Documents of runs and of single commands, brought into one form: points, their steps, what each one found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.report import figures, folders, layers
from surgeon.report.documents import number
from surgeon.report.layers import ByLayer, mapping, sequence


@dataclass(frozen=True)
class Step:
    """One step; of a single command's document the command.

    Attributes:
        folders: where its model lies or lay, the most certain place first.
        later: folders of models made from it, which carry what it kept.
    """

    id: str
    verb: str
    status: str
    seconds: float | None
    document: Mapping[str, Any]
    folders: tuple[str, ...] = ()
    later: tuple[str, ...] = ()

    @property
    def members(self) -> list[Mapping[str, Any]]:
        """Models of a family that one pruning made."""
        return [mapping(member) for member in sequence(self.document.get("members"))]


@dataclass(frozen=True)
class Size:
    """Bytes and parameters of one model; ``bits`` of its quantized matrices."""

    name: str
    bytes: float | None
    parameters: float | None
    bits: float | None = None

    @property
    def bits_each(self) -> float | None:
        return 8 * self.bytes / self.parameters if self.bytes and self.parameters else None


@dataclass(frozen=True)
class Point:
    """The steps of a recipe, or of one point of its sweep."""

    name: str
    values: Mapping[str, Any]
    steps: tuple[Step, ...]
    gates: tuple[Mapping[str, Any], ...]
    passed: bool | None
    published: bool

    def sizes(self) -> list[Size]:
        """Return the model before, then what each step made of it."""
        found: list[Size] = []
        for step in self.steps:
            model, output = mapping(step.document.get("model")), mapping(step.document.get("output"))
            if not found and step.verb != "eval" and model.get("bytes") is not None:
                found.append(_size(str(model.get("name")), model))
            if len(step.members) > 1:
                found += [_size(f"{step.id}: {m.get('name')}", m) for m in step.members]
            elif number(output.get("bytes")) is not None and step.verb not in ("eval", "measure"):
                found.append(_size(step.id, output))
        return [*self._before(found), *found]

    def _before(self, found: Sequence[Size]) -> Iterable[Size]:
        """Yield what the result is compared with, where a step says it and no model is named so already."""
        baseline = self.baseline
        if number(baseline.get("bytes")) is not None and str(baseline.get("name")) not in {
            s.name for s in found
        }:
            yield _size(f"{baseline.get('name')} (baseline)", baseline)

    @property
    def baseline(self) -> Mapping[str, Any]:
        compared = [mapping(step.document.get("baseline")) for step in self.steps if step.verb == "eval"]
        return next((b for b in reversed(compared) if b), {})


@dataclass(frozen=True)
class Run:
    """What one document says.

    Attributes:
        published: None where the document is not one of ``surgeon run``.
    """

    command: str
    name: str
    status: str
    document: Mapping[str, Any]
    points: tuple[Point, ...]
    published: bool | None
    warnings: tuple[str, ...]
    notes: tuple[tuple[str, str], ...] = ()
    error: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Finished evaluations, named by their point where a sweep has several."""
        found = []
        for point in self.points:
            for step in point.steps:
                if step.verb == "eval" and step.document.get("status") in ("ok", "gate-failed"):
                    document = dict(step.document)
                    if point.name:
                        document["model"] = {**mapping(document.get("model")), "name": point.name}
                    found.append(document)
        return found


def _size(name: str, entry: Mapping[str, Any]) -> Size:
    return Size(name, number(entry.get("bytes")), number(entry.get("parameters")), number(entry.get("bits")))


def tell(document: Mapping[str, Any]) -> Run:
    """Return what a checked document says (`surgeon.report.documents.validate`)."""
    command = str(document["command"])
    error = mapping(document.get("error"))
    warnings = tuple(map(str, sequence(document.get("warnings"))))
    status = str(document.get("status"))
    if command == "run":
        plain = [mapping(p) for p in sequence(document.get("points"))] or [document]
        points = tuple(_point(p, document) for p in plain)
        name = str(mapping(document.get("recipe")).get("name") or "recipe")
        published = bool(document.get("published"))
    else:
        path = mapping(document.get("output")).get("path")
        points = (Point("", {}, (_step({"id": command, "verb": command, "status": status, "document": document,
                                        "seconds": document.get("seconds")}),), (), None, False),)  # fmt: skip
        name, published = Path(str(path)).name if path else command, None
        if command == "diff":
            name = " and ".join(Path(str(m)).name for m in sequence(document.get("models")))
    notes = tuple(
        (step.id, str(note))
        for point in points
        for step in point.steps
        if step.verb != "eval"
        for note in _notes(step.document)
    )
    return Run(
        command, name, status, document, points, published, warnings, tuple(dict.fromkeys(notes)), error
    )


def _notes(document: Mapping[str, Any]) -> Iterable[Any]:
    yield from sequence(document.get("notes"))
    yield from sequence(document.get("remarks"))
    for member in sequence(document.get("members")):
        yield from sequence(mapping(member).get("remarks"))


def _point(entry: Mapping[str, Any], whole: Mapping[str, Any]) -> Point:
    steps = [_step(mapping(step)) for step in sequence(entry.get("steps"))]
    published = entry.get("path") if entry is not whole else mapping(whole.get("output")).get("path")
    found = []
    for index, step in enumerate(steps):
        # What a model carries of its ancestors is that of the last pruning.
        after = list(itertools.takewhile(lambda s: s.verb != "prune", steps[index + 1 :]))
        later = list(itertools.chain.from_iterable(s.folders for s in after))
        later += [str(published)] if published and len(after) == len(steps) - index - 1 else []
        found.append(
            Step(step.id, step.verb, step.status, step.seconds, step.document, step.folders, tuple(later))
        )
    gates = tuple(mapping(gate) for gate in sequence(entry.get("gates")))
    passed = entry.get("passed") if entry is not whole else None
    return Point(
        str(entry.get("name") or "") if entry is not whole else "", mapping(entry.get("values")), tuple(found), gates,
        passed if isinstance(passed, bool) else None, bool(entry.get("published")),
    )  # fmt: skip


def _step(entry: Mapping[str, Any]) -> Step:
    document = mapping(entry.get("document"))
    places = [entry.get("path"), mapping(document.get("output")).get("path")]
    return Step(
        str(entry.get("id")), str(entry.get("verb")), str(entry.get("status")), number(entry.get("seconds")), document,
        tuple(dict.fromkeys(str(p) for p in places if isinstance(p, str) and p)),
    )  # fmt: skip


def evaluations(documents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the results of eval in documents: those of steps, and those that were given alone last."""
    plain = [d for d in documents if d.get("command") == "eval"]
    return [*(e for d in documents if d.get("command") != "eval" for e in tell(d).evaluations), *plain]


def gates(documents: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return which gates hold: those of runs, of their evaluations, and of results of eval."""
    found = [g for d in documents if d.get("command") != "eval" for p in tell(d).points for g in p.gates]
    found += [mapping(g) for d in evaluations(documents) for g in sequence(d.get("gates"))]
    return [bool(gate.get("passed")) for gate in found]


# ---- by layer -----------------------------------------------------------------------------------------


def by_layer(step: Step) -> list[tuple[str, ByLayer]]:
    """Return what is known of the layers of a step's model, or of each model of its family."""
    if step.verb == "quantize":
        plan = folders.read(step.folders, folders.PLAN)
        if plan is None:
            return [(step.id, _gone(step, folders.PLAN, "bits and errors"))]
        return [(step.id, layers.of_plan(plan))]
    if step.verb == "prune":
        before = str(mapping(step.document.get("model")).get("shape") or "")
        several = len(step.members) > 1
        places = [(f"{step.id}: {m.get('name')}", (str(m.get("path")),)) for m in step.members if several]
        found = []
        for name, where in places or [(step.id, (*step.folders, *step.later))]:
            pruning = folders.read(where, folders.PRUNING)
            known = _gone(step, folders.PRUNING, "what each layer keeps") if pruning is None else None
            found.append((name, known or layers.of_pruning(pruning or {}, before)))
        return found
    if step.verb == "diff":
        return [(step.id, layers.of_diff(step.document))]
    return []


def _gone(step: Step, file: str, what: str) -> ByLayer:
    if step.document.get("status") != "ok":
        return ByLayer()
    return ByLayer(notes=(f"{what}: not known, no {file} lies in {step.folders[0] if step.folders else 'its folder'}",))  # fmt: skip


# ---- in words -----------------------------------------------------------------------------------------


def found_by(step: Step) -> list[str]:
    """Return what a step measured, in words."""
    metrics = mapping(step.document.get("metrics"))
    if step.verb == "eval":
        return list(_evaluated(metrics, mapping(mapping(step.document.get("baseline")).get("metrics"))))
    said = []
    method = step.document.get("method") or mapping(step.document.get("plan")).get("method")
    if isinstance(method, str):
        said.append(method.replace("_", "-"))
    members = step.members
    if len(members) == 1 and isinstance(members[0].get("shape"), str):
        said.append(members[0]["shape"])
    schemes = [mapping(s) for s in sequence(step.document.get("schemes"))]
    said += [f"{s.get('matrices')} × {s.get('scheme')}" for s in schemes]
    said += measured(metrics)
    for member in members if len(members) > 1 else ():
        said.append(f"{member.get('name')}: {', '.join(measured(_of_member(member))) or member.get('shape')}")
    return said


def _of_member(member: Mapping[str, Any]) -> dict[str, Any]:
    return {**mapping(member.get("quality")), "speedup": mapping(member.get("speedup"))}


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """Return the figures of a command that changes a model, in words."""
    said = []
    speed = mapping(metrics.get("speedup"))
    if (achieved := speedup_of(metrics)) is not None:
        predicted, spread = number(speed.get("predicted")), number(speed.get("spread"))
        said.append(f"speedup {achieved:.2f}×" + (f" ± {spread:.2f}" if spread is not None else "")
                    + (f" (predicted {predicted:.2f}×)" if predicted is not None else ""))  # fmt: skip
    elif (predicted := number(speed.get("predicted"))) is not None:
        said.append(f"speedup {predicted:.2f}× predicted, not measured")
    pair = [number(v) for v in sequence(metrics.get("perplexity"))]
    if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
        said.append(f"perplexity {pair[0]:,.5g} → {pair[1]:,.5g}")
    for key, word, form in (("kl", "KL", "{:.4g}"), ("top1", "top-1 agreement", "{:.1%}"),
                            ("cosine", "cosine", "{:.4f}"), ("nmse", "NMSE", "{:.4g}")):  # fmt: skip
        if (value := number(metrics.get(key))) is not None:
            said.append(f"{word} {form.format(value)}")
    return said


def _evaluated(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> Iterable[str]:
    for key, entry in metrics.items():
        value, other = value_of(entry), value_of(before.get(key))
        if value is None:
            continue
        kind = figures.metric(key)
        places = figures.decimals(kind.kind, [value, other or 0.0])
        against = f" (baseline {figures.written(other, kind.kind, places)})" if other is not None else ""
        yield f"{kind.heading} {figures.written(value, kind.kind, places)}{against}"


def value_of(entry: Any) -> float | None:
    """Return a metric's value: a number, or an object that has one."""
    return number(entry.get("value")) if isinstance(entry, Mapping) else number(entry)


def speedup_of(metrics: Mapping[str, Any]) -> float | None:
    """Return a speedup that was measured."""
    speed = mapping(metrics.get("speedup"))
    found = number(speed.get("measured"))
    return number(speed.get("value")) if found is None else found
