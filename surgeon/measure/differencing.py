"""Measuring a latency table by differences of whole models.

A module timed alone runs with warm caches and no neighbours; its time is not its share of a model's.
So whole models are timed: one with few layers against one with many gives a layer and the rest;
one whose layers all have an attention or FFN at some level, against one with full layers, gives the
saving of that level, in pairs, so that what the machine does meanwhile cancels. ZipLM (Kurtic et
al., NeurIPS 2023, section 3.2) builds the table that this measures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from surgeon.errors import InputError, UsageError
from surgeon.measure.conditions import Conditions
from surgeon.measure.environment import Environment
from surgeon.measure.models import RandomModels, Variant, shape_of
from surgeon.measure.table import Heads, LatencyTable, identity, monotone
from surgeon.measure.timing import Estimate, Sample, median, paired
from surgeon.measure.workload import Workload
from surgeon.structure.cut import LayerShape
from surgeon.structure.parts import Structure

MOST_LEVELS = 8
"""Levels of a kind that are measured, the full size and 0 among them."""
SMALL = 16
"""The smallest level above 0 is a 16th of the full size: a module that is nearly gone costs more than one that is."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


@dataclass(frozen=True)
class Levels:
    """Sizes to measure beside the full ones.

    Attributes:
        attention: (query heads, key/value heads); (0, 0) is a layer without attention.
        ffn: widths; 0 is a layer without FFN.
    """

    attention: tuple[Heads, ...] = ()
    ffn: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, structure: Structure, *, attention: str | None = "groups", ffn: bool = True, multiple: int = 1
    ) -> Levels:
        """Return evenly spread levels, at most `MOST_LEVELS` of a kind.

        Args:
            attention: "groups" (whole key/value groups go), "heads" (equally many heads of every group), None.
            ffn: whether widths are cut.
            multiple: widths are multiples of this.
        """
        full = shape_of(structure)
        heads: list[Heads] = []
        if attention is not None and full.heads:
            each = full.heads // full.groups
            if attention == "groups":
                heads = [(g * each, g) for g in _spread(full.groups, 1)]
            elif attention == "heads":
                heads = [(h * full.groups, full.groups if h else 0) for h in _spread(each, 1)]
            else:
                raise UsageError("E284", f'attention is cut by "groups" or "heads", not "{attention}"', help="attention=\"groups\" cuts key/value heads with their query heads, \"heads\" query heads alone")  # fmt: skip
        return cls(tuple(heads), tuple(_spread(full.ffn, multiple)) if ffn and full.ffn else ())


