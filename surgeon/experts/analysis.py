"""What ``surgeon inspect MODEL --experts`` shows: everything one pass over text, or the weights alone, say about experts.

    analyse(checkpoint, experts, found.samples, settings, about=found.record).document

The document is plain data; `surgeon.cli.inspect_experts` prints it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.calibrate.data import Sample, Source, load
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.tokens import load_encoder
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError, Where
from surgeon.experts import criteria, overlap
from surgeon.experts.cognitive import CognitiveCounts, Marker, marker_places
from surgeon.experts.load import RELIABLE, Load, load_of
from surgeon.experts.measures import MeasureSettings, RoutingMeasures
from surgeon.experts.statistics import RoutingStatistics, collect_statistics
from surgeon.experts.super_experts import SuperExpert, super_experts
from surgeon.experts.weights_only import LayerWeights, weights_of
from surgeon.structure.experts.check import nearest_counts, valid_counts
from surgeon.structure.experts.parts import Experts

Progress = Callable[[int, int], None]

FEW_TOKENS = 1000
FEW_EXPERTS = 64
SMALL = 16_000_000_000
COGNITIVE_SHOWN = 10


@dataclass(frozen=True)
class Analysis:
    """What is known about a model's experts.

    Attributes:
        document: all of it as plain data without paths.
        statistics: of the pass, for ``save``; None without text.
        pairs: layer -> int64 [E, E], tokens that use both experts; empty without text.
    """

    document: dict[str, Any]
    statistics: RoutingStatistics | None = None
    pairs: dict[int, np.ndarray] = field(default_factory=dict)


def named(checkpoint: Checkpoint, experts: Experts) -> dict[str, Any]:
    """Return what names and shapes alone say, as `Analysis.document`."""
    hint = "nothing is known of how tokens are routed: --calibration TEXT runs the model, --stats reads its weights"
    return {
        "architecture": architecture_of(checkpoint, experts), "data": None, "weights": None, "warnings": [hint],
        "risk": risk(experts, _parameters(checkpoint)),
    }  # fmt: skip


def analyse_weights(
    checkpoint: Checkpoint, experts: Experts, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> Analysis:  # fmt: skip
    """Return what can be said without running the model.

    Raises:
        Interrupted: E130 ``stop`` was set.
    """
    layers = weights_of(checkpoint, experts, progress=progress, stop=stop)
    document = {
        "architecture": architecture_of(checkpoint, experts),
        "data": None,
        "weights": [layer.document() for layer in layers],
        "warnings": [
            *_weight_warnings(layers),
            "nothing is known of how tokens are routed: give --calibration",
        ],
        "risk": risk(experts, _parameters(checkpoint)),
    }
    return Analysis(document)


def analyse(
    checkpoint: Checkpoint,
    experts: Experts,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    about: Mapping[str, Any] | None = None,
    measure: MeasureSettings | None = None,
    windows: Sequence[int] = (),
    keep: int | None = None,
    criterion: str = "easy_ep",
    markers: Sequence[Marker] = (),
    weights: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
) -> Analysis:
    """Run the model over text once and return everything that is known about its experts then.

    Args:
        checkpoint: the model.
        experts: where its experts are.
        samples: token ids with their domains.
        settings: where and how the model runs; its spill folder is what ``resume`` needs.
        about: plain data on the samples (`surgeon.calibrate.data.CalibrationSet.record`).
        measure: what is measured of routing.
        windows: stretches the user asks SRP for; unlike the usual ones they must fit a sample.
        keep: experts of a layer for which domains and demonstrations are compared; by default half of them.
        criterion: the criterion domains are compared by, one that looks at routing.
        markers: words whose experts are looked for (RICE).
        weights: look at the weights, too.
        progress, stop, resume: as `surgeon.calibrate.walk.Walk.run`.

    Raises:
        InputError: E438 no sample is as long as a window, E439 a marker is nowhere; whatever a pass raises.
        UsageError: E244 no such criterion, E246 a setting, or a number of experts, that cannot be.
    """
    measure = measure or MeasureSettings()
    kept = _kept(experts, keep)
    criteria.of_routing(criterion)
    lengths = [len(sample.ids) for sample in samples]
    measure = _measured(measure, windows, lengths, experts)
    taken = RoutingMeasures(experts, lengths, measure)
    counts = [CognitiveCounts(marker_places(markers, [s.ids for s in samples]), lengths, experts)] if markers else []  # fmt: skip
    statistics = collect_statistics(
        checkpoint, samples, settings, experts, about=about, progress=progress, stop=stop, resume=resume,
        also=(taken, *counts),
    )  # fmt: skip
    figures = taken.finish()
    loads = {layer: _load(statistics, layer) for layer in statistics.layers}
    overlaps, stabilities = _compared(statistics, criterion, kept, experts, measure.seed)
    supers = super_experts(statistics, experts)
    document: dict[str, Any] = {
        "architecture": architecture_of(checkpoint, experts),
        "data": _data(statistics, samples),
        "settings": {"cold": measure.cold, "cache_window": measure.cache_window, "keep": kept, "criterion": criterion},
        "layers": [{"layer": layer, "load": loads[layer].document(), **figures[layer]} for layer in statistics.layers],
        "model": _model(loads, figures),
        "super_experts": [
            {"layer": s.layer, "expert": s.expert, "peak": s.peak, "certain": s.certain, "of_median": _of_median(statistics, s)}
            for s in supers
        ],
        "criteria": _scores(statistics),
        "overlaps": [pair.document() for pair in overlaps],
        "stability": {domain: stable.document() for domain, stable in stabilities.items()},
        "cognitive": [e.document() for e in counts[0].ranked()[:COGNITIVE_SHOWN]] if counts else None,
        "weights": None,
        "warnings": [
            *_load_warnings(statistics, loads, experts),
            *overlap.sentences(overlaps, stabilities),
        ],
        "risk": risk(experts, _parameters(checkpoint)),
    }  # fmt: skip
    if weights:
        layers = weights_of(checkpoint, experts, stop=stop)
        document["weights"] = [layer.document() for layer in layers]
        document["warnings"] += _weight_warnings(layers)
    return Analysis(document, statistics, taken.pairs)


def analyse_texts(
    checkpoint: Checkpoint,
    experts: Experts,
    source: Source,
    settings: Settings,
    *,
    samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    offline: bool = False,
    markers: Sequence[str] = (),
    **options: Any,
) -> Analysis:
    """Run the model over texts, turned into tokens by its own tokenizer; the rest is `analyse`.

    Args:
        source: see `surgeon.calibrate.data.load`; several with names are domains, None is the text that comes along.
        samples, sequence_length, seed, offline: of the texts.
        markers: words whose experts are looked for, as text.
        options: of `analyse`.

    Raises:
        InputError: E440 the model is a bare file; whatever loading texts and `analyse` raise.
    """
    folder = checkpoint.folder
    if folder is None:
        raise InputError("E440", f"{checkpoint.label} is a bare file: running it over text needs config.json and the tokenizer",
                         where=Where(checkpoint.label), help="give the model folder")  # fmt: skip
    texts = load(source, folder, samples=samples, sequence_length=sequence_length, seed=seed, offline=offline)
    tokenizer = load_encoder(folder).tokenizer
    known = [
        Marker.of(text, lambda part: tokenizer(part, add_special_tokens=False)["input_ids"])
        for text in markers
    ]
    found = analyse(
        checkpoint, experts, texts.samples, settings, about=texts.record, markers=known, **options
    )
    found.document["warnings"][:0] = texts.warnings
    return found


def architecture_of(checkpoint: Checkpoint, experts: Experts) -> dict[str, Any]:
    """Return what a model's experts are and how they are stored, as plain data."""
    router, first = experts.record.router, experts.layers[0]
    inner = (checkpoint.config or {}).get(experts.section, {}) if experts.section else checkpoint.config or {}
    renormalised = router.renormalised
    if isinstance(renormalised, str):
        renormalised = inner.get(renormalised, experts.record.defaults.get(renormalised, False))
    return {
        "family": experts.record.family,
        "layers": [layer.index for layer in experts.running],
        "layers_not_run": [layer.index for layer in experts.layers if not layer.runs],
        "experts": experts.count,
        "top_k": experts.top_k,
        "width": experts.width,
        "hidden": experts.hidden,
        "groups": experts.groups,
        "topk_group": experts.topk_group,
        "shared": any(layer.shared for layer in experts.layers),
        "router": router.score,
        "renormalised": bool(renormalised),
        "gate_on": router.gate_on,
        "correction_bias": any(True for layer in experts.layers for _ in layer.of("correction_bias")),
        "storage": first.storage,
        "quantized": next((layer.quantized for layer in experts.layers if layer.quantized), None),
        "expert_parameters": sum(
            checkpoint.tensors[t.name].elements for layer in experts.layers for t in layer.tensors
        ),
        "parameters": _parameters(checkpoint),
    }  # fmt: skip


