"""Figures by layer: what is kept, how many bits it has, how far it is from what it was."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.architectures.naming import layer_of
from surgeon.report.charts import Bar, Bars, Cell, Heat
from surgeon.report.documents import number

KEPT = "kept"
"""The word of a plan for a matrix that stays as it was."""
USUAL = 4
"""Bits at which losses are compared when matrices have several widths in common."""


@dataclass(frozen=True)
class Idle:
    """Experts that the calibration text never reached."""

    layer: int
    experts: tuple[str, ...]


@dataclass(frozen=True)
class ByLayer:
    """What is known of the layers of one model.

    Attributes:
        idle: None where the tokens of experts were not counted.
    """

    bars: tuple[Bars, ...] = ()
    heat: Heat | None = None
    notes: tuple[str, ...] = ()
    idle: tuple[Idle, ...] | None = None


# ---- quantization -------------------------------------------------------------------------------------


def of_plan(plan: Mapping[str, Any]) -> ByLayer:
    """Return bits, errors and sensitivities from the plan of a quantization."""
    records = [r for r in map(mapping, sequence(plan.get("records"))) if isinstance(r.get("label"), str)]
    kept = [name for name, word in mapping(plan.get("matrices")).items() if word == KEPT]
    notes = []
    if kept and records:
        notes.append(
            f"{'1 matrix stays as it was and is' if len(kept) == 1 else f'{len(kept)} matrices stay as they were and are'} in no bar, {kept[0]} first"
        )
    return ByLayer(
        (*_bits(records), *_errors(records, "weight_error", "error", "Relative error of the weights"),
         *_errors(records, "error", "output_error", "Relative error of the outputs")),
        _heat(mapping(plan.get("allocation")), str(plan.get("sensitivity") or "")), tuple(notes), _unseen(records),
    )  # fmt: skip


def _by_layer(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, list[Mapping[str, Any]]]]:
    """Return stack -> layer -> records, the largest stack first."""
    found: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for record in records:
        place = layer_of(record["label"])
        if place is not None:
            found.setdefault(place.stack, {}).setdefault(place.index, []).append(record)
    return {stack: found[stack] for stack in sorted(found, key=lambda s: (-len(found[s]), s))}


def _bits(records: Sequence[Mapping[str, Any]]) -> Iterable[Bars]:
    """Yield stored bits a weight: scales and zero points counted."""
    stacks = _by_layer(records)
    for stack, layers in stacks.items():
        found = []
        for layer, members in sorted(layers.items()):
            sizes = [(number(r.get("bytes")), number(r.get("elements"))) for r in members]
            known = [(b, e) for b, e in sizes if b is not None and e]
            if known:
                bits = 8 * math.fsum(b for b, _ in known) / math.fsum(e for _, e in known)
                schemes = ", ".join(sorted({str(r.get("scheme")) for r in members}))
                found.append(Bar(layer, bits, f"layer {layer}: {bits:.3f} bits a weight ({schemes})"))
        if found:
            yield Bars("bits", _named("Bits a weight, scales included", stack, stacks), tuple(found))


def _errors(records: Sequence[Mapping[str, Any]], field: str, key: str, title: str) -> Iterable[Bars]:
    """Yield the root of the mean of squared relative errors, matrices weighted by their parameters."""
    stacks = _by_layer(records)
    for stack, layers in stacks.items():
        found = []
        for layer, members in sorted(layers.items()):
            known = [(e, n) for r in members
                     if (e := number(r.get(field))) is not None and e >= 0 and (n := number(r.get("elements")))]  # fmt: skip
            if known:
                error = math.sqrt(math.fsum(e * n for e, n in known) / math.fsum(n for _, n in known))
                worst = max(members, key=lambda r: number(r.get(field)) or 0.0)
                found.append(Bar(layer, error, f"layer {layer}: {error:.3g}, most in {worst['label']}"))
        if found:
            yield Bars(key, _named(title, stack, stacks), tuple(found))


def _named(title: str, stack: str, stacks: Mapping[str, Any]) -> str:
    return f"{title}, {stack}" if len(stacks) > 1 else title


def _unseen(records: Sequence[Mapping[str, Any]]) -> tuple[Idle, ...] | None:
    routed = [r for r in records if r.get("routed") and number(r.get("tokens")) is not None]
    if not routed:
        return None
    found: dict[int, dict[str, None]] = {}
    for record in routed:
        place = layer_of(record["label"])
        if record["tokens"] == 0 and place is not None:
            found.setdefault(place.index, {})[_expert(place.rest)] = None
    return tuple(Idle(layer, tuple(names)) for layer, names in sorted(found.items()))


def _expert(rest: str) -> str:
    """Return the expert's number in what follows a layer's."""
    return next((part for part in rest.split(".") if part.isdecimal()), rest)


# ---- sensitivities ------------------------------------------------------------------------------------


def _heat(allocation: Mapping[str, Any], sensitivity: str) -> Heat | None:
    """Return losses by layer and kind of matrix, at a width that as many as possible have in common."""
    groups = [g for g in map(mapping, sequence(allocation.get("groups"))) if isinstance(g.get("name"), str)]
    losses = [_by_width(mapping(group.get("losses"))) for group in groups]
    counts: dict[int, int] = {}
    for width in itertools.chain.from_iterable(losses):
        counts[width] = counts.get(width, 0) + 1
    if not counts:
        return None
    width = min(counts, key=lambda w: (-counts[w], abs(w - USUAL), w))
    found: dict[tuple[int, str], list[tuple[float, str]]] = {}
    for group, known in zip(groups, losses, strict=True):
        names = [n for n in sequence(group.get("modules")) if isinstance(n, str)] or [group["name"]]
        places = [place for name in names if (place := layer_of(name)) is not None]
        if width in known and places:
            kind = " + ".join(dict.fromkeys(_kind(place.rest) for place in places))
            chosen = str(group.get("format") or "")
            found.setdefault((places[0].index, kind), []).append((known[width], chosen))
    if not found:
        return None
    cells = []
    for (layer, kind), members in sorted(found.items(), key=lambda item: (_order(item[0][1]), item[0][0])):
        loss = math.fsum(value for value, _ in members)
        schemes = dict.fromkeys(sorted(scheme for _, scheme in members))
        detail = f"layer {layer}, {kind}: {loss:.4g} at {width} bits; stored as {', '.join(schemes)}"
        cells.append(Cell(layer, kind, loss, _span([_width(s) for s in schemes]), detail))
    by = f" ({sensitivity})" if sensitivity else ""
    return Heat(f"Sensitivity: loss at {width} bits{by}", tuple(cells))


def _by_width(losses: Mapping[str, Any]) -> dict[int, float]:
    """Return bits -> the least loss of the schemes that have so many."""
    found: dict[int, float] = {}
    for scheme, loss in losses.items():
        width, value = _width(scheme), number(loss)
        if width is not None and value is not None:
            found[width] = min(found.get(width, math.inf), value)
    return found


def _width(scheme: str) -> int | None:
    """Return the bits in the name of a scheme: int4g128, float8, nvfp4, nf4."""
    found = re.search(r"(?:int|float|fp|nf)(\d{1,2})", scheme)
    return int(found[1]) if found else None


def _span(widths: Sequence[int | None]) -> str:
    known = sorted({w for w in widths if w is not None} | ({16} if None in widths else set()))
    if not known:
        return ""
    return str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"


def _kind(rest: str) -> str:
    """Return what matrices of equal purpose share: mlp.experts.*.down_proj."""
    parts = rest.removesuffix(".weight").split(".")
    return ".".join("*" if part.isdecimal() else part for part in parts)


def _order(kind: str) -> tuple[bool, str]:
    return (not kind.startswith("self_attn"), kind)


# ---- pruning ------------------------------------------------------------------------------------------


def of_pruning(pruning: Mapping[str, Any], before: str = "") -> ByLayer:
    """Return what pruning kept of each layer.

    Args:
        before: sizes of the source in words, as a document of prune has them.
    """
    if "experts" in pruning:
        return _of_experts(pruning)
    layers = sequence(pruning.get("layers"))
    if not layers:
        return ByLayer()
    found, notes = [], []
    gone = [i for i, layer in enumerate(layers) if layer is None]
    if gone:
        notes.append(f"removed: {'layer' if len(gone) == 1 else 'layers'} {', '.join(map(str, gone))}")
    hidden = pruning.get("hidden")
    if isinstance(hidden, list):
        notes.append(f"hidden width: {len(hidden):,} of its channels stay")
    cut = {
        field
        for layer in layers
        for field in ("channels", "heads")
        if isinstance(mapping(layer).get(field), list)
    }
    # Where only whole layers went, one chart says it.
    for field, title, word in (
        ("channels", "FFN channels kept", "ffn"),
        ("heads", "Attention heads kept", "heads"),
    ):
        if field in cut or (gone and not cut and not found):
            chart = _kept(layers, field, title, _whole(before, word))
            found += [chart] if chart else []
    return ByLayer(tuple(found), notes=tuple(notes))


def _kept(layers: Sequence[Any], field: str, title: str, whole: float | None) -> Bars | None:
    """Return how many parts each layer keeps; None where that is known of no layer."""
    bars = []
    for index, layer in enumerate(layers):
        if layer is None:
            bars.append(Bar(index, None, f"layer {index}: removed"))
            continue
        ids = mapping(layer).get(field)
        value = float(len(ids)) if isinstance(ids, list) else whole
        if value is not None:  # keeps all of an unknown number: nothing to draw
            of = f" of {whole:,.0f}" if whole else ""
            bars.append(Bar(index, value, f"layer {index}: {value:,.0f}{of}"))
    return Bars(field, title, tuple(bars), whole) if any(bar.value is not None for bar in bars) else None


def _whole(words: str, part: str) -> float | None:
    """Return how many heads or channels the source has, where all of its layers have equally many."""
    found = re.search(rf"\b{part} (\d[\d,]*)(?! to )(?![\d,]*\d)", words)
    return float(found[1].replace(",", "")) if found else None


def _of_experts(pruning: Mapping[str, Any]) -> ByLayer:
    of = number(pruning.get("of"))
    said = {int(k): mapping(v) for k, v in mapping(pruning.get("layers")).items() if k.isdecimal()}
    kept = {int(k): v for k, v in mapping(mapping(pruning["experts"]).get("kept")).items() if k.isdecimal()}
    counts, widths, errors, idle = [], [], [], []
    counted = False
    for layer in sorted({*said, *kept}):
        entry = said.get(layer, {})
        count = float(len(kept[layer])) if isinstance(kept.get(layer), list) else of
        if count is not None:
            spared = sequence(entry.get("protected"))
            more = f", {len(spared)} protected" if spared else ""
            counts.append(Bar(layer, count, f"layer {layer}: {count:g} experts{more}"))
        values = [v for v in map(number, sequence(entry.get("widths"))) if v is not None]
        if values:
            mean = math.fsum(values) / len(values)
            widths.append(
                Bar(layer, mean, f"layer {layer}: {min(values):g} to {max(values):g}, mean {mean:.4g}")
            )
        error = number(entry.get("error"))
        if error is not None:
            errors.append(Bar(layer, error, f"layer {layer}: {error:.4g}"))
        tokens = [number(t) for t in sequence(entry.get("tokens"))]
        if any(tokens):
            counted = True
            silent = tuple(str(expert) for expert, seen in enumerate(tokens) if seen == 0)
            idle += [Idle(layer, silent)] if silent else []
    found = [Bars("experts", "Experts kept", tuple(counts), of)] if counts else []
    found += [Bars("width", "Mean width of the experts", tuple(widths))] if widths else []
    found += [Bars("output_error", "Relative error of the outputs", tuple(errors))] if errors else []
    return ByLayer(tuple(found), idle=tuple(idle) if counted else None)


# ---- differences --------------------------------------------------------------------------------------


def of_diff(document: Mapping[str, Any]) -> ByLayer:
    """Return the relative L2 distance of two models by layer, from a document of diff."""
    values = mapping(document.get("values"))
    if values.get("by") != "layer":
        return ByLayer(notes=("drift by layer needs the figures of: surgeon diff A B --values --by layer",))
    stacks: dict[str, list[Bar]] = {}
    for group in map(mapping, sequence(values.get("groups"))):
        stack, _, index = str(group.get("name")).rpartition(".")
        relative = number(group.get("relative"))
        if index.isdecimal() and relative is not None:
            detail = f"layer {index}: relative L2 {relative:.4g}"
            stacks.setdefault(stack, []).append(Bar(int(index), relative, detail))
    title = "Drift: relative L2 distance of the weights"
    return ByLayer(tuple(Bars("drift", _named(title, s, stacks), tuple(b)) for s, b in stacks.items()))


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []
