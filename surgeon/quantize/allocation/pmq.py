"""Bit widths of routed experts under an average, exactly: pre-loading mixed-precision quantization (PMQ).

    minimise sum_i phi_i^alpha w_i^beta sum_j eps_ij^gamma x_ij   subject to   sum_j x_ij = 1,   sum_ij size_ij x_ij <= B,
    and, if asked for, at least one expert at each width that must appear

phi_i is how often expert i is selected, w_i its mean routing probability, eps_ij what the block's output changes by
when only this expert is stored at width j. No solver is needed: a dynamic program over experts, whose state is the
size so far and which widths have appeared, is exact; a second one over layers (min-plus convolution) shares one
budget between them. Costs are counted in whole multiples of 2^-60 of their sum, so their sums do not depend on
the order they are taken in and ties are decided by rule: the smaller total, then more bits for the expert of higher
priority, then for the lower number.

Sources: MC-MoE (arXiv 2410.06270, section 3.2), MC# (arXiv 2510.10962). The dynamic program, the budget over all
layers, byte sizes, pinned experts and the tie rule are ours. gamma is 1 by default, which the published allocations
agree with; the paper's text says 2. Multiplying phi by w counts frequency twice; that is the paper's formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from surgeon.errors import InputError, UsageError

INFINITE = np.int64(1 << 61)
"""Cost of what cannot be; two of them still fit into 64 bits."""

WORK = 20_000_000_000
"""Additions that are still affordable (half a minute)."""

MEMORY = 1 << 30
"""Bytes that may be spent on the ways back through the tables."""


def importance(
    frequency: np.ndarray,
    weight: np.ndarray,
    error: np.ndarray,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
) -> np.ndarray:
    """Return the costs of one layer, phi^alpha w^beta eps^gamma, [n, J] or [n, P, J].

    Args:
        frequency: phi [n], how often each expert was selected, divided by the tokens.
        weight: w [n], its routing probability summed over the tokens that selected it, divided by all tokens.
        error: eps [n, J] (or [n, P, J] by projection), Frobenius norm of the change of the block's output.
        alpha: exponent of the frequency.
        beta: exponent of the routing weight.
        gamma: exponent of the error.

    Source: MC-MoE (arXiv 2410.06270, equation 5). Factors are divided by their sums over the layer as its code does.
    """
    phi, share = (np.asarray(v, dtype=np.float64) for v in (frequency, weight))
    phi, share = (v / v.sum() if v.sum() > 0 else v for v in (phi, share))
    factor = phi**alpha * share**beta
    error = np.asarray(error, dtype=np.float64)
    # 0^0 is 1 in the formula's code, but an expert without a token costs nothing whatever the exponents.
    factor[np.asarray(frequency) == 0] = 0.0
    return factor.reshape(-1, *([1] * (error.ndim - 1))) * error**gamma


def effective_bits(bits: int, group: int = 128, symmetric: bool = False, scale_bits: int = 16) -> float:
    """Return the bits that a parameter takes with its share of scale and zero point: 3 -> 3.148 at group 128."""
    return bits + (scale_bits + (0 if symmetric else bits)) / group


@dataclass(frozen=True)
class Experts:
    """What can be chosen in one layer: rows are experts, or projections of experts, or the layer as a whole.

    Attributes:
        costs: float64 [n, J], at least 0; infinity forbids a width for a row.
        sizes: whole numbers [n, J]: bytes, or nominal bits.
        must: columns that must appear in at least one row.
        pinned: row -> column fixed beforehand (super experts); charged to the budget.
        priority: [n], larger first where costs are equal; phi * w in the paper's terms.
    """

    costs: np.ndarray
    sizes: np.ndarray
    must: tuple[int, ...] = ()
    pinned: Mapping[int, int] = field(default_factory=dict)
    priority: np.ndarray | None = None

    def __post_init__(self) -> None:
        costs, sizes = np.asarray(self.costs), np.asarray(self.sizes)
        if costs.ndim != 2 or costs.shape != sizes.shape or 0 in costs.shape:
            raise ValueError(f"costs {costs.shape} and sizes {sizes.shape}")
        if not np.issubdtype(sizes.dtype, np.integer) or (sizes < 0).any():
            raise ValueError("sizes are no whole numbers of at least 0")
        if np.isnan(costs).any() or (costs < 0).any():
            raise ValueError("costs below 0, or undefined")
        if not np.isfinite(self.allowed()).any(axis=1).all():
            raise ValueError("a row without any width")

    def allowed(self) -> np.ndarray:
        """Return the costs with what pinning excludes at infinity, [n, J]."""
        costs = np.array(self.costs, dtype=np.float64)
        for row, column in self.pinned.items():
            others = np.arange(costs.shape[1]) != column
            costs[row, others] = np.inf
        return costs

    def order(self) -> list[int]:
        """Return the rows from the least to the most important."""
        count = len(self.costs)
        priority = np.zeros(count) if self.priority is None else np.asarray(self.priority)
        return sorted(range(count), key=lambda row: (priority[row], -row))

    def base(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's smallest allowed size [n], and the sizes above it [n, J], 0 where forbidden."""
        sizes = np.asarray(self.sizes).astype(np.int64)
        allowed = np.isfinite(self.allowed())
        least = np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=1)
        return least, np.where(allowed, sizes - least[:, None], 0)

    def interval(self) -> tuple[int, int]:
        """Return the least and the largest total size of any allocation that obeys pins and widths that must appear.

        Raises:
            UsageError: E462 the widths that must appear cannot all appear.
        """
        allowed, sizes = np.isfinite(self.allowed()), np.asarray(self.sizes)
        full = (1 << len(self.must)) - 1
        low: dict[int, int] = {0: 0}
        high: dict[int, int] = {0: 0}
        for row in range(len(sizes)):
            options = [(self.flag(j), int(sizes[row, j])) for j in range(sizes.shape[1]) if allowed[row, j]]
            low = _extended(low, options, min)
            high = _extended(high, options, max)
        if full not in low:
            raise UsageError("E462", f"{len(self.must)} widths must each appear in a layer where {len(sizes)} experts "
                             f"({len(self.pinned)} of them pinned) cannot show them all",
                             help="leave out the rule that widths must appear")  # fmt: skip
        return low[full], high[full]

    def flag(self, column: int) -> int:
        """Return the bit that stands for a width having appeared; 0 where it need not."""
        return 1 << self.must.index(column) if column in self.must else 0


