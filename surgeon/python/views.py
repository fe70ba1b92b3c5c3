"""What each command's document shows of itself in a notebook: what was done, sizes before and after, figures, gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.python.rendering import Grid, View
from surgeon.report.documents import number
from surgeon.report.layers import mapping, sequence
from surgeon.report.sections import BYTES, COUNTS, amount, figure

Data = Mapping[str, Any]
_VERDICTS = {
    "ok": "", "dry-run": "dry run: nothing was written", "failed": "failed", "gate-failed": "a gate failed"
}  # fmt: skip
_SHARES = ("accuracy", "cap_rate", "reflection_rate", "top1", "pass@")


def of(command: str, document: Data) -> View:
    """Return the view of a command's document; of one that is not known, its keys."""
    return _VIEWS.get(command, _anything)(document)


def size(value: Any) -> str:
    """Return bytes in decimal units: 2.37 MB."""
    return amount(value, BYTES)


def count(value: Any) -> str:
    """Return a number of parameters: 1.18M."""
    return amount(value, COUNTS)


def value_of(name: str, value: Any) -> str:
    """Return the figure of a metric: shares as percentages, bytes and parameters with their units."""
    found = number(mapping(value).get("value") if isinstance(value, Mapping) else value)
    if found is None:
        return "–"
    if name.startswith(_SHARES) or name.endswith("_accuracy"):
        return f"{100 * found:.1f} %"
    if name in ("bytes", "memory", "peak_memory_bytes"):
        return size(found)
    if name == "parameters":
        return count(found)
    if name.startswith("tokens"):
        return f"{found:,.1f}"
    return figure4(found)


def _verdict(document: Data) -> tuple[str, bool | None]:
    status = str(document.get("status", "ok"))
    if mapping(document.get("output")).get("unchanged") or document.get("unchanged"):
        return "unchanged: the result was already there, verified", None
    return _VERDICTS.get(status, status), False if status in ("failed", "gate-failed") else None


def _texts(document: Data, *keys: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(text) for key in keys for text in sequence(document.get(key))))


def _change(before: Any, after: Any) -> str:
    first, second = number(before), number(after)
    return "" if not first or second is None or first == second else f"{100 * (second / first - 1):+.1f} %"


def _gates(document: Data) -> Iterable[Grid]:
    gates = [mapping(gate) for gate in sequence(document.get("gates"))]
    if gates:
        rows = [("passed" if g.get("passed") else "FAILED", str(g.get("gate") or g.get("text")), figure(g.get("value")),
                 figure(g.get("threshold"))) for g in gates]  # fmt: skip
        failed = frozenset(n for n, gate in enumerate(gates) if not gate.get("passed"))
        yield Grid(("gate", "", "value", "threshold"), tuple(rows), texts=frozenset({0, 1}), failed=failed)


def _sizes(before: Data, after: Data, quality: Data, more: Iterable[tuple[str, str, str, str]] = ()) -> Grid:
    """Return one table of a model before and after: sizes, what was compared on held-out text, and ``more``."""
    rows = [
        (title, units(before.get(key)), units(after.get(key)), _change(before.get(key), after.get(key)))
        for title, key, units in (("weights", "bytes", size), ("parameters", "parameters", count))
        if number(after.get(key)) is not None
    ]
    pair = sequence(quality.get("perplexity"))
    if len(pair) == 2:
        rows.append(("perplexity, held out", figure4(pair[0]), figure4(pair[1]), _change(*pair)))
    for key, title in (("kl", "KL from the source, nats a token"), ("top1", "same first choice"), ("cosine", "cosine of embeddings")):  # fmt: skip
        if number(quality.get(key)) is not None:
            rows.append((title, "", value_of(key, quality[key]), ""))
    return Grid(("", "before", "after", "change"), (*rows, *more))


def figure4(value: Any) -> str:
    """Return a figure with four digits."""
    found = number(value)
    return "–" if found is None else f"{found:,.4g}" if abs(found) < 1e4 else f"{found:,.0f}"


