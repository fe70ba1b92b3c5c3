"""One level for each module, least total cost within a time budget: the multiple-choice knapsack by dynamic programming.

Time is counted above each module's fastest level, in equal buckets. A level's time is rounded to the
nearest bucket, so that errors cancel instead of adding up; the exact total of a solution is checked
before it is returned, and the next best one is taken when it does not fit. Where the times are whole
multiples of something (parameters, bytes) that is the bucket, and the solution is exact.

Source: SPDY (arXiv 2201.13096, section 3.2); rounding, repair and exact widths are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

EXACT = 4
"""Up to so many times the buckets asked for are spent where they make the solution exact."""


def solve(
    costs: Sequence[np.ndarray], times: Sequence[np.ndarray], budget: float, buckets: int = 10_000
) -> list[int] | None:
    """Return the level of each module, of least summed cost among those whose summed times fit the budget.

    Args:
        costs: for each module, the cost of each of its levels; infinity forbids a level.
        times: for each module, the time of each of its levels, at least 0, in any unit.
        budget: the most the times may add up to, in the same unit. It is never exceeded.
        buckets: how finely time is counted. With M modules the solution costs at most as much as the
            best one for a budget smaller by M/buckets of what can be chosen about.

    Returns:
        Level numbers, or None when not even the fastest levels fit. Of equal costs the lowest time counts.

    Raises:
        ValueError: no module, no level, a negative or undefined time, an undefined cost.
    """
    costs = [np.asarray(cost, dtype=np.float64) for cost in costs]
    times = [np.asarray(time, dtype=np.float64) for time in times]
    _check(costs, times)
    # A forbidden level cannot be the fastest one that everything is counted from.
    allowed = [np.flatnonzero(np.isfinite(cost)) for cost in costs]
    if any(not len(levels) for levels in allowed):
        return None
    fastest = [float(time[levels].min()) for time, levels in zip(times, allowed, strict=True)]
    room = budget - math.fsum(fastest)
    if not room >= 0:
        return None
    menus = [
        _undominated(cost[levels], time[levels] - least, levels, room)
        for cost, time, levels, least in zip(costs, times, allowed, fastest, strict=True)
    ]
    return _Table(menus, room, buckets).best(times, budget)


Menu = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Costs, times above the fastest and numbers of a module's levels that can be part of a solution."""


def _check(costs: Sequence[np.ndarray], times: Sequence[np.ndarray]) -> None:
    if not costs or len(costs) != len(times):
        raise ValueError(f"{len(costs)} modules have costs and {len(times)} have times")
    for module, (cost, time) in enumerate(zip(costs, times, strict=True)):
        if cost.ndim != 1 or cost.shape != time.shape or not len(cost):
            raise ValueError(f"module {module} has {cost.shape} costs and {time.shape} times")
        if np.isnan(cost).any() or (cost == -np.inf).any():
            raise ValueError(f"module {module} has an undefined cost")
        if not (np.isfinite(time).all() and (time >= 0).all()):
            raise ValueError(f"module {module} has a negative or undefined time")


def _undominated(cost: np.ndarray, extra: np.ndarray, levels: np.ndarray, room: float) -> Menu:
    """Drop levels that do not fit, or that another level beats in both cost and time."""
    order = np.lexsort((levels, cost, extra))
    order = order[extra[order] <= room]
    best = np.minimum.accumulate(cost[order])
    order = order[np.r_[True, cost[order][1:] < best[:-1]]]
    return cost[order], extra[order], levels[order]


def _width(menus: Sequence[Menu], room: float, buckets: int) -> float:
    """Return the size of a bucket: the greatest common divisor of all times when that is affordable."""
    finest = room / buckets
    extras = np.concatenate([extra for _, extra, _ in menus])
    extras = extras[extras > 0]
    if len(extras) and (extras == np.floor(extras)).all() and extras.max() < 2**53:
        divisor = float(reduce(math.gcd, (int(extra) for extra in np.unique(extras))))
        if room / divisor <= EXACT * buckets:
            return divisor
    return finest


class _Table:
    """The least cost of the modules so far for every bucket of time they take, and how it was reached."""

    def __init__(self, menus: Sequence[Menu], room: float, buckets: int) -> None:
        self._menus = menus
        count = len(menus)
        width = _width(menus, room, max(buckets, 4 * count)) if room > 0 else 1.0
        # Rounded up everywhere, a solution that fits exactly lies half a bucket for each module too high.
        self._size = math.floor(room / width) + count // 2 + 1
        self._steps = [np.rint(extra / width).astype(np.int64) for _, extra, _ in menus]
        self._taken: list[np.ndarray] = []
        least = np.full(self._size, np.inf)
        least[0] = 0.0
        for (cost, _, _), steps in zip(menus, self._steps, strict=True):
            least = self._add(least, cost, steps)
        self.least = least

    def _add(self, least: np.ndarray, cost: np.ndarray, steps: np.ndarray) -> np.ndarray:
        found = np.full(self._size, np.inf)
        taken = np.zeros(self._size, dtype=np.int32)
        for level in range(len(cost)):
            step = int(steps[level])
            if step >= self._size:
                continue
            reached = least[: self._size - step] + cost[level]
            # Strictly better: of equals the faster level stays, and so does the first in a fixed order.
            better = reached < found[step:]
            np.copyto(found[step:], reached, where=better)
            taken[step:][better] = level
        self._taken.append(taken)
        return found

    def best(self, times: Sequence[np.ndarray], budget: float) -> list[int] | None:
        """Return the cheapest solution whose exact time fits."""
        for bucket in np.argsort(self.least, kind="stable"):
            if not np.isfinite(self.least[bucket]):
                break
            levels = self._levels(int(bucket))
            if math.fsum(time[level] for time, level in zip(times, levels, strict=True)) <= budget:
                return levels
        return None

    def _levels(self, bucket: int) -> list[int]:
        found = []
        for (_, _, numbers), steps, taken in zip(
            reversed(self._menus), reversed(self._steps), reversed(self._taken), strict=True
        ):
            level = int(taken[bucket])
            found.append(int(numbers[level]))
            bucket -= int(steps[level])
        return found[::-1]
