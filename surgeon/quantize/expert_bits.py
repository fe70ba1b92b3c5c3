"""A width for every expert, expert's projection, or layer of experts under an average: PMQ on measured scores.

    found = expert_bits(scores, menu, 2.5, elements=elements)        # scores: surgeon.quantize.measuring.pmq_scores

Costs are phi^alpha w^beta eps^gamma, the program is solved exactly (`surgeon.quantize.allocation.pmq`). The average is
over the parameters of the experts: of nominal bits, as the papers count, or of stored bits with scales, zero points and
padding. It holds for every layer (the papers' form) or for all layers together, which is never worse. Super experts get the
largest width, and so does a layer that holds one where layers have one width each; that is charged, and not in the papers.
Matrices that lie in one tensor of the file (GGUF: a projection of all experts of a layer) are one row of the program.

Sources: MC-MoE (arXiv 2410.06270, section 3.2), MC# (arXiv 2510.10962).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from surgeon.errors import UsageError
from surgeon.formats.scheme import Scheme
from surgeon.quantize.allocation import pmq

Granularity = Literal["expert", "layer", "projection"]
Scope = Literal["layer", "model"]
Count = Literal["nominal", "stored"]


class Scores(Protocol):
    """What is known of one layer of n experts in J schemes, as `surgeon.quantize.measuring.pmq_scores` measures it.

    Attributes:
        layer: its number.
        schemes: names of the schemes, as in the menu.
        members: of each expert, the labels of its matrices; where ``error`` is by projection, a tuple of them for each.
        frequency: phi, float64 [n].
        weight: w, float64 [n].
        error: eps, float64 [n, J], or [n, P, J] by projection (gate and up together).
        sizes: bytes, of the shape of ``error``.
        super_experts: those that must not lose anything.
    """

    @property
    def layer(self) -> int: ...
    @property
    def schemes(self) -> tuple[str, ...]: ...
    @property
    def members(self) -> tuple[tuple[Any, ...], ...]: ...
    @property
    def frequency(self) -> np.ndarray: ...
    @property
    def weight(self) -> np.ndarray: ...
    @property
    def error(self) -> np.ndarray: ...
    @property
    def sizes(self) -> np.ndarray: ...
    @property
    def super_experts(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class ExpertBits:
    """Widths of experts.

    Attributes:
        schemes: label of a matrix -> its scheme.
        cost: predicted, the sum over rows.
        nominal: bits of a parameter of the experts, without scales.
        stored: the same with everything that is stored.
        unused: (layer, expert) that no token selected: they cost nothing in any scheme, and get the smallest.
        pinned: (layer, expert) that have the largest.
    """

    schemes: dict[str, Scheme]
    cost: float
    nominal: float
    stored: float
    unused: tuple[tuple[int, int], ...]
    pinned: tuple[tuple[int, int], ...]

    def record(self) -> dict[str, Any]:
        """Return plain data for a manifest; experts as "layer:expert"."""
        return {
            "cost": self.cost, "bits": self.nominal, "stored_bits": self.stored,
            "unused": [f"{layer}:{expert}" for layer, expert in self.unused],
            "pinned": [f"{layer}:{expert}" for layer, expert in self.pinned],
        }  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """What can be chosen in one layer: R rows, each of some matrices."""

    costs: np.ndarray
    stored: np.ndarray
    nominal: np.ndarray
    members: tuple[tuple[str, ...], ...]
    pinned: tuple[int, ...]
    priority: np.ndarray


def expert_bits(
    scores: Sequence[Scores], menu: Sequence[Scheme], average: float, *, elements: Mapping[str, int],
    granularity: Granularity = "expert", scope: Scope = "layer", count: Count = "nominal", must: Sequence[int] = (),
    ties: Sequence[Sequence[str]] = (), alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0,
) -> ExpertBits:  # fmt: skip
    """Return the scheme of every matrix of the experts.

    Args:
        scores: of every layer of experts.
        menu: the schemes they were measured in.
        average: bits of a parameter, at most.
        elements: label of a matrix -> its parameters.
        granularity: what shares a width.
        scope: what the average holds for: every layer, or all of them together.
        count: what is averaged.
        must: widths that must appear among the rows of each layer (the paper: 3 and 2), or, where layers have one width
            each, among the layers.
        ties: labels of matrices that have to share a scheme, whatever the granularity; those of a tie lie in one layer.
        alpha, beta, gamma: exponents of frequency, routing weight and error.

    Raises:
        UsageError: E462 no widths have this average; E488 the scores cannot decide what is asked.
        InputError: E465 the stored sizes have too many totals to tell apart.
    """
    columns = _columns(menu, must)
    layers = [_tied(_rows(one, menu, elements, granularity, (alpha, beta, gamma)), ties) for one in scores]
    together = granularity == "layer" and scope == "model"
    if together:  # one row a layer: they are the rows of one program, so that widths can appear among them
        layers = [_joined(layers)]
    elif granularity == "layer" and len(columns) > 1:
        raise UsageError("E488", "several widths cannot appear in a layer whose experts share one",
                         help="use the budget of the whole model, or leave out the widths that must appear")  # fmt: skip
    problems, budgets = [], []
    for rows in layers:
        sizes = rows.nominal if count == "nominal" else 8 * rows.stored
        parameters = sum(elements[label] for labels in rows.members for label in labels)
        problems.append(
            pmq.with_pins(pmq.Experts(rows.costs, sizes, columns, priority=rows.priority), rows.pinned)
        )
        # 2.4 as a double, times a million parameters, may lie just below the whole number it means.
        budgets.append(average * parameters + 1e-9 * parameters)
    budget = math.floor(sum(budgets)) if scope == "model" else [math.floor(own) for own in budgets]
    found = pmq.solve(problems, budget, unit="bits")
    return _result(scores, layers, menu, found, elements)


def _columns(menu: Sequence[Scheme], must: Sequence[int]) -> tuple[int, ...]:
    """Return the columns of widths that must appear."""
    found = []
    for width in dict.fromkeys(must):
        at = [column for column, scheme in enumerate(menu) if scheme.bits == width]
        if len(at) != 1:
            raise UsageError("E488", f"{width} bits must appear, and the menu has {len(at)} schemes of that width",
                             help="the menu is " + ", ".join(scheme.name for scheme in menu))  # fmt: skip
        found.append(at[0])
    return tuple(found)


def _rows(
    scores: Scores, menu: Sequence[Scheme], elements: Mapping[str, int], granularity: Granularity,
    exponents: tuple[float, float, float],
) -> _Rows:  # fmt: skip
    """Return the rows of one layer at a granularity."""
    names = tuple(scheme.name for scheme in menu)
    if tuple(scores.schemes) != names:
        raise ValueError(f"scores in {scores.schemes} and a menu of {names}")
    alpha, beta, gamma = exponents
    costs = pmq.importance(scores.frequency, scores.weight, scores.error, alpha=alpha, beta=beta, gamma=gamma)
    sizes, members = np.asarray(scores.sizes), scores.members
    if costs.ndim == 2:
        if granularity == "projection":
            raise UsageError("E488", "the scores are of whole experts; they do not tell projections apart",
                             help="choose widths by expert or by layer")  # fmt: skip
        costs, sizes, members = costs[:, None], sizes[:, None], tuple((labels,) for labels in members)
    bits = np.array([scheme.bits for scheme in menu], dtype=np.int64)
    held = np.array(
        [[sum(elements[label] for label in part) for part in parts] for parts in members], dtype=np.int64
    )
    nominal = held[:, :, None] * bits
    summed, stored = pmq.granularity(granularity, costs, sizes)
    priority = np.asarray(scores.frequency) * np.asarray(scores.weight)
    parts = [tuple(part) for own in members for part in own]
    each = costs.shape[1]
    if granularity == "projection":
        rows, pinned = (
            parts,
            [expert * each + part for expert in scores.super_experts for part in range(each)],
        )
        priority = np.repeat(priority, each)
    elif granularity == "expert":
        rows = [tuple(label for part in own for label in part) for own in members]
        pinned = list(scores.super_experts)
    else:
        rows = [tuple(label for part in parts for label in part)]
        pinned = [0] if scores.super_experts else []
        priority = priority.sum(keepdims=True)
    return _Rows(
        summed, stored, pmq.granularity(granularity, costs, nominal)[1], tuple(rows), tuple(pinned), priority
    )


def _tied(rows: _Rows, ties: Sequence[Sequence[str]]) -> _Rows:
    """Return rows of which those that hold matrices of one tie are one."""
    at = {label: row for row, labels in enumerate(rows.members) for label in labels}
    group = list(range(len(rows.members)))
    for tie in ties:
        own = {group[at[label]] for label in tie if label in at}
        if len(own) > 1:
            group = [min(own) if number in own else number for number in group]
    order = sorted(set(group))
    if len(order) == len(group):
        return rows
    places = [order.index(number) for number in group]
    costs, stored = pmq.tied(rows.costs, rows.stored, places)
    members: list[list[str]] = [[] for _ in order]
    for place, labels in zip(places, rows.members, strict=True):
        members[place] += labels
    return _Rows(
        costs, stored, pmq.tied(rows.costs, rows.nominal, places)[1], tuple(map(tuple, members)),
        tuple(sorted({places[row] for row in rows.pinned})), np.bincount(places, rows.priority, len(order)),
    )  # fmt: skip


def _joined(layers: Sequence[_Rows]) -> _Rows:
    """Return layers of one row each as the rows of one."""
    return _Rows(
        np.concatenate([rows.costs for rows in layers]), np.concatenate([rows.stored for rows in layers]),
        np.concatenate([rows.nominal for rows in layers]), tuple(labels for rows in layers for labels in rows.members),
        tuple(place for place, rows in enumerate(layers) if rows.pinned), np.concatenate([rows.priority for rows in layers]),
    )  # fmt: skip


def _result(
    scores: Sequence[Scores], layers: Sequence[_Rows], menu: Sequence[Scheme], found: pmq.Widths,
    elements: Mapping[str, int],
) -> ExpertBits:  # fmt: skip
    schemes: dict[str, Scheme] = {}
    nominal = stored = 0
    for rows, columns in zip(layers, found.columns, strict=True):
        for row, column in enumerate(columns.tolist()):
            for label in rows.members[row]:
                schemes[label] = menu[column]
            nominal += int(rows.nominal[row, column])
            stored += int(rows.stored[row, column])
    parameters = sum(elements[label] for label in schemes)
    unused = tuple(
        (one.layer, int(e)) for one in scores for e in np.flatnonzero(np.asarray(one.frequency) == 0)
    )
    pinned = tuple((one.layer, expert) for one in scores for expert in one.super_experts)
    return ExpertBits(schemes, found.cost, nominal / parameters, 8 * stored / parameters, unused, pinned)
