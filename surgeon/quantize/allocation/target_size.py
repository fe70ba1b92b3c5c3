"""What people ask for, turned into byte budgets: a file size, bits per parameter, or a divergence that was measured.

Predicted sizes leave one thing open: how long the headers of the files get. A size is therefore solved for with an
upper bound, the files are then laid out exactly, and groups are made smaller until the total fits. A divergence
cannot be predicted well enough at all (the sum of single losses is optimistic at few bits), so sizes are searched
for with plans that are really measured, few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from surgeon.errors import UsageError
from surgeon.quantize.allocation import hull
from surgeon.quantize.allocation.menus import Allocation, Alternative, too_small
from surgeon.quantize.allocation.milp import best, every_alternative, solve_alternatives

PLANS = 6
"""So many plans are measured at most for a target divergence."""

AIM = 0.97
"""Share of a target divergence that predictions aim at: a plan slightly above it is worth nothing."""

CLOSE = 0.9
"""A plan whose divergence is at least this share of the target is close enough."""

NARROW = 0.005
"""Sizes closer than this, relative to the larger, are not told apart."""

PUSH = 0.01
"""How far from a size that was measured the next one lies at least, relative to it."""


def for_size(
    alternatives: Sequence[Alternative],
    target: int,
    measured: Callable[[Allocation], int],
    *,
    seconds: float = 60.0,
    gap: float = 1e-4,
) -> Allocation:
    """Return the best allocation whose weight files take at most ``target`` bytes.

    Args:
        alternatives: families of formats; headers and ``fixed`` are upper bounds.
        target: bytes of all weight files.
        measured: returns the exact bytes of all weight files of an allocation, headers included.
        seconds: for each solve.
        gap: see `surgeon.quantize.allocation.milp.solve`.

    Raises:
        UsageError: E462 not even the smallest options fit.
    """
    counted = [alternative.with_headers() for alternative in alternatives]
    allocations = every_alternative(counted, target, seconds=seconds, gap=gap)
    solved = {allocation.alternative for allocation in allocations}
    # Where the bound on headers alone makes a family too large, its smallest choice may still fit exactly.
    allocations += [_smallest(one) for one in counted if one.name not in solved]
    fitting, least = [], None
    for allocation in allocations:
        shrunk, size = _downgraded(_plain(allocation, alternatives), target, measured)
        if size <= target:
            fitting.append(shrunk)
        least = size if least is None else min(least, size)
    if not fitting:
        raise too_small(f"a size of {target:,} bytes", f"{least or 0:,} bytes")
    return best(fitting)


def _smallest(alternative: Alternative) -> Allocation:
    menus = tuple(sorted(alternative.menus, key=lambda menu: menu.name))
    chosen = tuple(menu.undominated()[0] for menu in menus)
    return Allocation(menus, chosen, alternative=alternative.name, fixed=alternative.fixed)


def _plain(allocation: Allocation, alternatives: Sequence[Alternative]) -> Allocation:
    """Return the allocation with headers no longer counted in the sizes."""
    source = next(one for one in alternatives if one.name == allocation.alternative)
    named = {menu.name: menu for menu in source.menus}
    return replace(allocation, menus=tuple(named[menu.name] for menu in allocation.menus))


def _downgraded(
    allocation: Allocation, target: int, measured: Callable[[Allocation], int]
) -> tuple[Allocation, int]:
    """Make the cheapest groups smaller until the files fit, or until nothing can be made smaller."""
    size = measured(allocation)
    while size > target:
        step = _cheapest(allocation, size - target)
        if step is None:
            break
        allocation = allocation.with_option(*step, downgrade=True)
        size = measured(allocation)
    return allocation, size


def _cheapest(allocation: Allocation, excess: int) -> tuple[int, int] | None:
    """Return (menu, option) of the smaller option that costs least.

    Of those that save the excess alone, the one that adds the least loss; when none does, the one that adds the
    least loss for each byte.
    """
    enough: tuple[float, int, int, int] | None = None
    part: tuple[float, int, int, int] | None = None
    for group, (menu, now) in enumerate(zip(allocation.menus, allocation.options, strict=True)):
        for number, option in enumerate(menu.options):
            saved, added = now.size - option.size, option.loss - now.loss
            if saved >= excess and saved > 0:
                enough = min(filter(None, (enough, (added, saved, group, number))))
            elif saved > 0:
                part = min(filter(None, (part, (added / saved, -saved, group, number))))
    found = enough or part
    return None if found is None else found[2:]


def for_bits(
    alternatives: Sequence[Alternative], bits: float, *, seconds: float = 60.0, gap: float = 1e-4
) -> Allocation:
    """Return the best allocation of at most ``bits`` bits per parameter of the quantizable matrices.

    Counted are codes, scales, zero points and groups left as they are, divided by the parameters of all menus;
    everything else in the files (``fixed``, headers) is not.

    Raises:
        UsageError: E462 the smallest options take more.
        ValueError: a menu without parameters.
    """
    if any(menu.parameters <= 0 for one in alternatives for menu in one.menus):
        raise ValueError("menus without parameters have no bits")
    found, least = [], math.inf
    for one in alternatives:
        parameters = sum(menu.parameters for menu in one.menus)
        bare = replace(one, fixed=0)
        # As the decimal that was written: 4.35 as a double is a little less than what was meant. A quotient that
        # was computed is as little off; a thousandth of a byte is nothing.
        budget = math.floor(Fraction(str(bits)) * parameters / 8 + Fraction(1, 1000))
        least = min(least, 8 * bare.least / parameters)
        for allocation in every_alternative([bare], budget, seconds=seconds, gap=gap):
            found.append(replace(allocation, fixed=one.fixed))
    if not found:
        shown = math.ceil(1000 * least) / 1000
        raise too_small(f"an average of {bits:g} bits", f"{shown:g} bits, scales and zero points included")
    return best(found)


@dataclass(frozen=True)
class Measured:
    """One plan of a search for a divergence."""

    allocation: Allocation
    divergence: float

    @property
    def size(self) -> int:
        """Bytes, with what is fixed."""
        return self.allocation.fixed + self.allocation.size


def for_kl(
    alternatives: Sequence[Alternative],
    target: float,
    measure: Callable[[Allocation], float],
    *,
    scale: float | None = None,
    plans: int = PLANS,
    seconds: float = 60.0,
    gap: float = 1e-4,
) -> tuple[Allocation, list[Measured]]:
    """Return the smallest allocation found whose measured divergence is at most ``target``, and all plans measured.

    Sizes are bracketed by measured plans: one that diverges too much, one that does not. Between them the
    divergence is taken to be a multiple of the predicted loss that changes steadily, which names the next size;
    where that leads nowhere, the middle is taken.

    Args:
        alternatives: families of formats.
        target: divergence of the whole plan, nats per token, above 0.
        measure: returns the true divergence of an allocation. Called at most ``plans`` times.
        scale: divergence for each unit of loss, where it is known (1 for losses that are divergences).
        plans: how many are measured at most, at least 2.
        seconds: for each solve.
        gap: see `surgeon.quantize.allocation.milp.solve`.

    Raises:
        UsageError: E462 even the largest options diverge more.
        ValueError: a target that is not above 0, fewer than two plans.
    """
    if not target > 0 or plans < 2:
        raise ValueError(f"a divergence of {target} with {plans} plans")
    search = _Search(alternatives, target, scale)
    done: list[Measured] = []
    while len(done) < plans and not search.ended:
        last = len(done) == plans - 1
        size = search.largest if last and search.good is None else search.next_size()
        allocation = solve_alternatives(alternatives, size, seconds=seconds, gap=gap)
        if any(allocation.by_group() == one.allocation.by_group() for one in done):
            search.repeated(size, allocation)
            if search.ended:
                break
            continue
        divergence = measure(allocation)
        if math.isnan(divergence):
            divergence = math.inf
        done.append(Measured(allocation, divergence))
        search.learn(done[-1], size)
    if search.good is None:
        nearest = min(done, key=lambda one: one.divergence)
        raise UsageError("E462", f"a divergence of {target:g} cannot be reached: the largest formats allowed leave "
                         f"{nearest.divergence:.3g}", help="raise the target, or allow more bits")  # fmt: skip
    return search.good.allocation, done


class _Search:
    """The bracket of sizes: below ``low`` plans diverge too much, ``good`` is the smallest that does not."""

    def __init__(self, alternatives: Sequence[Alternative], target: float, scale: float | None) -> None:
        self._fronts = []
        for one in alternatives:
            sizes, losses = hull.frontier(one.menus)
            self._fronts.append((sizes + one.fixed, losses))
        self._target, self._scale = target, scale
        self.low = int(min(one.least for one in alternatives))
        self.largest = int(max(one.most for one in alternatives))
        self._high = self.largest
        self.good: Measured | None = None
        self._bad: Measured | None = None
        self._push = PUSH / 2
        self._low_tried = False
        self.ended = False

    def next_size(self) -> int:
        """Return the next size to try, inside the bracket."""
        if self.good is None and self.largest - self.low <= self._tolerance():
            return self.largest
        wanted = self._wanted_loss()
        size = -1 if wanted is None else self._size_of(wanted)
        if wanted is not None and self._low_tried and size <= self.low:
            # Formats change in steps, so a size a little above can still mean the plan that was measured.
            size = self.low + self._pushed()
        elif self.good is not None and size >= self._high:
            size = self._high - self._pushed()
        inside = self.low < size < self._high or (size == self.low and not self._low_tried)
        return size if inside else (self.low + self._high) // 2

    def _pushed(self) -> int:
        """Return a distance from the end of the bracket, twice as far each time."""
        self._push *= 2
        return math.ceil(self._push * self.low)

    def learn(self, found: Measured, size: int) -> None:
        """Narrow the bracket by a plan that was measured."""
        if found.divergence <= self._target:
            self.good, self._high = found, min(size, found.size)
            if found.divergence >= CLOSE * self._target:
                self.ended = True
        else:
            # The plan is the best one up to the size that was asked for, not only up to its own.
            self._bad, self.low, self._low_tried = found, max(size, self.low), True
        self._end_when_narrow()

    def repeated(self, size: int, allocation: Allocation) -> None:
        """Narrow the bracket by a size that led to a plan that is already measured."""
        if self.good is not None and allocation.by_group() == self.good.allocation.by_group():
            self._high = min(size, self._high)
        else:
            self.low, self._low_tried = max(size, self.low), True
        self._end_when_narrow()

    def _end_when_narrow(self) -> None:
        if self.good is None:
            self.ended |= self.low >= self.largest
        elif self._high <= self.low or (self._low_tried and self._high - self.low <= self._tolerance()):
            self.ended = True

    def _tolerance(self) -> int:
        return max(1, math.floor(NARROW * self._high))

    def _wanted_loss(self) -> float | None:
        """Return the predicted loss at which the target is expected, or None when nothing is known."""
        known = [one for one in (self._bad, self.good)
                 if one is not None and one.allocation.loss > 0 and 0 < one.divergence < math.inf]  # fmt: skip
        aim = AIM * self._target
        if not known:
            return aim / self._scale if self._scale else None
        if len(known) == 1:
            return known[0].allocation.loss * aim / known[0].divergence
        # Between two plans the divergence follows the loss by a power.
        x, y = ([math.log(value) for value in values] for values in (
            [one.allocation.loss for one in known], [one.divergence for one in known]))  # fmt: skip
        if x[0] == x[1] or y[0] == y[1]:
            return None
        return math.exp(x[0] + (math.log(aim) - y[0]) * (x[1] - x[0]) / (y[1] - y[0]))

    def _size_of(self, loss: float) -> int:
        """Return the least size at which some alternative is predicted to lose at most ``loss``."""
        found = []
        for sizes, losses in self._fronts:
            if losses[-1] <= loss:
                found.append(math.ceil(np.interp(-loss, -losses, sizes)))
        return min(found, default=self.largest)