# ---- commands that make a model ----------------------------------------------------------------------


def _merge(document: Data) -> View:
    plan, output = mapping(document.get("plan")), mapping(document.get("output"))
    own = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in mapping(plan.get("parameters_of_method")).items()
           if not isinstance(v, (dict, list)) and k != "int8_mask"]  # fmt: skip
    facts = [("models", ", ".join(map(str, sequence(plan.get("inputs"))))), ("settings", ", ".join(own))]
    for model, values in mapping(plan.get("parameters_of_models")).items():
        facts.append((f"of {model}", ", ".join(f"{k} {figure(v)}" for k, v in mapping(values).items() if number(v) is not None)))  # fmt: skip
    if plan.get("tensors") is not None:
        split = f" ({plan['merged']:,} merged, {plan['copied']:,} copied)" if "merged" in plan else ""
        facts.append(("tensors", f"{plan['tensors']:,}{split}"))
    facts.append(
        ("weights", f"{size(output.get('bytes'))}, {count(output.get('parameters'))} parameters")
        if output.get("bytes") is not None
        else ("weights", "")
    )
    update = mapping(mapping(document.get("metrics")).get("effective_update"))
    if update:
        facts.append(("update", f"{update['changed']:.1%} of entries differ, {update['kept']:.1%} kept"))
    facts += _written(document)
    verdict, good = _verdict(document)
    name = str(plan.get("method", "")).replace("_", "-")
    return View(f"merge {name}".strip(), verdict, good, _known(facts), (), _texts(document, "warnings"), _texts(document, "notes"))  # fmt: skip


def _prune(document: Data) -> View:
    source = mapping(document.get("model"))
    members = [mapping(one) for one in sequence(document.get("members"))]
    criterion = document.get("criterion")
    how = str(document.get("method") or "")
    how += f" ({criterion})" if criterion and criterion != document.get("method") else ""
    facts = [
        ("method", how.replace("_", "-")),
        ("target", ", ".join(map(str, sequence(document.get("targets"))))),
        ("before", str(source.get("shape") or "")),
    ]
    if len(members) == 1:
        facts.append(("after", str(members[0].get("shape") or "")))
        speed = _speed(members[0].get("speedup"))
        quality = mapping(members[0].get("quality")) or mapping(document.get("metrics"))
        grids = [_sizes(source, members[0], quality, [("speed", "1", speed, "")] if speed else ())]
    else:
        grids = [_family(source, members)] if members else []
    if document.get("workload"):
        facts.append(("timed", str(document["workload"])))
    remarks = tuple(str(text) for one in members for text in sequence(one.get("remarks")))
    verdict, good = _verdict(document)
    return View(
        f"prune {source.get('name', '')}", verdict, good, _known([*facts, *_written(document)]),
        (*grids, *_gates(document)), _texts(document, "warnings"), tuple(dict.fromkeys(remarks)),
    )  # fmt: skip


def _family(source: Data, members: Sequence[Data]) -> Grid:
    rows = [("source", size(source.get("bytes")), count(source.get("parameters")), "", "", "")]
    for one in members:
        quality = mapping(one.get("quality"))
        pair = sequence(quality.get("perplexity"))
        rows.append((str(one.get("name")), size(one.get("bytes")), count(one.get("parameters")), _speed(one.get("speedup")),
                     figure4(pair[1]) if len(pair) == 2 else "", figure4(quality["kl"]) if "kl" in quality else ""))  # fmt: skip
    return Grid(("member", "weights", "parameters", "speed", "perplexity", "KL"), tuple(rows))


def _speed(value: Any) -> str:
    found = mapping(value)
    ratio = number(found.get("value") if "value" in found else found.get("ratio") if found else value)
    if ratio is None:
        return ""
    low, high = number(found.get("low")), number(found.get("high"))
    return f"× {ratio:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else "")