def _extended(states: dict[int, int], options: list[tuple[int, int]], pick) -> dict[int, int]:
    found: dict[int, int] = {}
    for flags, total in states.items():
        for flag, size in options:
            reached = flags | flag
            value = total + size
            found[reached] = pick(value, found.get(reached, value))
    return found


def tied(costs: np.ndarray, sizes: np.ndarray, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return costs and sizes of rows that must share a width: their sums.

    This is how granularities come about: rows are projections; tie gate and up (``projection``), all projections of
    an expert (``expert``), or everything in a layer (``layer``, which every runtime loads).

    Args:
        costs: [R, J].
        sizes: [R, J].
        groups: group of each row, 0 to G - 1.

    Returns:
        Costs [G, J] and sizes [G, J].
    """
    count = max(groups) + 1
    summed = np.zeros((count, costs.shape[1]))
    total = np.zeros((count, costs.shape[1]), dtype=np.int64)
    np.add.at(summed, np.asarray(groups), costs)
    np.add.at(total, np.asarray(groups), sizes)
    return summed, total


def granularity(name: str, costs: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of one layer at a granularity from values by projection.

    Args:
        name: "projection", "expert" or "layer".
        costs: [n, P, J], where P counts projections that may differ (gate and up together).
        sizes: [n, P, J].

    Returns:
        Costs and sizes [n * P, J], [n, J] or [1, J].
    """
    count, parts, _ = costs.shape
    groups = {"projection": np.arange(count * parts), "expert": np.repeat(np.arange(count), parts),
              "layer": np.zeros(count * parts, dtype=int)}[name]  # fmt: skip
    return tied(costs.reshape(count * parts, -1), sizes.reshape(count * parts, -1), groups.tolist())


@dataclass(frozen=True)
class Widths:
    """An allocation: the column of each row of each layer, what it costs and how large it is."""

    columns: tuple[np.ndarray, ...]
    cost: float
    size: int


def solve(
    layers: Sequence[Experts], budget: int | Sequence[int], *, exact: bool = False, unit: str = "bytes"
) -> Widths:
    """Return the allocation of least cost.

    Args:
        layers: what can be chosen.
        budget: in the unit of the sizes: one for all layers together, or one for each layer.
        exact: the total equals the budget (the paper's form) instead of staying within it.
        unit: of the sizes, for messages.

    Raises:
        UsageError: E462 no allocation; names the interval within which there are some.
        InputError: E465 the sizes have no common unit that makes the program affordable.
    """
    if not isinstance(budget, int | np.integer):
        if len(budget) != len(layers):
            raise ValueError(f"{len(budget)} budgets for {len(layers)} layers")
        each = [
            solve([one], int(own), exact=exact, unit=unit) for one, own in zip(layers, budget, strict=True)
        ]
        return Widths(tuple(one.columns[0] for one in each), math.fsum(one.cost for one in each),
                      sum(one.size for one in each))  # fmt: skip
    least = most = 0
    for one in layers:
        low, high = one.interval()
        least, most = least + low, most + high
    if budget < least or (exact and budget > most):
        raise _infeasible(int(budget), least, most, unit)
    found = _Program(layers, int(budget), exact).solve()
    if found is None:
        raise _infeasible(int(budget), least, most, unit)
    cost = math.fsum(float(one.costs[row, column])
                     for one, columns in zip(layers, found, strict=True) for row, column in enumerate(columns))  # fmt: skip
    size = sum(int(one.sizes[row, column])
               for one, columns in zip(layers, found, strict=True) for row, column in enumerate(columns))  # fmt: skip
    return Widths(tuple(found), cost, size)


def _infeasible(budget: int, least: int, most: int, unit: str) -> UsageError:
    return UsageError("E462", f"no widths of the experts add up to {budget:,} {unit}: totals lie between {least:,} and {most:,}",
                      help="ask for a total within that interval")  # fmt: skip


def solve_average(
    costs: np.ndarray,
    widths: Sequence[int],
    average: float,
    *,
    must: Sequence[int] = (),
    exact: bool = False,
    pinned: Mapping[int, int] | None = None,
    priority: np.ndarray | None = None,
) -> np.ndarray:
    """Return the width of each expert of one layer for an average of nominal bits: the paper's program.

    Args:
        costs: [n, J], see `importance`.
        widths: the J widths, in bits.
        average: bits; scales and zero points are not counted (`effective_bits` tells what they add).
        must: widths that must appear; the paper asks for one expert at 3 bits and one at 2.
        exact: the average is met exactly instead of at most.
        pinned: expert -> width.
        priority: [n], see `Experts`.

    Returns:
        int64 [n], bits.

    Raises:
        UsageError: E462 with the averages that are possible.
    """
    count, columns = len(costs), {width: number for number, width in enumerate(widths)}
    sizes = np.tile(np.asarray(widths, dtype=np.int64), (count, 1))
    one = Experts(costs, sizes, tuple(columns[width] for width in must),
                  {row: columns[width] for row, width in (pinned or {}).items()}, priority)  # fmt: skip
    total, whole = average * count, round(average * count)
    # 4 / 3 as a double, three times, is 4.
    if abs(total - whole) < 1e-9 * count:
        total = whole
    low, high = one.interval()
    possible = not exact or (total == whole and total <= high)
    if total < low or not possible:
        steps = f", in steps of {1 / count:g}" if exact else ""
        raise UsageError("E462", f"an average of {average:g} bits is not possible for {count} experts: averages lie between "
                         f"{low / count:g} and {high / count:g}{steps}", help="ask for an average within that interval")  # fmt: skip
    found = solve([one], math.floor(total), exact=exact, unit="bits")
    return np.asarray(widths, dtype=np.int64)[found.columns[0]]


class _Program:
    """Two dynamic programs: over the rows of each layer, and over the layers."""

    def __init__(self, layers: Sequence[Experts], budget: int, exact: bool) -> None:
        self._exact = exact
        bases = [one.base() for one in layers]
        steps = [extra for _, extra in bases]
        self._room = budget - sum(int(least.sum()) for least, _ in bases)
        self._unit = math.gcd(*(int(step) for extra in steps for step in np.unique(extra))) or 1
        self._possible = self._room >= 0 and (not exact or self._room % self._unit == 0)
        self._states = max(self._room, 0) // self._unit + 1
        sizes = [int(extra.max(axis=1).sum()) // self._unit + 1 for extra in steps]
        # Beyond the largest total there is nothing to tell apart.
        full = sum(sizes) - len(sizes) + 1
        if exact and self._states > full:
            self._possible = False
        self._states = min(self._states, full)
        self._sizes = [min(size, self._states) for size in sizes]
        self._afford(layers)
        if self._possible:
            scale = _scale(layers)
            self._tables = [_Table(one, extra // self._unit, size, scale)
                            for one, extra, size in zip(layers, steps, self._sizes, strict=True)]  # fmt: skip

    def _afford(self, layers: Sequence[Experts]) -> None:
        cells = sum(
            size * len(one.costs) << len(one.must) for one, size in zip(layers, self._sizes, strict=True)
        )
        between = sum(self._sizes) * self._states if len(layers) > 1 else 0
        work = cells * layers[0].costs.shape[1] + between
        if work > WORK or 2 * cells + 4 * len(layers) * self._states > MEMORY:
            raise InputError("E465", f"the sizes of the experts share no unit above {self._unit:,} bytes, which makes "
                             f"{self._states:,} totals to tell apart: too many for the exact program",
                             help="allocate by the general solver, or use formats whose sizes are multiples of each other")  # fmt: skip

    def solve(self) -> list[np.ndarray] | None:
        """Return the columns of each layer, or None."""
        if not self._possible:
            return None
        least = np.full(self._states, INFINITE)
        least[0] = 0
        taken: list[np.ndarray] = []
        # From the last layer to the first: where costs are equal the first decides first, and takes more.
        for table in reversed(self._tables):
            least, share = _convolved(least, table.least)
            taken.append(share)
        total = self._states - 1 if self._exact else int(np.argmin(least))
        if least[total] >= INFINITE:
            return None
        found = []
        for table, share in zip(self._tables, reversed(taken), strict=True):
            own = int(share[total])
            found.append(table.columns(own))
            total -= own
        return found


def _scale(layers: Sequence[Experts]) -> float:
    """Return how many units of cost make up 1: the largest costs of all rows together are 2^60 units."""
    total = 0.0
    for one in layers:
        costs = one.allowed()
        total += float(np.where(np.isfinite(costs), costs, 0.0).max(axis=1).sum())
    return float(1 << 60) / total if total > 0 else 1.0


def _convolved(before: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least cost of every total of both, and how much of it is the second's (the most, of equals)."""
    best = np.full(len(before), INFINITE)
    share = np.zeros(len(before), dtype=np.int32)
    for size in np.flatnonzero(own < INFINITE).tolist():
        reached = before[: len(before) - size] + own[size]
        better = reached <= best[size:]
        best[size:][better] = reached[better]
        share[size:][better] = size
    return np.minimum(best, INFINITE), share


class _Table:
    """Least cost of one layer for every total size, and the way back.

    The state is the size so far and which of the widths that must appear have appeared.
    """

    def __init__(self, experts: Experts, steps: np.ndarray, states: int, scale: float) -> None:
        self._experts, self._steps, self._order = experts, steps, experts.order()
        self._full = (1 << len(experts.must)) - 1
        allowed = experts.allowed()
        # More bits first: of equal costs the first one found stays.
        self._columns = [
            j for j in np.argsort(-np.asarray(experts.sizes).max(axis=0), kind="stable").tolist()
        ]
        self._costs = np.where(
            np.isfinite(allowed), np.rint(np.where(np.isfinite(allowed), allowed, 0) * scale), -1
        )
        least = np.full((self._full + 1, states), INFINITE)
        least[0, 0] = 0
        self._back: list[tuple[np.ndarray, np.ndarray]] = []
        for row in self._order:
            least = self._row(least, row)
        self.least = least[self._full]

    def _row(self, least: np.ndarray, row: int) -> np.ndarray:
        found = np.full_like(least, INFINITE)
        column_of = np.zeros(least.shape, dtype=np.uint8)
        flags_of = np.zeros(least.shape, dtype=np.uint8)
        sizes = self._steps[row]
        for column in sorted(self._columns, key=lambda j: -sizes[j]):
            step, cost = int(sizes[column]), self._costs[row, column]
            if cost < 0 or step >= least.shape[1]:
                continue
            for flags in range(self._full + 1):
                into = flags | self._experts.flag(column)
                reached = least[flags, : least.shape[1] - step] + np.int64(cost)
                better = reached < found[into, step:]
                found[into, step:][better] = reached[better]
                column_of[into, step:][better] = column
                flags_of[into, step:][better] = flags
        self._back.append((column_of, flags_of))
        return np.minimum(found, INFINITE)

    def columns(self, total: int) -> np.ndarray:
        """Return the column of each row in the best way to reach ``total``."""
        found = np.zeros(len(self._order), dtype=np.int64)
        flags = self._full
        for row, (column_of, flags_of) in zip(reversed(self._order), reversed(self._back), strict=True):
            column = int(column_of[flags, total])
            found[row] = column
            flags = int(flags_of[flags, total])
            total -= int(self._steps[row, column])
        return found


def with_pins(experts: Experts, rows: Sequence[int]) -> Experts:
    """Return the layer with some rows (super experts) pinned at their largest allowed size."""
    allowed = np.isfinite(experts.allowed())
    sizes = np.where(allowed, np.asarray(experts.sizes), -1)
    return replace(experts, pinned={**experts.pinned, **{row: int(np.argmax(sizes[row])) for row in rows}})
