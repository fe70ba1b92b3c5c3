"""What `inspect`, `diff` and `verify` show of themselves in a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgeon.python.rendering import Grid, View
from surgeon.python.views import count, figure4, size


def of_inspection(found: Any) -> View:
    """Return the view of an `surgeon.api.Inspection`."""
    s = found.summary
    shape = ", ".join(f"{name} {value}" for name, value in s.sizes.items())
    kinds = ", ".join(f"{code} {entry['tensors']:,}" for code, entry in s.dtypes.items())
    facts = [
        ("family", f"{s.family or 'unknown'}{f' ({shape})' if shape else ''}"),
        ("parameters", count(s.parameters)),
        ("weights", f"{size(s.bytes)} in {s.files} file{'s' if s.files != 1 else ''}"),
        ("tensors", f"{s.tensors:,} ({kinds})"),
        ("quantized", str(s.quantization.words if s.quantization else s.quantized or "")),
        ("missing", ", ".join(s.missing) if s.kind == "folder" else ""),
    ]
    if s.manifest:
        made = " ".join(str(s.manifest[k]) for k in ("verb", "method") if s.manifest.get(k))
        facts.append(("made by", f"surgeon {s.manifest.get('program')}: {made}"))
    grids = [_layers(found)]
    if found.experts:
        rows = tuple(
            (e.place, f"{e.experts}", e.storage, count(e.parameters), size(e.bytes)) for e in found.experts
        )
        grids.append(Grid(("module", "experts", "storage", "parameters", "weights"), rows, "experts", frozenset({0, 2})))  # fmt: skip
    bad = [name for name, one in (found.stats or {}).items() if one.nonfinite]
    warnings = (f"non-finite values in {', '.join(bad[:5])}",) if bad else ()
    if found.routing is not None:
        warnings += tuple(map(str, found.routing.get("warnings") or ()))
    verdict = str((found.routing or {}).get("risk") or "")
    notes = (*s.notes, *([f"risk of dropping experts: {verdict}"] if verdict else []))
    return View(f"inspect {s.label}", "", None, _known(facts), tuple(grids), warnings, tuple(map(str, notes)))


def _layers(found: Any) -> Grid:
    """Return one row a layer, with figures of its values where they were asked for."""
    figures = any(group.stats for group in found.layers)
    header = ("layer", "tensors", "parameters", "weights", *(("norm", "largest", "zeros", "non-finite") if figures else ()))  # fmt: skip
    rows = []
    for group in found.layers:
        row = [group.name, f"{group.tensors:,}", count(group.parameters), size(group.bytes)]
        if figures:
            one = group.stats.figures() if group.stats else None
            row += [figure4(one["norm"]), figure4(one["max_abs"]), f"{one['zeros']:.2%}", f"{one['nonfinite']:,}"] if one else [""] * 4  # fmt: skip
        rows.append(tuple(row))
    return Grid(header, tuple(rows))


def of_difference(found: Any) -> View:
    """Return the view of a `surgeon.api.Difference`."""
    a, b = found.labels
    s = found.structure
    facts = [
        ("A", a),
        ("B, the reference", b),
        ("tensors in common", f"{len(s.common):,}"),
        ("only in A", _some(s.only_first)),
        ("only in B", _some(s.only_second)),
        ("shapes differ", _some([n for n, *_ in s.shapes])),
        ("types differ", _some([n for n, *_ in s.dtypes])),
        ("tokenizer", found.tokenizer or ""),
        ("chat template", "differs" if found.chat_template else ""),
    ]
    grids = []
    if found.values is not None:
        from surgeon import comparison

        groups = comparison.grouped(found.values, "layer")
        rows = [_drift(label, one) for label, one in groups.items()]
        rows.append(_drift("all", comparison.total(found.values)))
        grids.append(Grid(("layer", "relative distance", "cosine", "largest", "changed"), tuple(rows)))
    settings = [(str(c.key), _short(c.first), _short(c.second)) for c in (*found.config, *found.generation_config)]  # fmt: skip
    if settings:
        grids.append(Grid(("setting", "A", "B"), tuple(settings), texts=frozenset({0, 1, 2})))
    verdict = "they differ" if found.differs else "no difference"
    if found.values is None and not found.differs:
        verdict += " in structure and configuration; values=True compares the weights"
    return View("diff", verdict, None, _known(facts), tuple(grids), (), tuple(map(str, found.notes)))


def _drift(label: str, values: Any) -> tuple[str, ...]:
    changed = values.changed / max(1, values.elements)
    cosine = "–" if values.cosine is None else f"{values.cosine:.6f}"
    return label, figure4(values.relative), cosine, figure4(values.max_abs), f"{changed:.2%}"


def of_verification(found: Any) -> View:
    """Return the view of a `surgeon.api.Verification`."""
    report = found.report
    facts = [
        ("model", str(found.path)),
        ("weights", f"{report.tensors:,} tensors in {report.shards} file{'s' if report.shards != 1 else ''}, {size(report.bytes)}, {count(report.parameters)} parameters"),
        ("checks", ", ".join(name for name in report.checks if name not in report.failed)),
        ("loaded", " ".join(f"{k} {v}" for k, v in sorted(found.reading.versions.items(), reverse=True)) if found.reading else ""),
    ]  # fmt: skip
    rows = tuple((e.code, e.message, e.help or "") for e in found.errors)
    grids = (Grid(("finding", "", "what to do"), rows, texts=frozenset({0, 1, 2}), failed=frozenset(range(len(rows)))),) if rows else ()  # fmt: skip
    count_ = len(rows)
    verdict = "every check passed" if found.passed else f"{count_} finding{'s' if count_ > 1 else ''}"
    return View("verify", verdict, found.passed, _known(facts), grids, tuple(map(str, found.warnings)), tuple(map(str, report.notes)))  # fmt: skip


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return f"{len(found):,}: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}" if found else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known(facts: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in facts if value)
