"""Block influence: drop the layers that turn the residual stream least (ShortGPT, arXiv 2403.03853).

``BI_j = 1 - mean over tokens of cos(h_j, h_{j+1})`` with h_j the residual stream entering layer j.
All scores come from one pass over the dense model, and the smallest go at once: what a drop does to later layers is
not seen. On a sentence encoder BI ranked layer 0 among the least important although dropping it was
the second-worst choice, so the first and the last layer are protected unless asked otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from torch.nn import functional

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where
from surgeon.prune.depth_ranking import DepthMethod, DepthRanking, droppable, most_drops
from surgeon.prune.layer_sweep import LayerSweep

SMALLEST = 1e-8
"""Norms below this count as zero vectors, which turn nothing: their cosine is 1."""


def rank(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    drop: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> DepthRanking:
    """Return layers by ascending block influence, the deeper one first among equals.

    Args:
        checkpoint: the model.
        samples: token ids, one array each.
        settings: where and how it runs; cosines are float32 or wider whatever its precision.
        drop: most layers to drop, None for as many as can go.
        protect_first, protect_last: layers that are never dropped; None protects one each.
        progress: called with (layers done, layers).
        stop: set it to stop.

    Raises:
        UsageError: E278 impossible numbers.
        InputError: E384 the model's activations are not finite.
    """
    scores = influences(checkpoint, samples, settings, progress=progress, stop=stop)
    layers = len(scores)
    first = 1 if protect_first is None else protect_first
    last = 1 if protect_last is None else protect_last
    free = droppable(layers, first, last)
    order = sorted(free, key=lambda layer: (scores[layer], -layer))[: most_drops(layers, len(free), drop)]
    drops = tuple(tuple(sorted(order[:count])) for count in range(len(order) + 1))
    return DepthRanking(
        "block_influence", layers, drops, (0.0, *(scores[layer] for layer in order)), tuple(scores)
    )


def influences(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> list[float]:
    """Return the block influence of every layer: between 0 (turns nothing) and 2."""
    found: list[float] = []
    with LayerSweep(checkpoint, samples, settings, streams=2, stop=stop) as sweep:
        entering, leaving = 0, 1
        sweep.embed(entering)
        for layer in sweep.over(range(sweep.layers)):
            sweep.advance(layer, [(entering, leaving)])
            total = sum(_turned(sweep, number, entering, leaving) for number in range(len(sweep.batches)))
            score = total / sweep.tokens
            if not np.isfinite(score):
                raise InputError("E384", f"layer {layer} of {checkpoint.label} gives values that are not finite",
                                 where=Where(checkpoint.label),
                                 help="its weights are damaged, or the precision is too narrow: try bfloat16 or float32")  # fmt: skip
            found.append(max(0.0, score))
            entering, leaving = leaving, entering
            if progress is not None:
                progress(layer + 1, sweep.layers)
    return found


def _turned(sweep: LayerSweep, batch: int, entering: int, leaving: int) -> float:
    """Return the sum over tokens of 1 - cos, float64.

    It is |a/|a| - b/|b||^2 / 2, which is exactly 0 for equal vectors where 1 - cos rounds.
    """
    before, after = (sweep.real(batch, sweep.get(stream, batch)).float() for stream in (entering, leaving))
    zero = (before.norm(dim=-1) < SMALLEST) | (after.norm(dim=-1) < SMALLEST)
    apart = functional.normalize(before, dim=-1) - functional.normalize(after, dim=-1)
    return float((apart.square().sum(-1).double() / 2).masked_fill(zero, 0.0).sum())


METHOD = DepthMethod(
    rank, needs_text=True, summary="drop the layers that turn the hidden states least; one pass"
)