def _quantize(document: Data) -> View:
    source, output = mapping(document.get("model")), mapping(document.get("output"))
    target = mapping(document.get("target"))
    facts = [
        ("method", f"{document.get('method')}, {document.get('format')} for {document.get('runtime')}"),
        ("target", ", ".join(f"{name} {figure(value)}" for name, value in target.items())),
    ]
    reading = mapping(document.get("reading"))
    if reading.get("reader"):
        facts.append(("loaded by", f"{reading['reader']} {mapping(reading.get('versions')).get('transformers', '')}".strip()))  # fmt: skip
    bits = number(output.get("bits"))
    more = [("bits per weight of linear matrices", "", f"{bits:.3f}", "")] if bits is not None else []
    quality = mapping(document.get("quality")) or mapping(document.get("metrics"))
    grids = [_sizes(source, output, quality, more)]
    rows = tuple(
        (str(row.get("scheme")), f"{row.get('matrices', 0):,}", count(row.get("parameters")), f"{row.get('bits', 0):.3f}", size(row.get("bytes")))
        for row in map(mapping, sequence(document.get("schemes")))
    )  # fmt: skip
    if rows:
        grids.append(Grid(("scheme", "matrices", "parameters", "bits", "weights"), rows))
    verdict, good = _verdict(document)
    return View(
        f"quantize {source.get('name', '')}", verdict, good, _known([*facts, *_written(document)]),
        (*grids, *_gates(document)), _texts(document, "warnings"), _texts(document, "remarks"),
    )  # fmt: skip


def _edit(document: Data) -> View:
    found = mapping(document.get("edit"))
    facts: list[tuple[str, str]] = [("method", str(found.get("method") or ""))]
    direction = mapping(found.get("direction"))
    if direction:
        long, short = (*sequence(direction.get("examples")), "", "")[:2]
        facts.append(("direction", f"{direction.get('site')}, from {long} long and {short} short examples"))
    if number(found.get("strength")) is not None:
        facts.append(("strength", f"{found['strength']:g}"))
    if found.get("heads"):
        facts.append(("heads", f"{len(found['heads'])} of {found.get('heads_total', '?')}"))
    if found.get("matrices"):
        facts.append(("matrices", f"{len(found['matrices'])}"))
    if number(found.get("gamma")) is not None:
        facts.append(("shift", f"layer {found.get('layer')} by {found['gamma']:.4g}"))
    if found.get("scales"):
        facts.append(("experts", ", ".join(f"{s['layer']}:{s['expert']} by {s['factor']:g}" for s in found["scales"])))  # fmt: skip
    if found.get("changed"):
        facts.append(("tensors changed", f"{len(found['changed']):,}; all others are the source's, byte for byte"))  # fmt: skip
    quality = mapping(found.get("quality"))
    rows = []
    if quality:
        pair = quality.get("perplexity_before"), quality.get("perplexity_after")
        rows = [("perplexity, neutral text", figure4(pair[0]), figure4(pair[1]), _change(*pair)),
                ("KL from the source, nats a token", "", figure4(quality.get("kl")), "")]  # fmt: skip
    grids = [Grid(("", "before", "after", "change"), tuple(rows))] if rows else []
    heads = tuple(
        (f"layer {h.get('layer')}", f"{h.get('head')}", figure4(h.get("score")), figure4(h.get("before")), figure4(h.get("after")))
        for h in map(mapping, sequence(found.get("heads")))
    )  # fmt: skip
    if heads:
        grids.append(Grid(("head of", "head", "score", "|v'W| before", "after"), heads))
    verdict, good = _verdict(document)
    return View("edit", verdict, good, _known([*facts, *_written(document)]), tuple(grids), _texts(document, "warnings"),
                _texts(document, "notes"))  # fmt: skip


