"""From learned thresholds to numbers of units that a machine likes and a budget holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from surgeon.errors import UsageError
from surgeon.train.cost import Cost, Key


@dataclass(frozen=True)
class Learned:
    """Scores of one structure's units and its threshold, on the scale of the mean score.

    Attributes:
        scores: float64 [units].
        threshold: tau.
        grid: kept numbers are multiples of it, or all.
        least: units that stay in any case.
    """

    scores: np.ndarray
    threshold: float
    grid: int = 1
    least: int = 1

    def order(self) -> np.ndarray:
        """Return the units from the best to the worst, equal ones by number."""
        return np.argsort(-self.scores, kind="stable")

    def allowed(self) -> list[int]:
        """Return the numbers of units that may be kept, ascending."""
        units = len(self.scores)
        counts = {count for count in range(self.grid, units, self.grid) if count >= self.least}
        return sorted(counts | {units})

    def passing(self) -> int:
        """Return how many units reach the threshold."""
        return max(self.least, int((self.scores >= self.threshold).sum()))


def freeze(learned: Mapping[Key, Learned], cost: Cost, target: float) -> dict[Key, int]:
    """Return how many units of each structure stay; the best of each do.

    Numbers that pass the threshold are rounded up to the grid. While that costs too much, the step of a
    grid goes whose units exceed their threshold least per unit of cost they are not worth: the lowest
    mean margin s^ - tau. Then steps come back, the best first, as long as one fits. So the result costs at
    most ``target``, and no further step of any structure fits below it.

    Args:
        learned: by structure.
        cost: of numbers of units.
        target: in the cost's unit.

    Raises:
        UsageError: E292 the target is below the least cost.
    """
    levels = {key: one.allowed() for key, one in learned.items()}
    check_target(learned, cost, target)
    place = {
        key: next(n for n, count in enumerate(levels[key]) if count >= one.passing()) for key, one in learned.items()
    }  # fmt: skip
    margins = {key: -np.sort(-one.scores) - one.threshold for key, one in learned.items()}

    def kept() -> dict[Key, int]:
        return {key: levels[key][n] for key, n in place.items()}

    def margin(key: Key, n: int) -> float:
        """Return the mean margin of the units between level n and the next."""
        return float(margins[key][levels[key][n] : levels[key][n + 1]].mean())

    limit = target * (1 + 1e-12)
    total = cost.of(kept())
    while total > limit:
        worst = min(
            (key for key in place if place[key] > 0), key=lambda key: (margin(key, place[key] - 1), key)
        )
        place[worst] -= 1
        total = cost.of(kept())
    while True:
        fits = []
        for key, n in place.items():
            if n + 1 < len(levels[key]):
                more = cost.of(kept() | {key: levels[key][n + 1]})
                if more <= limit:
                    fits.append((-margin(key, n), key))
        if not fits:
            return kept()
        place[min(fits)[1]] += 1


def check_target(learned: Mapping[Key, Learned], cost: Cost, target: float) -> None:
    """Refuse a target that not even the least number of units of every structure reaches (E292)."""
    least = cost.of({key: one.allowed()[0] for key, one in learned.items()})
    if least > target * (1 + 1e-12):
        raise UsageError("E292", f"a cost of {target:,.6g} {cost.unit} is out of reach: the least is {least:,.6g}",
                         help=f"ask for {least / cost.dense:.3f} of the whole or more, or prune more kinds of structures")  # fmt: skip


def kept_units(learned: Mapping[Key, Learned], counts: Mapping[Key, int]) -> dict[Key, tuple[int, ...]]:
    """Return the numbers of the units that stay, ascending."""
    return {key: tuple(sorted(int(n) for n in learned[key].order()[:count])) for key, count in counts.items()}