def _spread(full: int, multiple: int) -> list[int]:
    """Return up to `MOST_LEVELS` sizes without the full one: 0, a small one, and evenly up from there."""
    least = min(full, multiple * -(-full // (SMALL * multiple)))
    steps = MOST_LEVELS - 2
    inner = {
        min(full, multiple * round((least + (full - least) * i / steps) / multiple)) for i in range(1, steps)
    }
    return sorted(({0, least} | inner) - {full}, reverse=True)


class Models(Protocol):
    """What can be timed; `RandomModels` in earnest."""

    deep: int
    short: int
    full: LayerShape

    def room(self) -> int:
        """Return how many models fit beside the dense one."""
        ...

    def sample(self, variant: Variant) -> Sample:
        """Return what times a variant."""
        ...


@dataclass(frozen=True)
class Timed:
    """What pairs of models gave.

    Attributes:
        deep, short: layers of the two dense models.
        seconds: of the deep one.
        few: time of the short one relative to the deep one.
        attention, ffn: level -> time of a deep model at that level relative to the deep dense one.
    """

    deep: int
    short: int
    seconds: float
    few: Estimate
    attention: Mapping[Heads, Estimate]
    ffn: Mapping[int, Estimate]


def measure_table(
    config: Mapping[str, Any],
    structure: Structure,
    workload: Workload,
    levels: Levels,
    conditions: Conditions,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> LatencyTable:
    """Measure the latency table of a model, on random weights of its shapes.

    Args:
        config: config.json of the model.
        structure: its structures.
        levels: sizes to measure; what no program can load is left out and named in the notes.

    Raises:
        UsageError: E284. EnvironmentFault: E517, E518. Interrupted: E130.
    """
    with conditions.in_force():
        models = RandomModels(config, structure, workload, conditions)
        timed, left_out = time_models(models, levels, conditions, progress=progress, stop=stop)
        environment = Environment.here(conditions, dtype=models.dtype, attention=models.attention)
    notes = [f"not measured, since nothing loads such a model: {', '.join(left_out)}"] if left_out else []
    notes += _imprecise(timed, conditions)
    kinds = sorted(set(config.get("layer_types") or ()))
    if len(kinds) > 1:
        notes.append(f"layers of the kinds {', '.join(kinds)} are measured as one, in the model's proportion")
    return assemble(
        timed, models.full, structure.layers, workload, environment, identity(config), tuple(notes)
    )


def time_models(
    models: Models,
    levels: Levels,
    conditions: Conditions,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[Timed, list[str]]:
    """Time all variants against the dense model, as many at once as fit; return them and what could not be built."""
    full = models.full
    variants: dict[Any, Variant] = {"few": Variant(models.short, full)}
    for heads, groups in levels.attention:
        if (heads, groups) != (full.heads, full.groups):
            shape = LayerShape(heads, groups, full.head_dim if heads else 0, full.ffn)
            variants["attention", (heads, groups)] = Variant(models.deep, shape)
    for width in levels.ffn:
        if width != full.ffn:
            variants["ffn", width] = Variant(
                models.deep, LayerShape(full.heads, full.groups, full.head_dim, width)
            )
    dense = models.sample(Variant(models.deep, full))
    ratios: dict[Any, Estimate] = {}
    seconds: list[float] = []
    left_out: list[str] = []
    waiting = list(variants)
    while waiting:
        group: dict[Any, Sample] = {}
        while waiting and len(group) < models.room():
            key = waiting.pop(0)
            try:
                group[key] = models.sample(variants[key])
            except InputError:
                if key == "few":
                    raise
                left_out.append(_named(key))
        if not group:
            continue
        done = len(variants) - len(waiting) - len(group)
        if progress is not None:
            progress("timing", done, len(variants))
        found = paired({"dense": dense, **group}, "dense", precision=conditions.precision, repeat=conditions.repeat,
                       time_limit=conditions.time_limit * len(group), seed=conditions.seed, stop=stop)  # fmt: skip
        ratios |= found.ratios
        seconds += list(found.seconds["dense"])
    if progress is not None:
        progress("timing", len(variants), len(variants))
    return Timed(
        models.deep, models.short, median(seconds).value, ratios.pop("few"),
        {key[1]: e for key, e in ratios.items() if key[0] == "attention"},
        {key[1]: e for key, e in ratios.items() if key[0] == "ffn"},
    ), left_out  # fmt: skip


def _named(key: tuple[str, Any]) -> str:
    kind, size = key
    if kind == "ffn":
        return f"an FFN of {size:,} channels"
    return f"{size[0]} heads with {size[1]} key/value heads"


def assemble(
    timed: Timed,
    full: LayerShape,
    layers: int,
    workload: Workload,
    environment: Environment,
    model: str,
    notes: Sequence[str] = (),
) -> LatencyTable:
    """Turn ratios of whole models into times of one layer's attention and FFN, and of the rest.

    With r the short model's time relative to the deep one's, a layer takes t (1 - r) / (deep - short) and
    the rest what the layers leave of t. A level whose model takes rho t saves t (1 - rho) / deep a layer. What
    a layer costs beyond both savings at 0 (calls, residual additions) is shared between the two.
    """
    t, deep = timed.seconds, timed.deep
    layer = max(0.0, t * (1 - timed.few.value) / (deep - timed.short))
    rest = t - deep * layer
    found = list(notes)
    if rest < 0:
        found.append(
            f"the rest of the model came out at {1000 * rest:.3g} ms, within the noise of 0, and counts as 0"
        )
        layer, rest = t / deep, 0.0

    def saving(estimate: Estimate) -> float:
        return t * (1 - estimate.value) / deep

    whole_attention, whole_ffn = _split(layer, full, timed, saving)
    attention = {key: whole_attention - saving(e) for key, e in timed.attention.items()}
    ffn = {key: whole_ffn - saving(e) for key, e in timed.ffn.items()}
    attention[full.heads, full.groups], ffn[full.ffn] = whole_attention, whole_ffn
    attention_spread = {key: _half(e) * t / deep for key, e in timed.attention.items()}
    ffn_spread = {key: _half(e) * t / deep for key, e in timed.ffn.items()}
    attention_spread[full.heads, full.groups] = ffn_spread[full.ffn] = 0.0
    rows = [
        monotone({k: v for k, v in attention.items() if k in family}, attention_spread)
        for family in _families(attention, full)
    ]
    shared = {key: value for row in rows for key, value in row.items()}
    # The ends belong to both families; each has been fitted with its own neighbours.
    for key in set(rows[0]).intersection(*rows[1:]):
        shared[key] = sum(row[key] for row in rows) / len(rows)
    return LatencyTable(
        environment, workload, model, layers, full, rest, shared, monotone(ffn, ffn_spread), attention_spread, ffn_spread,
        t * _half(timed.few) / (deep - timed.short), deep, notes=tuple(found),
    )  # fmt: skip


def _families(attention: Iterable[Heads], full: LayerShape) -> list[set[Heads]]:
    """Return the rows of an attention table: whole groups kept, and heads kept of every group."""
    keys = set(attention)
    each = full.heads // full.groups if full.groups else 0
    by_group = {key for key in keys if key[1] * each == key[0]}
    by_head = {key for key in keys if key[1] == full.groups or not key[0]}
    inner = {(full.heads, full.groups), (0, 0)}
    return [row for row in (by_group, by_head) if row - inner] or [by_group]


def _split(
    layer: float, full: LayerShape, timed: Timed, saving: Callable[[Estimate], float]
) -> tuple[float, float]:
    """Divide a layer's time between attention and FFN."""
    if full.ffn == 0:
        return layer, 0.0
    if full.heads == 0:
        return 0.0, layer
    attention = ffn = None
    if (0, 0) in timed.attention:
        attention = saving(timed.attention[0, 0])
    if timed.ffn:
        # Where no program loads a layer without FFN: straight on from the smallest width. What it costs
        # to have one at all then counts as attention's; only sums are ever used.
        least = min(timed.ffn)
        ffn = saving(timed.ffn[least]) * full.ffn / (full.ffn - least)
    if attention is None:
        attention = layer / 2 if ffn is None else layer - ffn
    elif ffn is not None:
        attention += (layer - attention - ffn) / 2
    attention = min(layer, max(0.0, attention))
    return attention, layer - attention


def _half(estimate: Estimate) -> float:
    """Return the half-width of an interval, in the value's own unit."""
    return (estimate.high - estimate.low) / 2


def _imprecise(timed: Timed, conditions: Conditions) -> list[str]:
    widths = [e.half_width for e in (timed.few, *timed.attention.values(), *timed.ffn.values())]
    worst = max(widths)
    if worst <= conditions.precision:
        return []
    many = sum(width > conditions.precision for width in widths)
    return [
        f"{many} of {len(widths)} times were not measurable to ±{conditions.precision:.1%} here; the worst is known to ±{worst:.1%}"
    ]
