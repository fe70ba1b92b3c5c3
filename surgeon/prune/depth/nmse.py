"""Normalised MSE: drop the layer whose absence changes the model's output least, then look again.

``s_j = sum ||M(x) - M_{-j}(x)||^2 / sum ||M(x)||^2`` for every layer that is left, always against
the dense model M; the layer with the smallest goes, and all others are scored again without it
(Nemotron Elastic, arXiv 2511.16664, which compares logits). Here the last hidden state behind the
final norm is compared unless logits are asked for. The damage of a set of layers is not monotone (EvoPress, arXiv
2410.14649), so the greedy choice is a heuristic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where
from surgeon.prune.depth_ranking import DepthMethod, DepthRanking, droppable, layer_count, most_drops
from surgeon.prune.removal_damage import Part, RemovalDamage, smallest

Progress = Callable[[int, int], None]


def rank(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    drop: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    on: str = "hidden",
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> DepthRanking:
    """Return layers in the order they go.

    `surgeon.prune.removal_damage.estimate` says what it costs.

    Args:
        checkpoint: the model.
        samples: token ids, one array each; 32 to 128 sequences are usual.
        settings: where and how it runs.
        drop: most layers to drop, None for as many as can go; each costs a sweep over the model.
        protect_first, protect_last: layers that are never dropped; none unless asked.
        on: "hidden" compares the last hidden state, "logits" the logits.
        progress: called with (layers done, about how many in all).
        stop: set it to stop.

    Returns:
        ``scores[k]`` is the damage without the k layers, ``importance`` that without one layer.

    Raises:
        UsageError: E277 ``on`` is unknown, E278 impossible numbers.
        InputError: E319 the configuration gives no number of layers; E320 skipping any layer makes the
            output infinite; E384 the model's own is.
    """
    layers = layer_count(checkpoint)
    free = droppable(layers, protect_first or 0, protect_last or 0)
    wanted = most_drops(layers, len(free), drop)
    candidates: list[Part] = [(layer, "layer") for layer in free]
    gone: list[Part] = []
    scores, importance, notes = [0.0], [None] * layers, []
    with RemovalDamage(checkpoint, samples, settings, candidates, on=on, stop=stop) as damage:
        for number in range(wanted):
            left = [part for part in candidates if part not in gone]
            told = None if progress is None else partial(_tell, progress, number, layers, wanted)
            found = damage.round(gone, left, told)
            if number == 0:
                importance = [found.get((layer, "layer")) for layer in range(layers)]
            notes += _infinite(found, gone)
            least = smallest(found)
            if found[least] == float("inf"):
                raise InputError("E320", f"{checkpoint.label} gives infinite values whichever layer is skipped",
                                 where=Where(checkpoint.label), help="use another precision: bfloat16 or float32")  # fmt: skip
            gone.append(least)
            scores.append(found[least])
    order = [layer for layer, _ in gone]
    drops = tuple(tuple(sorted(order[:count])) for count in range(len(order) + 1))
    return DepthRanking("nmse", layers, drops, tuple(scores), tuple(importance), tuple(notes))


def _tell(progress: Progress, number: int, layers: int, rounds: int, layer: int) -> None:
    progress(number * layers + layer + 1, rounds * layers)


def _infinite(found: dict[Part, float], gone: Sequence[Part]) -> list[str]:
    bad = [str(layer) for (layer, _), score in found.items() if score == float("inf")]
    if not bad:
        return []
    beside = f" beside {', '.join(str(layer) for layer, _ in gone)}" if gone else ""
    return [f"without layer {', '.join(bad)}{beside} the model gives values that are not finite"]


METHOD = DepthMethod(
    rank, needs_text=True, summary="drop the layer the output misses least, one after the other"
)
