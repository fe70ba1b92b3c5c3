"""How many experts to remove, which, and at how many bits to keep the others: one program, solved exactly.

A removed expert is a format of 0 bytes whose loss is what removing it costs. A model's configuration names one
number of experts, so the same number P goes from every layer; where a router limits tokens to some of G groups of
neighbouring experts, its rows are cut at fixed borders, so P / G go from every group. Where a layer has one width for all its experts, the
best set for given P and width is known in closed form: the P experts (of each group: P / G) with the smallest (removal loss - loss at that
width) go. What is left is a choice of one width for each layer, once for each P; written as a single integer program
the same problem does not close in a minute. Where every expert has a width of its own, one integer program with P as
a variable is quick.

Losses of removing and of quantizing add up less well than those of quantizing alone (the router's weights are
normalised anew, others see other inputs): measure both again on the pruned model and solve once more with P fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from surgeon.quantize.allocation import hull, milp
from surgeon.quantize.allocation.menus import Menu, Option, too_small


@dataclass(frozen=True)
class Joint:
    """What stays and how.

    Attributes:
        count: experts removed from every layer.
        removed: bool [L, E].
        columns: width of each expert, int64 [L, E]; -1 where it is removed.
        loss: predicted, the sum over all experts.
        size: bytes of all experts that stay.
        status: "optimal", "time limit" or "greedy".
    """

    count: int
    removed: np.ndarray
    columns: np.ndarray
    loss: float
    size: int
    status: str = "optimal"


def by_layer(
    kept: np.ndarray,
    removal: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    *,
    active: int,
    counts: Iterable[int] | None = None,
    groups: int = 1,
    seconds: float = 60.0,
    gap: float = 0.0,
) -> Joint:
    """Return the best P, sets of experts, and one width for each layer.

    Args:
        kept: loss of each expert at each width, [L, E, J], finite, at least 0.
        removal: loss of removing it, [L, E]; infinity protects it.
        sizes: bytes of one expert of each layer at each width (with its row of the router), whole numbers [L, J].
        budget: bytes of all experts that stay.
        active: experts that a token selects; at least so many stay.
        counts: the P to choose among, multiples of ``groups``; all possible ones by default.
        groups: of neighbouring experts, each of which loses equally many.
        seconds: for each solve.
        gap: see `surgeon.quantize.allocation.milp.solve`.

    Raises:
        UsageError: E462 no P fits the budget.
    """
    kept, removal, sizes = _checked(kept, removal, sizes)
    permitted = _counts(counts, kept.shape[1], active, removal, groups)
    problems = _Decomposition(kept, removal, sizes, groups)
    bounded = []
    for count in permitted:
        relaxed = hull.solve(problems.menus(count), budget)
        if relaxed is not None:
            bounded.append((relaxed.bound, count))
    if not bounded:
        raise too_small(f"a size of {budget:,} bytes of experts", f"{problems.least(permitted):,} bytes")
    best: Joint | None = None
    for bound, count in sorted(bounded):
        if best is not None and bound >= best.loss:
            break
        found = milp.solve(problems.menus(count), budget, seconds=seconds, gap=gap)
        if best is None or (found.loss, found.size) < (best.loss, best.size):
            best = problems.joint(count, [int(option.name) for option in found.options], found.status)
    assert best is not None
    return best


class _Decomposition:
    """For every P, layer and width: the best set to remove, and its loss."""

    def __init__(self, kept: np.ndarray, removal: np.ndarray, sizes: np.ndarray, groups: int) -> None:
        self._kept, self._removal, self._sizes, self._groups = kept, removal, sizes, groups
        layers, experts, widths = kept.shape
        extra = (removal[:, :, None] - kept).reshape(layers, groups, experts // groups, widths)
        # Stable: of equals the lower number goes.
        self._order = np.argsort(extra, axis=2, kind="stable")
        spent = np.cumsum(np.take_along_axis(extra, self._order, axis=2), axis=2).sum(axis=1)
        none = np.zeros((layers, 1, widths))
        # By experts that go from each group.
        self._losses = kept.sum(axis=1)[:, None, :] + np.concatenate([none, spent], axis=1)

    def menus(self, count: int) -> list[Menu]:
        """Return one menu for each layer, its options named by the number of the width."""
        layers, experts, widths = self._kept.shape
        stay, each = experts - count, count // self._groups
        return [
            Menu(f"{layer:06}", tuple(Option(str(j), stay * int(self._sizes[layer, j]),
                                             max(0.0, float(self._losses[layer, each, j]))) for j in range(widths)))
            for layer in range(layers)
        ]  # fmt: skip

    def least(self, counts: Iterable[int]) -> int:
        """Return the bytes of the smallest choice."""
        return min(sum(menu.least for menu in self.menus(count)) for count in counts)

    def joint(self, count: int, widths: list[int], status: str) -> Joint:
        """Return the result for one width a layer."""
        experts = self._kept.shape[1]
        columns = np.repeat(np.asarray(widths, dtype=np.int64)[:, None], experts, axis=1)
        size, each = experts // self._groups, count // self._groups
        for layer, width in enumerate(widths):
            for group in range(self._groups):
                columns[layer, group * size + self._order[layer, group, :each, width]] = -1
        return _joint(columns, self._kept, self._removal, self._sizes, status)


def _joint(
    columns: np.ndarray, kept: np.ndarray, removal: np.ndarray, sizes: np.ndarray, status: str
) -> Joint:
    """Add up a result from its parts."""
    removed = columns < 0
    loss, size = [], 0
    for layer, expert in np.ndindex(*columns.shape):
        column = int(columns[layer, expert])
        loss.append(float(removal[layer, expert] if column < 0 else kept[layer, expert, column]))
        size += 0 if column < 0 else int(sizes[layer, column])
    return Joint(int(removed[0].sum()), removed, columns, math.fsum(loss), size, status)


def by_expert(
    kept: np.ndarray,
    removal: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    *,
    active: int,
    counts: Iterable[int] | None = None,
    groups: int = 1,
    seconds: float = 60.0,
    gap: float = 1e-4,
) -> Joint:
    """Return the best P, sets of experts, and a width for each expert that stays; arguments as in `by_layer`.

    ``counts`` must be an unbroken range (of multiples of ``groups``) here. The result of `by_layer`, which is one of the possible ones, is
    returned when the solver finds none better in time.

    Raises:
        UsageError: E462 no P fits the budget.
    """
    kept, removal, sizes = _checked(kept, removal, sizes)
    permitted = _counts(counts, kept.shape[1], active, removal, groups)
    if permitted != list(range(permitted[0], permitted[-1] + 1, groups)):
        raise ValueError(f"counts {permitted} leave gaps")
    known = by_layer(
        kept, removal, sizes, budget, active=active, counts=permitted, groups=groups, seconds=seconds
    )
    if known.loss <= 0:
        return known
    bounds = permitted[0] // groups, permitted[-1] // groups
    places, program = _program(kept, removal, sizes, budget, bounds, known.loss, groups)
    found = milp.minimize(program, known.loss, seconds, gap)
    if found is None:
        return Joint(known.count, known.removed, known.columns, known.loss, known.size, "greedy")
    columns = np.full(removal.shape, -1, dtype=np.int64)
    for (layer, expert, column), taken in zip(places, found.taken, strict=True):
        if taken:
            columns[layer, expert] = column
    status = "optimal" if found.optimal else "time limit"
    result = _joint(columns, kept, removal, sizes, status)
    if result.loss <= known.loss:
        return result
    return Joint(known.count, known.removed, known.columns, known.loss, known.size, status)


def _program(
    kept: np.ndarray,
    removal: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    counts: tuple[int, int],
    limit: float,
    groups: int,
) -> tuple[list[tuple[int, int, int]], milp.Program]:
    """Return (layer, expert, width or -1) of each variable, and the program with P / groups as an integer beside them."""
    layers, experts, widths = kept.shape
    places = [(layer, expert, j) for layer in range(layers) for expert in range(experts) for j in range(-1, widths)
              if (removal[layer, expert] if j < 0 else kept[layer, expert, j]) <= limit]  # fmt: skip
    losses = np.array([removal[layer, e] if j < 0 else kept[layer, e, j] for layer, e, j in places])
    bytes_of = [0 if j < 0 else int(sizes[layer, j]) for layer, _, j in places]
    group = np.array([layer * experts + e for layer, e, _ in places])
    each, parts = experts // groups, layers * groups
    gone = [(number, layer * groups + e // each) for number, (layer, e, j) in enumerate(places) if j < 0]
    # In each group of each layer as many variables of removal are 1 as the integer says, the last column.
    at = [part for _, part in gone] + list(range(parts))
    columns = [number for number, _ in gone] + [len(places)] * parts
    rows = sparse.csr_matrix(([1.0] * len(gone) + [-1.0] * parts, (at, columns)), (parts, len(places) + 1))
    return places, milp.Program(group, bytes_of, losses, budget, rows, (counts,))


def _checked(
    kept: np.ndarray, removal: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kept, removal = np.asarray(kept, dtype=np.float64), np.asarray(removal, dtype=np.float64)
    sizes = np.asarray(sizes)
    if kept.ndim != 3 or removal.shape != kept.shape[:2] or sizes.shape != (kept.shape[0], kept.shape[2]):
        raise ValueError(f"losses {kept.shape}, removals {removal.shape}, sizes {sizes.shape}")
    if not (np.isfinite(kept).all() and (kept >= 0).all() and (removal >= 0).all()):
        raise ValueError("losses below 0, or undefined")
    if not np.issubdtype(sizes.dtype, np.integer) or (sizes <= 0).any():
        raise ValueError("sizes are no whole numbers above 0")
    return kept, removal, sizes


def removable(removal: np.ndarray, groups: int = 1) -> int:
    """Return how many experts can go from every layer, equally many from each group, when infinite losses stay."""
    layers, experts = removal.shape
    return groups * int(np.isfinite(removal).reshape(layers, groups, experts // groups).sum(axis=2).min())


def _counts(
    counts: Iterable[int] | None, experts: int, active: int, removal: np.ndarray, groups: int
) -> list[int]:
    """Return the P that leave enough experts for every token and every protected one."""
    if not 1 <= active <= experts or experts % groups:
        raise ValueError(f"{active} active of {experts} experts in {groups} groups")
    most = min(experts - active, removable(removal, groups))
    wanted = range(most + 1) if counts is None else sorted(set(counts))
    permitted = [count for count in wanted if 0 <= count <= most and count % groups == 0]
    if not permitted:
        raise ValueError(f"none of {list(wanted)} experts can go: at most {most} can")
    return permitted