def _export(document: Data) -> View:
    source, output = mapping(document.get("model")), mapping(document.get("output"))
    what = f"member {document['member']}" if document.get("member") else str(document.get("to"))
    facts = [("loads in", ", ".join(map(str, sequence(document.get("readers")))))]
    checked = mapping(document.get("check"))
    if "largest_difference" in checked:
        facts.append(("compared", f"after {checked.get('prompts')} prompts log-probabilities differ by at most {checked['largest_difference']:.1e}"))  # fmt: skip
    verdict, good = _verdict(document)
    return View(f"export {source.get('name', '')} to {what}", verdict, good, _known([*facts, *_written(document)]),
                (_sizes(source, output, {}),), _texts(document, "warnings"), _texts(document, "notes"))  # fmt: skip


def _run(document: Data) -> View:
    recipe = mapping(document.get("recipe"))
    points = [mapping(p) for p in sequence(document.get("points"))] or [document]
    grids: list[Grid] = []
    for point in points:
        results = mapping(point.get("results"))
        rows = []
        for step in map(mapping, sequence(point.get("steps"))):
            seconds = number(step.get("seconds"))
            rows.append((str(step.get("id")), str(step.get("verb")), str(step.get("status")), "" if seconds is None else f"{seconds:.1f}",
                         _figures(mapping(results.get(str(step.get("id")))))))  # fmt: skip
        title = str(point.get("name") or "") if point is not document else ""
        grids.append(Grid(("step", "verb", "status", "seconds", "result"), tuple(rows), title, frozenset({0, 1, 2, 4})))  # fmt: skip
        grids += _gates(point)
    verdict, good = _verdict(document)
    if not verdict and document.get("published"):
        verdict, good = "published", True
    return View(f"run {recipe.get('name', 'recipe')}", verdict, good, _known(_written(document)), tuple(grids), _texts(document, "warnings"))  # fmt: skip


_OF_STEPS = ("bytes", "parameters", "bits", "speedup", "accuracy", "tokens_mean", "perplexity", "kl")


def _figures(metrics: Data) -> str:
    return ", ".join(f"{name} {value_of(name, value)}" for name, value in metrics.items()
                     if (name in _OF_STEPS or name.endswith("_accuracy")) and number(mapping(value).get("value") if isinstance(value, Mapping) else value) is not None)  # fmt: skip


# ---- commands that measure ---------------------------------------------------------------------------


def _eval(document: Data) -> View:
    model, settings, data = (mapping(document.get(key)) for key in ("model", "settings", "data"))
    facts = [
        ("model", f"{count(model.get('parameters'))} parameters, {size(model.get('bytes'))} {model.get('dtype', '')}")
    ]  # fmt: skip
    if "questions" in data:
        how = "greedy" if not settings.get("temperature") else f"{settings.get('samples_per_question')} samples a question"  # fmt: skip
        facts.append(("questions", f"{data['questions']:,} of {data.get('name')}, {how}"))
    before = mapping(document.get("baseline"))
    header = ["metric", "value", "95 % interval"] + ([f"baseline {before.get('name', '')}", "change"] if before else [])  # fmt: skip
    rows = []
    for name, metric in mapping(document.get("metrics")).items():
        found = mapping(metric)
        row = [name, value_of(name, metric), _interval(name, found)]
        if before:
            other = mapping(mapping(before.get("metrics")).get(name))
            row += [value_of(name, other), _change(other.get("value"), found.get("value"))]
        rows.append(tuple(row))
    verdict, good = _verdict(document)
    if not verdict and document.get("gates"):
        verdict, good = "all gates passed", True
    return View(f"eval {model.get('name', '')}", verdict, good, _known(facts), (Grid(tuple(header), tuple(rows)), *_gates(document)),
                _texts(document, "warnings"), _texts(document, "notes"))  # fmt: skip


def _interval(name: str, metric: Data) -> str:
    if number(metric.get("low")) is None or number(metric.get("high")) is None:
        return ""
    return f"{value_of(name, metric['low'])} to {value_of(name, metric['high'])}"


