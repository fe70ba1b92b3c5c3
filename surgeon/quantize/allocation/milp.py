"""One option for each group, of least summed loss within a budget: the multiple-choice knapsack as an integer program.

    minimise sum_ib loss_ib x_ib   subject to   sum_b x_ib = 1,   sum_ib size_ib x_ib <= B,   x binary

HiGHS solves it with tolerances. Sizes are therefore counted above the smallest and in units of what is left to
spend, losses in units of the greedy choice's; what comes back is added up again in whole bytes, and a choice that
exceeds the budget by less than the tolerance is cut off before solving again. The greedy choice on convex hulls
stands beside every solution as a cross-check, and in its place when it is better.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from surgeon.quantize.allocation import hull
from surgeon.quantize.allocation.menus import Allocation, Alternative, Menu, ordered, too_small

CUTS = 50
"""Choices that exceed the budget within the solver's tolerance are cut off at most so often."""


@dataclass(frozen=True)
class Program:
    """Binary variables in groups of which exactly one is 1.

    Attributes:
        group: group of each variable, 0 to G - 1.
        sizes: bytes of each variable, whole numbers.
        losses: of each variable.
        budget: bytes.
        rows: further constraints ``rows @ [x, integers] = 0``, [R, V + C], or None.
        integers: (lower, upper) of each of the C further integer variables.
    """

    group: np.ndarray
    sizes: Sequence[int]
    losses: np.ndarray
    budget: int
    rows: sparse.csr_matrix | None = None
    integers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Solution:
    """Variables that are 1, values of the further integers, a lower bound, and whether it was proven optimal."""

    taken: np.ndarray
    integers: tuple[int, ...]
    bound: float
    optimal: bool


def minimize(program: Program, unit: float, seconds: float, gap: float) -> Solution | None:
    """Return the best choice within the budget, exactly in bytes; None when the solver found none in time.

    Args:
        program: what to solve.
        unit: loss that counts as 1: that of a known choice.
        seconds: after which the best choice so far counts.
        gap: relative distance from the optimum that is good enough.
    """
    count, extra = len(program.sizes), len(program.integers)
    sizes = np.array(program.sizes, dtype=object)
    spare, excess = _spare(program.group, sizes, program.budget)
    one = sparse.csr_matrix(
        (np.ones(count), (program.group, np.arange(count))), (program.group.max() + 1, count + extra)
    )
    rows = [LinearConstraint(one, 1, 1)]  # type: ignore[arg-type]
    if program.rows is not None:
        rows.append(LinearConstraint(program.rows, 0, 0))  # type: ignore[arg-type]
    weight = np.zeros((1, count + extra))
    weight[0, :count] = [float(e) / spare for e in excess] if spare else [float(bool(e)) for e in excess]
    rows.append(LinearConstraint(weight, -np.inf, 1.0 if spare else 0.0))
    objective = np.r_[program.losses / unit, np.zeros(extra)]
    lower = np.r_[np.zeros(count), [low for low, _ in program.integers]]
    upper = np.r_[np.ones(count), [high for _, high in program.integers]]
    for _ in range(CUTS):
        with silent_output():
            found = milp(objective, integrality=np.ones(count + extra), bounds=Bounds(lower, upper), constraints=rows,
                         options={"mip_rel_gap": gap, "time_limit": seconds})  # fmt: skip
        if found.x is None:
            return None
        taken = found.x[:count] > 0.5
        if sum(sizes[taken]) <= program.budget:
            bound = 0.0 if found.mip_dual_bound is None else float(found.mip_dual_bound) * unit
            whole = tuple(round(value) for value in found.x[count:])
            return Solution(taken, whole, bound, found.status == 0)
        rows.append(LinearConstraint(_cover(program.group, sizes, taken, extra), -np.inf, taken.sum() - 1))
    return None


@contextmanager
def silent_output() -> Iterator[None]:
    """Keep what compiled code writes to standard output out of it.

    HiGHS prints lines of its own debugging there, whatever it is told, into the one JSON document that a caller reads.
    """
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can reach it
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what its library still buffers would come out later
        os.dup2(kept, 1)
        os.close(nothing)
        os.close(kept)