def risk(experts: Experts, parameters: int) -> str:
    """Return what pruning experts is known to cost in models of this kind (REAP, arXiv 2510.13999; llm-compressor)."""
    small = [
        *([f"{experts.count} experts a layer"] if experts.count <= FEW_EXPERTS else []),
        *([f"{parameters / 1e9:.1f} billion parameters"] if 5e7 <= parameters <= SMALL else []),
    ]
    if small:
        return (
            f"{' and '.join(small)} are few: drop at most 25 % of the experts and evaluate; of a 16 billion model with 64 "
            "experts REAP lost 20 % of GSM8K at 25 % and 83 % at 50 %"
        )
    return (
        "models of this size lost 1 to 3 % on code and mathematics at 50 % of the experts with REAP and text of the domain; "
        "other skills lose more, and perplexity does not show it: evaluate by generation"
    )


# ---- parts of the document -------------------------------------------------------------------------


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(info.elements for info in checkpoint.tensors.values())


def _kept(experts: Experts, keep: int | None) -> int:
    """Return the experts of a layer choices are compared for: what was asked, or the legal number nearest to half."""
    allowed = valid_counts(experts)
    if keep is None:
        return min(allowed, key=lambda n: (abs(n - experts.count / 2), n), default=experts.count)
    if keep not in allowed:
        raise UsageError("E246", f"{keep} of {experts.count} experts cannot be kept in every layer",
                         help=f"use {nearest_counts(experts, keep)}")  # fmt: skip
    return keep