def _measure(document: Data) -> View:
    model, metrics = mapping(document.get("model")), mapping(document.get("metrics"))
    before = mapping(document.get("baseline"))
    facts = [
        ("model", f"{count(model.get('parameters'))} parameters, {size(model.get('bytes'))}"),
        ("against", str(before.get("name") or "")),
        ("workload", str(mapping(document.get("workload")).get("sentence") or "")),
        ("environment", str(mapping(document.get("environment")).get("sentence") or "")),
    ]
    rows = []
    for name, metric in metrics.items():
        found = mapping(metric)
        if name == "memory" or name == "baseline_memory":
            rows += [(f"{name.replace('_', ' ')}, {part}", size(bytes_), "") for part, bytes_ in found.items() if number(bytes_) is not None]  # fmt: skip
        elif name.endswith("seconds"):
            title = name.removesuffix("seconds").rstrip("_") or "whole workload"
            rows.append((f"{title}, ms", _ms(found.get("value")), _span(found, _ms)))
        elif number(found.get("value")) is not None:
            rows.append((name, f"{found['value']:.3f}", _span(found, lambda v: f"{v:.3f}")))
    grids = [Grid(("", "value", "95 % interval"), tuple(rows))] if rows else []
    if "table" in document:
        grids.append(_latencies(mapping(document["table"])))
    verdict, good = _verdict(document)
    return View(f"measure {model.get('name', '')}", verdict, good, _known(facts), tuple(grids), _texts(document, "warnings"),
                _texts(document, "notes"))  # fmt: skip


def _latencies(table: Data) -> Grid:
    seconds = mapping(table.get("seconds"))
    rows = [(f"attention {e.get('heads')}/{e.get('groups')}", _ms(e.get("seconds"))) for e in map(mapping, sequence(seconds.get("attention")))]  # fmt: skip
    rows += [(f"ffn {e.get('width')}", _ms(e.get("seconds"))) for e in map(mapping, sequence(seconds.get("ffn")))]  # fmt: skip
    rows += [("rest of the model", _ms(seconds.get("rest"))), (f"whole model, {table.get('layers')} layers", _ms(seconds.get("dense")))]  # fmt: skip
    return Grid(("one layer", "ms"), tuple(rows))


def _ms(seconds: Any) -> str:
    found = number(seconds)
    return "–" if found is None else f"{1000 * found:,.4g}"


def _span(metric: Data, text: Callable[[Any], str]) -> str:
    low, high = number(metric.get("low")), number(metric.get("high"))
    return "" if low is None or high is None else f"{text(low)} to {text(high)}"


# ---- commands that say something -----------------------------------------------------------------------


def _methods(document: Data) -> View:
    family = str(document.get("family") or "")
    one = mapping(document.get("method") or document.get("adjustment"))
    if one:
        facts = [("family", family), ("summary", str(one.get("summary") or "")), ("reference", str(one.get("reference") or "")),
                 ("sparsity counts", str(one.get("sparsity") or "")), ("criteria", ", ".join(map(str, sequence(one.get("criteria")))))]  # fmt: skip
        rows = tuple(
            (str(p.get("name")), str(p.get("default")), str(p.get("range") or ", ".join(map(str, sequence(p.get("choices")))) or p.get("kind")),
             str(p.get("help")))
            for p in map(mapping, sequence(one.get("parameters")))
        )  # fmt: skip
        grids = (Grid(("parameter", "default", "values", "meaning"), rows, texts=frozenset({0, 2, 3})),) if rows else ()  # fmt: skip
        return View(f"method {one.get('name')}", "", None, _known(facts), grids, (), _texts({"page": [one["page"]]} if one.get("page") else {}, "page"))  # fmt: skip
    rows = tuple((str(m.get("name")), str(m.get("summary"))) for m in map(mapping, sequence(document.get("methods"))))  # fmt: skip
    return View(
        f"methods of {family}", grids=(Grid(("method", "what it does"), rows, texts=frozenset({0, 1})),)
    )