def _spare(group: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[int, list[int]]:
    """Return what is left when every group takes its smallest, and each variable's size above that."""
    least: dict[int, int] = {}
    for number, size in zip(group.tolist(), sizes, strict=True):
        least[number] = min(size, least.get(number, size))
    excess = [size - least[number] for number, size in zip(group.tolist(), sizes, strict=True)]
    return budget - sum(least.values()), excess


def _cover(group: np.ndarray, sizes: np.ndarray, taken: np.ndarray, extra: int) -> np.ndarray:
    """Return the row of an extended cover: no fitting choice takes at least these sizes in every group."""
    chosen = dict(zip(group[taken].tolist(), sizes[taken], strict=True))
    row = [float(size >= chosen[number]) for number, size in zip(group.tolist(), sizes, strict=True)]
    return np.array([[*row, *[0.0] * extra]])


def solve(menus: Sequence[Menu], budget: int, *, seconds: float = 60.0, gap: float = 1e-4) -> Allocation:
    """Return the choice of least loss whose sizes add up to at most ``budget`` bytes.

    Equal menus, in any order, give equal choices (unless the time runs out).

    Args:
        menus: one for each group.
        budget: bytes.
        seconds: after which the best choice so far counts.
        gap: relative distance from the optimum that is good enough.

    Raises:
        UsageError: E462 the smallest options exceed the budget.
    """
    menus = ordered(menus)
    greedy = hull.solve(menus, budget)
    if greedy is None:
        least = sum(menu.least for menu in menus)
        raise too_small(f"a size of {budget:,} bytes", f"{least:,} bytes")
    if greedy.loss <= greedy.bound * (1 + gap):
        # With thousands of groups the bound alone proves it good enough.
        return Allocation(menus, greedy.chosen, greedy.bound, greedy.loss)
    places, program = _program(menus, budget, greedy.loss)
    found = minimize(program, greedy.loss, seconds, gap)
    if found is None:
        return Allocation(menus, greedy.chosen, greedy.bound, greedy.loss, "greedy")
    chosen = [0] * len(menus)
    for (menu, option), taken in zip(places, found.taken, strict=True):
        if taken:
            chosen[menu] = option
    status = "optimal" if found.optimal else "time limit"
    bound = max(0.0, found.bound, greedy.bound)
    result = Allocation(menus, tuple(chosen), bound, greedy.loss, status)
    return result if result.loss <= greedy.loss else replace(result, chosen=greedy.chosen)


def _program(menus: Sequence[Menu], budget: int, limit: float) -> tuple[list[tuple[int, int]], Program]:
    """Return (menu, option) of each variable and the program, without options that lose more than ``limit`` alone."""
    places = [(number, option) for number, menu in enumerate(menus) for option in menu.undominated()
              if menu.options[option].loss <= limit]  # fmt: skip
    options = [menus[number].options[option] for number, option in places]
    group = np.array([number for number, _ in places])
    losses = np.array([option.loss for option in options])
    return places, Program(group, [option.size for option in options], losses, budget)


def solve_alternatives(
    alternatives: Sequence[Alternative], budget: int, *, seconds: float = 60.0, gap: float = 1e-4
) -> Allocation:
    """Return the best choice over all families of formats: one solve each, the least loss wins.

    Of equal losses the smaller wins, then the one whose family is listed first.

    Args:
        alternatives: at least one.
        budget: bytes, including what each alternative leaves fixed.
        seconds: for each solve.
        gap: see `solve`.

    Raises:
        UsageError: E462 not even the smallest choice of any family fits.
    """
    found = every_alternative(alternatives, budget, seconds=seconds, gap=gap)
    if not found:
        least = min(alternative.least for alternative in alternatives)
        raise too_small(f"a size of {budget:,} bytes", f"{least:,} bytes")
    return best(found)


def every_alternative(
    alternatives: Sequence[Alternative], budget: int, *, seconds: float = 60.0, gap: float = 1e-4
) -> list[Allocation]:
    """Return the best choice of each family of formats that fits ``budget`` bytes, what is fixed included."""
    if not alternatives:
        raise ValueError("no alternative")
    found = []
    for one in alternatives:
        if one.least <= budget:
            result = solve(one.menus, budget - one.fixed, seconds=seconds, gap=gap)
            found.append(replace(result, alternative=one.name, fixed=one.fixed))
    return found


def best(allocations: Sequence[Allocation]) -> Allocation:
    """Return the allocation of least loss; of equals the smallest, then the first."""
    finite = [one for one in allocations if math.isfinite(one.loss)]
    return min(finite, key=lambda one: (one.loss, one.fixed + one.size))
