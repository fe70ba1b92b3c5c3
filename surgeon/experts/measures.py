"""Measures of routing taken while a pass runs: each layer's choices are held until the layer is done, then only figures.

So the memory of a pass does not grow with the number of layers, and a pass that is taken up again needs no trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from surgeon.calibrate.routing import Routed
from surgeon.experts.coactivation import CoActivation
from surgeon.experts.locality import Trace, segment_caching, segment_routing
from surgeon.experts.top_p import TopP
from surgeon.structure.experts.parts import Experts


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured of routing.

    Attributes:
        windows: tokens of the stretches that SRP is given for.
        cache_ratios: sizes of caches, in multiples of the experts a token uses.
        cache_window: tokens that SCH looks ahead.
        cold: whether a first access that finds a free place in a cache is a hit or a miss.
        pairs: pairs of experts reported for each layer.
        logits: look at the router's logits: margins, and top-p.
        seed: of intervals.
    """

    windows: tuple[int, ...] = (16, 64)
    cache_ratios: tuple[float, ...] = (2.0,)
    cache_window: int = 16
    cold: Literal["hit", "miss"] = "hit"
    pairs: int = 3
    logits: bool = False
    seed: int = 0


@dataclass
class _Layer:
    """One layer while its batches come."""

    pairs: CoActivation
    top_p: TopP | None
    index: list[np.ndarray] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    margins: list[np.ndarray] = field(default_factory=list)
    heaviest: float = 0.0
    tokens: int = 0
    norms: np.ndarray = field(
        default_factory=lambda: np.zeros((2, 3))
    )  # first token or not x (sum, slots, peak)


class RoutingMeasures:
    """Locality, co-activation and margins of every layer (a `surgeon.calibrate.routing.RoutingObserver`).

    Args:
        experts: of the model.
        lengths: tokens of each sample.
        settings: what is measured.
    """

    wants_sums = False

    def __init__(self, experts: Experts, lengths: Sequence[int], settings: MeasureSettings) -> None:
        self._experts = experts
        self._lengths = tuple(map(int, lengths))
        self._settings = settings
        self._count = {layer.index: layer.count for layer in experts.running}
        # Only without corrections and groups do logits decide about the choice.
        plain = experts.groups == 1 and experts.record.router.score != "sparsemixer"
        corrected = {
            layer.index for layer in experts.running if any(True for _ in layer.of("correction_bias"))
        }
        self._margins = {layer: plain and layer not in corrected for layer in self._count}
        self.wants_logits = settings.logits
        self.identity = hashlib.sha256(repr((self._lengths, settings, sorted(self._count.items()))).encode()).hexdigest()  # fmt: skip
        self._open: tuple[int, _Layer] | None = None
        self._done: dict[int, dict[str, Any]] = {}
        self.pairs: dict[int, np.ndarray] = {}

    def routed(self, batch: Routed) -> None:
        if self._open is None or self._open[0] != batch.layer:
            self._close()
            self._open = (batch.layer, self._fresh(batch.layer))
        layer, count = self._open[1], self._count[batch.layer]
        index = batch.index.cpu().numpy()
        positions = batch.positions.cpu().numpy()
        layer.index.append(index.astype(np.uint16 if count < 1 << 16 else np.int64))
        layer.samples.append(batch.samples.cpu().numpy())
        layer.positions.append(positions)
        layer.pairs.add(index)
        layer.heaviest += float(batch.weights.amax(dim=1).double().sum())
        layer.tokens += len(index)
        norms, peaks, used = batch.norms.cpu().numpy(), batch.peaks.cpu().numpy(), index < count
        for row, chosen in enumerate((positions == 0, positions > 0)):
            here = used[chosen]
            if here.any():
                layer.norms[row, 0] += float(norms[chosen][here].sum(dtype=np.float64))
                layer.norms[row, 1] += int(here.sum())
                layer.norms[row, 2] = max(layer.norms[row, 2], float(peaks[chosen][here].max()))
        if batch.logits is not None and self.wants_logits:
            logits = batch.logits.cpu().numpy()
            assert layer.top_p is not None
            layer.top_p.add(logits, self._experts.record.router.score)
            if self._margins[batch.layer] and self._experts.top_k < count:
                ordered = -np.sort(-logits, axis=1)
                layer.margins.append(ordered[:, self._experts.top_k - 1] - ordered[:, self._experts.top_k])

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        raise AssertionError("sums of outputs were not asked for")

    def _fresh(self, layer: int) -> _Layer:
        return _Layer(
            CoActivation(self._count[layer]), TopP(self._experts.top_k) if self.wants_logits else None
        )

    def _close(self) -> None:
        """Turn the layer whose batches came last into figures."""
        if self._open is None:
            return
        number, layer = self._open
        self._open = None
        trace = _ordered(layer, len(self._lengths), self._count[number])
        settings = self._settings
        longest = int(trace.lengths.max(initial=0))
        sizes = sorted({max(trace.top_k, round(ratio * trace.top_k)) for ratio in settings.cache_ratios})
        self.pairs[number] = layer.pairs.pairs
        self._done[number] = {
            "top1_weight": layer.heaviest / layer.tokens,
            "margin": _margin(layer.margins),
            "norms": _norms(layer.norms),
            "pairs": [pair.document() for pair in layer.pairs.strongest(settings.pairs)],
            "segments": [
                segment_routing(trace, window, seed=settings.seed).document()
                for window in settings.windows
                if window <= longest
            ],
            "caches": [
                segment_caching(trace, size, settings.cache_window, cold=settings.cold, seed=settings.seed).document()
                for size in sizes
            ],
            "top_p": None if layer.top_p is None else layer.top_p.document(),
        }  # fmt: skip

    def finish(self) -> dict[int, dict[str, Any]]:
        """Return layer -> figures as plain data, after the pass."""
        self._close()
        return {layer: self._done[layer] for layer in sorted(self._done)}

    def state(self) -> dict[str, np.ndarray]:
        self._close()  # a layer is complete wherever a pass keeps its state
        figures = json.dumps({str(layer): found for layer, found in self._done.items()})
        found = {"figures": np.frombuffer(figures.encode(), dtype=np.uint8)}
        return found | {f"pairs {layer}": pairs for layer, pairs in self.pairs.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._open = None
        figures = json.loads(np.asarray(state["figures"]).tobytes())
        self._done = {int(layer): found for layer, found in figures.items()}
        self.pairs = {int(name[6:]): np.array(value) for name, value in state.items() if name.startswith("pairs ")}  # fmt: skip


def _ordered(layer: _Layer, samples: int, experts: int) -> Trace:
    """Return a layer's choices in the order of samples and positions, however they were batched."""
    numbers = np.concatenate(layer.samples)
    order = np.lexsort((np.concatenate(layer.positions), numbers))
    lengths = np.bincount(numbers, minlength=samples)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Trace(np.concatenate(layer.index)[order], offsets, experts)


def _margin(margins: list[np.ndarray]) -> dict[str, float] | None:
    if not margins:
        return None
    values = np.concatenate(margins).astype(np.float64)
    low, middle = np.quantile(values, [0.05, 0.5])
    return {"mean": float(values.mean()), "median": float(middle), "low": float(low)}


def _norms(found: np.ndarray) -> dict[str, float]:
    """Return mean norms and peaks of experts' outputs with and without first tokens, which often dominate them."""
    slots = found[:, 1].sum()
    return {
        "mean": float(found[:, 0].sum() / max(1.0, slots)),
        "peak": float(found[:, 2].max()),
        "mean_without_first": float(found[1, 0] / max(1.0, found[1, 1])),
        "peak_without_first": float(found[1, 2]),
    }