def _doctor(document: Data) -> View:
    e, numba = mapping(document.get("environment")), mapping(document.get("numba"))
    facts = [
        ("surgeon", f"{e.get('surgeon')}, Python {e.get('python')}, {e.get('system')}"),
        ("cores", f"{e.get('cores')} ({e.get('logical_cores')} logical)"),
        ("memory", f"{size(e.get('memory_free_bytes'))} free of {size(e.get('memory_bytes'))}"),
        ("disk", f"{size(e.get('disk_free_bytes'))} free in {e.get('folder')}"),
        ("compiled kernels", "usable" if numba.get("usable") else f"not usable: {numba.get('reason')}"),
    ]
    packages = [mapping(p) for p in sequence(document.get("packages"))]
    rows = tuple((str(p.get("name")), str(p.get("found") or "missing"), str(p.get("needed")), str(p.get("purpose"))) for p in packages)  # fmt: skip
    failed = frozenset(n for n, p in enumerate(packages) if not p.get("ok"))
    grids = [Grid(("package", "found", "needed", "for"), rows, texts=frozenset({0, 3}), failed=failed)]
    abilities = sequence(mapping(document.get("model")).get("abilities"))
    if abilities:
        can = tuple((str(a.get("what")), "yes" if a.get("possible") else "no", str(a.get("detail"))) for a in map(mapping, abilities))  # fmt: skip
        grids.append(Grid(("with the model", "possible", ""), can, texts=frozenset({0, 1, 2})))
    return View("doctor", facts=_known(facts), grids=tuple(grids))


def _explain(document: Data) -> View:
    page = mapping(document.get("page"))
    if page:
        facts = [("meaning", str(page.get("meaning"))), ("when", str(page.get("when"))), ("fix", str(page.get("fix"))),
                 ("example", "  ".join(map(str, sequence(page.get("example")))))]  # fmt: skip
        return View(f"{page.get('code')}: {page.get('title')}", facts=_known(facts))
    grids = tuple(
        Grid(("code", "what it means"), tuple((str(c["code"]), str(c["title"])) for c in sequence(g.get("codes"))), str(g.get("title")), frozenset({0, 1}))
        for g in map(mapping, sequence(document.get("groups")))
    )  # fmt: skip
    return View("error codes", grids=grids)


def _clean(document: Data) -> View:
    removed = set(map(str, sequence(document.get("removed"))))
    rows = tuple(
        (str(i.get("path")), str(i.get("kind")), size(i.get("bytes")), "removed" if str(i.get("path")) in removed else "there")
        for i in map(mapping, sequence(document.get("leftovers")))
    )  # fmt: skip
    grids = (Grid(("leftover", "kind", "size", ""), rows, texts=frozenset({0, 1, 3})),) if rows else ()
    notes = tuple(
        f"a run is writing {path}; its files are left alone" for path in sequence(document.get("live"))
    )
    notes += tuple(f"restored {path}" for path in sequence(document.get("restored")))
    return View(
        f"clean {document.get('folder', '')}", "" if rows else "nothing to clean", grids=grids, notes=notes
    )


def _anything(document: Data) -> View:
    facts = [
        (str(key), str(value)) for key, value in document.items() if isinstance(value, (str, int, float))
    ]
    return View("result", facts=_known(facts), warnings=_texts(document, "warnings"))


def _written(document: Data) -> list[tuple[str, str]]:
    """Return where models lie."""
    output = mapping(document.get("output"))
    models = [str(path) for path in mapping(output.get("models")).values()] or [str(output.get("path") or "")]
    seconds = number(document.get("seconds"))
    word = "would write" if document.get("status") == "dry-run" else "output"
    names = ", ".join(str(Path(path)) for path in models if path)
    return [(word, names), *([("took", f"{seconds:,.1f} s")] if seconds else [])]


def _known(facts: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in facts if value)


_VIEWS: dict[str, Callable[[Data], View]] = {
    "merge": _merge, "prune": _prune, "quantize": _quantize, "edit": _edit, "export": _export, "run": _run, "eval": _eval,
    "measure": _measure, "methods": _methods, "doctor": _doctor, "explain": _explain, "clean": _clean,
}  # fmt: skip