def _measured(
    measure: MeasureSettings, windows: Sequence[int], lengths: Sequence[int], experts: Experts
) -> MeasureSettings:
    """Return what is measured, having refused what could not be before the model runs."""
    longest = max(lengths, default=0)
    for window in windows:
        if window < 1:
            raise UsageError("E246", f"a window of {window} tokens", help="at least 1; 16 and 64 are usual")
        if window > longest:
            raise InputError("E438", f"no sample is as long as a window of {window:,} tokens; the longest has {longest:,}",
                             help="give longer texts, a larger --sequence-length, or shorter windows")  # fmt: skip
    for ratio in measure.cache_ratios:
        if not 1 <= ratio <= experts.count:
            raise UsageError("E246", f"a cache of {ratio:g} times the experts of a token",
                             help="1 holds the experts of one token; 2 is usual")  # fmt: skip
    if measure.cache_window < 1:
        raise UsageError("E246", f"a cache that looks {measure.cache_window} tokens ahead", help="at least 1")
    return MeasureSettings(**{**vars(measure), "windows": tuple(windows)}) if windows else measure


def _data(statistics: RoutingStatistics, samples: Sequence[Sample]) -> dict[str, Any]:
    record = statistics.record
    domains = {name: sum(sample.domain == name for sample in samples) for name in statistics.domains}
    return {
        "samples": record["samples"], "tokens": record["tokens"], "ids_sha256": record["ids_sha256"],
        "dtype": record["dtype"], "model": record["model"], "domains": {n: c for n, c in domains.items() if n},
        "record": record["data"],
    }  # fmt: skip


def _load(statistics: RoutingStatistics, layer: int) -> Load:
    total = statistics.total(layer)
    return load_of(total.tokens, total.seen, gate=total.gate, gated=total.gated)


def _of_median(statistics: RoutingStatistics, found: SuperExpert) -> float | None:
    """Return a peak over the median of the layer's other experts; None where they have no outputs."""
    others = np.delete(statistics.total(found.layer).peak, found.expert)
    middle = float(np.median(others)) if len(others) else 0.0
    return found.peak / middle if middle else None


