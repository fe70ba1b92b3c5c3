"""The greedy solution on lower convex hulls, and the bound of the linear relaxation it comes with.

On each menu only the options on the lower convex hull of (size, loss) are looked at; steps from one to the next are
taken in the order of loss saved per byte. That solves the relaxation in which one group may be split, so the loss
at the first step that does not fit, taken in part, bounds every choice from below.

Source: Sinha and Zoltners, The Multiple-Choice Knapsack Problem (Operations Research 27, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from surgeon.quantize.allocation.menus import Menu


@dataclass(frozen=True)
class Step:
    """From one option on a hull to the next larger one.

    Attributes:
        slope: loss saved per byte.
        menu: number of the menu.
        option: number of the option it leads to.
        size: bytes more.
        saved: loss saved.
    """

    slope: float
    menu: int
    option: int
    size: int
    saved: float


@dataclass(frozen=True)
class Greedy:
    """A choice that fits, and the bound of all that do."""

    chosen: tuple[int, ...]
    size: int
    loss: float
    bound: float


def lower_hull(menu: Menu) -> list[int]:
    """Return the numbers of the options on the lower convex hull, from the smallest to the one of least loss."""
    hull: list[int] = []
    for number in menu.undominated():
        while len(hull) > 1 and _slope(menu, hull[-2], hull[-1]) <= _slope(menu, hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull


def _slope(menu: Menu, small: int, large: int) -> float:
    a, b = menu.options[small], menu.options[large]
    return (a.loss - b.loss) / (b.size - a.size)


def steps(menus: Sequence[Menu]) -> tuple[list[int], list[Step]]:
    """Return the smallest option of each menu, and all steps up, the best first."""
    smallest, found = [], []
    for number, menu in enumerate(menus):
        hull = lower_hull(menu)
        smallest.append(hull[0])
        for small, large in pairwise(hull):
            a, b = menu.options[small], menu.options[large]
            found.append(Step(_slope(menu, small, large), number, large, b.size - a.size, a.loss - b.loss))
    # A stable sort: slopes of one menu fall strictly, so its steps stay in their order.
    return smallest, sorted(found, key=lambda step: (-step.slope, step.menu))


def solve(menus: Sequence[Menu], budget: int) -> Greedy | None:
    """Return the greedy choice within ``budget`` bytes, or None when not even the smallest options fit."""
    chosen, ladder = steps(menus)
    size = sum(menu.options[number].size for menu, number in zip(menus, chosen, strict=True))
    if size > budget:
        return None
    start = math.fsum(menu.options[number].loss for menu, number in zip(menus, chosen, strict=True))
    saved: list[float] = []
    bound: float | None = None
    blocked: set[int] = set()
    for step in ladder:
        if step.menu in blocked:
            continue
        if size + step.size > budget:
            if bound is None:
                bound = start - math.fsum([*saved, (budget - size) * step.slope])
            blocked.add(step.menu)
            continue
        size += step.size
        saved.append(step.saved)
        chosen[step.menu] = step.option
    loss = math.fsum(menu.options[number].loss for menu, number in zip(menus, chosen, strict=True))
    return Greedy(tuple(chosen), size, loss, loss if bound is None else max(0.0, min(bound, loss)))


def frontier(menus: Sequence[Menu]) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes, growing, and the least losses of the relaxation there; between them the loss is linear."""
    smallest, ladder = steps(menus)
    first = [menu.options[number] for menu, number in zip(menus, smallest, strict=True)]
    sizes = np.cumsum([sum(o.size for o in first), *(step.size for step in ladder)], dtype=np.float64)
    losses = np.cumsum(
        [math.fsum(o.loss for o in first), *(-step.saved for step in ladder)], dtype=np.float64
    )
    return sizes, np.maximum(losses, 0.0)
