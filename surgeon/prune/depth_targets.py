"""How many layers to keep for a speedup, from measured times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from surgeon.errors import UsageError
from surgeon.prune.depth_ranking import FEWEST, DepthRanking
from surgeon.search import knapsack
from surgeon.structure.cut import LayerShape

EQUAL = 1e-9
"""Relative difference below which layer times are the same."""


class Times(Protocol):
    """What a table of latencies says; `surgeon.measure.table.LatencyTable` is one."""

    rest: float

    def layer(self, shape: LayerShape) -> float:
        """Return the seconds of one layer."""
        ...


def layer_times(table: Times, shapes: Sequence[LayerShape]) -> list[float]:
    """Return the seconds of each layer."""
    return [table.layer(shape) for shape in shapes]


def ladder(rest: float, times: Sequence[float], drops: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Return (layers kept, speedup) of each drop set of a ranking, slowest first.

    Args:
        rest: seconds outside the layers.
        times: seconds of each layer.
        drops: ``DepthRanking.drops``.
    """
    dense = rest + math.fsum(times)
    return [
        (len(times) - len(drop), dense / (dense - math.fsum(times[layer] for layer in drop)))
        for drop in drops
    ]


def layers_to_keep(rest: float, times: Sequence[float], speedup: float) -> int:
    """Return the most layers that may stay, all costing the same: floor((T0 / s - rest) / t).

    Not N / s: embeddings and output head cost the same with fewer layers.

    Args:
        rest: seconds outside the layers.
        times: seconds of each layer, equal; otherwise use `choose`.
        speedup: wanted.

    Raises:
        UsageError: E275 more than dropping all but two layers can give, or not above 1.
    """
    if max(times) - min(times) > EQUAL * max(times):
        raise ValueError("the layers cost differently")
    _check(rest, times, speedup)
    each = math.fsum(times) / len(times)
    return math.floor((_dense(rest, times) / speedup - rest) / each + EQUAL)


def choose(ranking: DepthRanking, rest: float, times: Sequence[float], speedup: float) -> tuple[int, ...]:
    """Return the layers to drop for a speedup, ascending.

    Where all layers cost the same this is the ranking's own set. Otherwise (sliding and full attention,
    dense and expert layers) it is the set of least summed importance that frees enough time: dropping
    costs add up there, which they do only roughly.

    Args:
        ranking: of the layers.
        rest: seconds outside the layers.
        times: seconds of each layer.
        speedup: wanted.

    Raises:
        UsageError: E275 out of reach, E278 the ranking does not go far enough.
    """
    _check(rest, times, speedup)
    if max(times) - min(times) <= EQUAL * max(times):
        return ranking.dropped(layers_to_keep(rest, times, speedup))
    if not any(
        score is not None for score in ranking.importance
    ):  # even spacing has no opinion on single layers
        for drop, (_, reached) in zip(ranking.drops, ladder(rest, times, ranking.drops), strict=True):
            if reached >= speedup * (1 - EQUAL):
                return drop
        raise _unreachable(speedup, ladder(rest, times, ranking.drops)[-1][1])
    may = {layer for drop in ranking.drops for layer in drop}
    costs = [
        np.array([0.0, score if score is not None and layer in may else np.inf])
        for layer, score in enumerate(ranking.importance)
    ]
    budget = (_dense(rest, times) / speedup - rest) * (1 + EQUAL)
    levels = knapsack.solve(costs, [np.array([time, 0.0]) for time in times], budget)
    drop = () if levels is None else tuple(layer for layer, level in enumerate(levels) if level)
    if levels is None or len(times) - len(drop) < FEWEST:
        raise _unreachable(speedup, _best(rest, times, may))
    return drop


def _dense(rest: float, times: Sequence[float]) -> float:
    return rest + math.fsum(times)


def _best(rest: float, times: Sequence[float], may: set[int]) -> float:
    """Return the largest speedup when only these layers may go."""
    slowest = sorted(may, key=lambda layer: -times[layer])[: len(times) - FEWEST]
    return _dense(rest, times) / (_dense(rest, times) - math.fsum(times[layer] for layer in slowest))


def _check(rest: float, times: Sequence[float], speedup: float) -> None:
    most = _best(rest, times, set(range(len(times))))
    if not 1 < speedup <= most * (1 + EQUAL):
        raise _unreachable(speedup, most)


def _unreachable(speedup: float, most: float) -> UsageError:
    return UsageError("E275", f"dropping layers cannot make the model {speedup:g} times as fast",
                      help=f"above 1 and up to {most:.2f} is possible here; width pruning goes further")  # fmt: skip