def _model(loads: Mapping[int, Load], figures: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return figures of the whole model with their extremes, because a mean hides a single bad layer."""
    segments: dict[str, list[tuple[float, float]]] = {}
    caches: dict[str, list[float]] = {}
    for found in figures.values():
        for one in found["segments"]:
            segments.setdefault(str(one["window"]), []).append((one["value"], one["random"]))
        for one in found["caches"]:
            caches.setdefault(str(one["size"]), []).append(one["sch"])
    return {
        "cv": _range([load.cv for load in loads.values() if load.cv is not None]),
        "effective": _range([load.effective for load in loads.values() if load.effective is not None]),
        "dead": sum(len(load.dead) for load in loads.values()),
        "segments": {
            window: {**_range([value for value, _ in found]), "random": float(np.mean([base for _, base in found]))}
            for window, found in segments.items()
        },
        "caches": {size: _range(rates) for size, rates in caches.items()},
    }  # fmt: skip


def _range(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": float(np.mean(values)), "min": float(min(values)), "max": float(max(values))}


def _scores(statistics: RoutingStatistics) -> dict[str, dict[str, list[float]]]:
    """Return criterion -> layer -> scores, of all criteria that one pass answers."""
    chosen = [criteria.get(name) for name in criteria.known()]
    return {
        c.name: {str(layer): np.asarray(c.score(statistics.total(layer)), np.float64).tolist() for layer in statistics.layers}
        for c in chosen
        if c.needs == "routing"
    }  # fmt: skip


def _compared(
    statistics: RoutingStatistics, criterion: str, kept: int, experts: Experts, seed: int
) -> tuple[list[overlap.DomainOverlap], dict[str, overlap.Stability]]:
    """Return overlaps of domains by a criterion, and the stability of each domain's EASY-EP choice."""
    if kept == experts.count:
        return [], {}  # all choices are the same
    score = criteria.get(criterion).score
    scores = {
        domain: {layer: np.asarray(score(found), np.float64) for layer, found in table.items()}
        for domain, table in statistics.domains.items()
    }
    overlaps = overlap.domain_overlaps(scores, kept, experts.groups) if len(scores) > 1 else []
    stabilities = {
        domain: overlap.stability(
            {layer: found.easy_by_sample for layer, found in table.items()}, kept, groups=experts.groups, seed=seed
        )
        for domain, table in statistics.domains.items()
    }  # fmt: skip
    return overlaps, stabilities


def _load_warnings(statistics: RoutingStatistics, loads: Mapping[int, Load], experts: Experts) -> list[str]:
    found = []
    tokens = int(statistics.record["tokens"])
    each = tokens * experts.top_k / experts.count
    if tokens < FEW_TOKENS:
        found.append(
            f"{tokens:,} tokens in all: statistics over so few say little; give at least {FEW_TOKENS:,}"
        )
    if each < RELIABLE:
        found.append(
            f"{each:.3g} tokens an expert on average: statistics of single experts are unreliable below {RELIABLE} "
            f"({int(np.ceil(RELIABLE * experts.count / experts.top_k)):,} tokens in all)"
        )
    dead = {layer: load.dead for layer, load in loads.items() if load.dead}
    if dead:
        worst = max(dead, key=lambda layer: (len(dead[layer]), -layer))
        found.append(
            f"{sum(map(len, dead.values()))} experts in {len(dead)} layers got no token; layer {worst} has {len(dead[worst])}: "
            f"{_listed(dead[worst])}"
        )
    if statistics.mixed_up:
        found.append(
            f"a norm follows the experts of {len(statistics.mixed_up)} layers: EASY-EP scores there weigh tokens by the "
            "whole block, shared experts included"
        )
    return found


def _weight_warnings(layers: Sequence[LayerWeights]) -> list[str]:
    found = []
    copies = {layer.layer: layer.duplicates for layer in layers if layer.duplicates}
    if copies:
        first = min(copies)
        found.append(
            f"experts of {len(copies)} layers are copies of each other, byte for byte; in layer {first}: "
            + "; ".join(_listed(group) for group in copies[first])
        )
    coded = [layer.layer for layer in layers if layer.norms is None]
    if coded:
        found.append(
            f"the experts of {len(coded)} layers are quantized: only their stored bytes are compared"
        )
    return found


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
