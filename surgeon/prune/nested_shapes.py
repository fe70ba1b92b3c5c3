"""Sizes of a nested family: each member lies inside the next larger one, and all in one order of units.

Decided largest first. A smaller member may only drop more layers, keep fewer units, and count attention in the
units (whole groups, or heads of every group) that a larger member has begun to cut. Units of a module go in the
order of its one ranking, so what a member keeps is the front of that order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from surgeon.deploy.members import Kept, LayerOrder
from surgeon.errors import SurgeonError, UsageError
from surgeon.prune.choice import Choice
from surgeon.prune.cost import Cost
from surgeon.prune.decide import Decision, share_left
from surgeon.prune.goal import Goal
from surgeon.prune.levels import granularity
from surgeon.prune.ranking import Ranking
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.prune.uniform import choose_uniform
from surgeon.structure.check import kept_groups, kept_heads, shapes
from surgeon.structure.cut import Cut, LayerCut, LayerShape
from surgeon.structure.parts import Structure

WIDER = (0.1, 0.3, 1.0)
"""Bands below a budget that are searched in turn where none of the plans in --tolerance lies inside the larger member."""


NOTHING_ALLOWED = ("E271",)
"""Codes with which `choose_uniform` says that plans reach the target but none of them is allowed."""


@dataclass(frozen=True)
class Family:
    """Decisions of all members, largest first, and the unit of attention they share ("" when none is cut)."""

    decisions: tuple[Decision, ...]
    mode: str

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return tuple(decision.cut for decision in self.decisions)


class InsideCost(Cost):
    """The cost of a model in which everything larger than a larger member is out of any budget.

    A uniform search takes the widest FFN that its budget allows; what it must not exceed has to be part of the cost.
    """

    def __init__(self, cost: Cost, largest: LayerShape) -> None:
        super().__init__(cost.structure)
        self.unit, self.rest = cost.unit, cost.rest
        self._cost, self._largest = cost, largest

    def module(self, layer: int, kind: str, shape: LayerShape) -> float:
        most = self._largest
        if kind == "ffn":
            larger = shape.ffn > most.ffn
        else:
            larger = shape.heads > most.heads or shape.groups > most.groups
        return math.inf if larger else self._cost.module(layer, kind, shape)

    def beside(self, layer: int) -> float:
        return self._cost.beside(layer)

    @property
    def dense(self) -> float:
        return self._cost.dense

    def prunable(self) -> float:
        return self._cost.prunable()


class PlainLosses:
    """True losses of cuts whose remaining weights stay as they are, each computed once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[str, float] = {}

    def __call__(self, cuts: Sequence[Cut]) -> list[float]:
        fresh = {cut.identity(): cut for cut in cuts if cut.identity() not in self._known}
        if fresh:
            found = self._session.true_loss(list(fresh.values()))
            self._known.update(zip(fresh, map(float, found), strict=True))
            self._session.tell("comparing plans", len(self._known), len(self._known))
        return [self._known[cut.identity()] for cut in cuts]


def decide_family(
    session: Session, targets: Sequence[Target], goals: Sequence[Goal | None], losses: PlainLosses
) -> Family:
    """Return the cuts of all members.

    Args:
        targets: largest member first.
        goals: what they mean as budgets; None for shares that every layer loses alike.
        losses: of cuts without solving weights again: members have the parent's.

    Raises:
        UsageError: E264, E271 a target is out of reach, alone or inside the larger member; two members would be one.
    """
    if all(goal is None for goal in goals):
        return _shares(session, targets)
    deadline = 60 * session.request.search_budget / len(targets)
    mode, decisions = "", list[Decision]()
    for target, goal in zip(targets, goals, strict=True):
        assert goal is not None
        larger = decisions[-1].cut if decisions else None
        choice, within = _inside(session, target, goal, larger, mode, losses, deadline)
        mode = mode or choice.mode
        remarks = (
            []
            if within
            else [f"sizes are too coarse to come closer: {goal.show(choice.best.cost)} is the nearest"]
        )
        if choice.stopped == "deadline":
            remarks.append(f"the search stopped at --search-budget after {len(choice.tried)} plans")
        decisions.append(Decision(choice.cut, goal.achieved(choice.best.cost), choice.loss, tuple(remarks),
                                  tuple((one.name, one.loss) for one in choice.tried)))  # fmt: skip
    return _distinct(Family(tuple(decisions), mode), targets)


def _inside(
    session: Session, target: Target, goal: Goal, larger: Cut | None, mode: str, losses: PlainLosses, deadline: float
) -> tuple[Choice, bool]:  # fmt: skip
    """Return the best uniform cut that reaches a goal inside the larger member, and whether it lies in the band."""
    request, structure = session.request, session.structure
    gone = set() if larger is None else set(range(structure.layers)) - set(larger.kept_layers)
    drops = tuple(drop for drop in (*session.drops, tuple(sorted(gone))) if gone <= set(drop))
    if larger is not None:
        goal = replace(goal, cost=InsideCost(goal.cost, _largest(shapes(larger, structure))))
    bands = (request.tolerance, *(band for band in WIDER if band > request.tolerance))

    def allowed(cut: Cut) -> bool:
        return session.writable(cut) and (larger is None or lies_inside(cut, larger, structure))

    for band in bands:
        try:
            choice = choose_uniform(
                session.ranking, structure, goal, losses, structures=session.structures,
                modes=(mode,) if mode else session.modes, drops=drops, tolerance=band,
                candidates=1 if request.search == "dp" else 32, round_to=request.round_to, allowed=allowed, deadline=deadline,
            )  # fmt: skip
        except SurgeonError as error:
            if error.code in NOTHING_ALLOWED and band != bands[-1]:
                continue
            if larger is not None and error.code in (*NOTHING_ALLOWED, "E264"):
                error.help = (
                    f"{target.name} has to lie inside the larger members; leave it out, or leave out --nested"
                )
            raise
        return choice, choice.best.cost >= goal.budget * (1 - request.tolerance)
    raise AssertionError("the last band returns or raises")


def _largest(kept: Sequence[LayerShape]) -> LayerShape:
    """Return the sizes of a uniform model's layers; one without attention or FFN counts as zeros there."""
    return LayerShape(*(max(sizes) for sizes in zip(*(astuple(shape) for shape in kept), strict=True)))


def _shares(session: Session, targets: Sequence[Target]) -> Family:
    """Remove a share of every layer's heads and channels for each target (--method width --sparsity)."""
    mode = _closest_mode(session, [target.value for target in targets])
    cuts = []
    for target in targets:
        layers = []
        for layer in range(session.structure.layers):
            attention, ffn = session.structure.attention[layer], session.structure.ffn[layer]
            heads = channels = None
            if attention is not None and mode:
                units = attention.groups if mode == "groups" else attention.per_group
                keep = max(1, round(units * (1 - target.value)))
                heads = session.ranking(layer, "attention", mode).kept(keep) if keep < units else None
            if ffn is not None and "ffn" in session.structures:
                keep = share_left(ffn.width, target.value, granularity(ffn.width, session.request.round_to))
                channels = session.ranking(layer, "ffn", "channels").kept(keep) if keep < ffn.width else None
            layers.append(LayerCut(heads, channels))
        cuts.append(Cut(tuple(layers)))
    return _distinct(Family(tuple(Decision(cut) for cut in cuts), mode), targets)


def _closest_mode(session: Session, shares: Sequence[float]) -> str:
    """Return the unit of attention that comes closest to all shares; whole groups when both do."""
    first = next((part for part in session.structure.attention if part is not None), None)
    if first is None or not session.modes:
        return ""

    def miss(mode: str) -> float:
        units = first.groups if mode == "groups" else first.per_group
        return sum(abs(1 - max(1, round(units * (1 - share))) / units - share) for share in shares)

    return min(session.modes, key=miss)


def _distinct(family: Family, targets: Sequence[Target]) -> Family:
    """Refuse two members of one shape, or one that is the source (E264)."""
    seen = {Cut.whole(len(family.cuts[0].layers)): "the source"}
    for target, cut in zip(targets, family.cuts, strict=True):
        if cut in seen:
            raise UsageError("E264", f"{target.name} would be the same model as {seen[cut]}: sizes are too coarse to tell them apart",
                             help="targets that lie further apart, or --round-to with a smaller number")  # fmt: skip
        seen[cut] = target.name
    return family


def lies_inside(cut: Cut, larger: Cut, structure: Structure) -> bool:
    """Say whether a cut keeps nothing that the larger one does not."""
    for layer, (ours, theirs) in enumerate(zip(cut.layers, larger.layers, strict=True)):
        if ours is None:
            continue
        if theirs is None:
            return False
        attention = structure.attention[layer]
        if attention is not None and not set(kept_heads(cut, attention)) <= set(
            kept_heads(larger, attention)
        ):
            return False
        if theirs.channels is not None and (
            ours.channels is None or not set(ours.channels) <= set(theirs.channels)
        ):
            return False
    return True


def orders(session: Session, family: Family) -> dict[int, LayerOrder]:
    """Return the order in which every layer's units are to lie, those that stay longest first."""
    structure = session.structure
    narrow = any(
        layer is not None and layer.channels is not None for cut in family.cuts for layer in cut.layers
    )
    found = {}
    for layer in range(structure.layers):
        groups = heads = channels = None
        attention, ffn = structure.attention[layer], structure.ffn[layer]
        if family.mode and attention is not None:
            ranking = session.ranking(layer, "attention", family.mode)
            if family.mode == "groups":
                groups = _last_first(ranking)
            else:
                heads = _heads_last_first(ranking, attention.groups, attention.per_group)
        if narrow and ffn is not None:
            channels = _last_first(session.ranking(layer, "ffn", "channels"))
        if (groups, heads, channels) != (None, None, None):
            found[layer] = LayerOrder(groups, heads, channels)
    return found


def _last_first(ranking: Ranking) -> list[int]:
    return [int(unit) for unit in ranking.order[::-1]]


def _heads_last_first(ranking: Ranking, groups: int, per_group: int) -> list[list[int]]:
    """Return for each group its query heads, numbered within it; row i of the ranking goes i-th."""
    rows = np.sort(np.asarray(ranking.order, dtype=np.int64)[::-1], axis=1)
    if not np.array_equal(rows // per_group, np.broadcast_to(np.arange(groups), rows.shape)):
        raise AssertionError("a row of heads does not name one of every group")
    return [[int(head) for head in rows[:, group] - group * per_group] for group in range(groups)]


def kept_in_front(cut: Cut, structure: Structure) -> dict[int, Kept]:
    """Return how many units a member keeps of each layer that stays."""
    found = {}
    for layer, shape in zip(cut.kept_layers, shapes(cut, structure), strict=True):
        attention = structure.attention[layer]
        groups = len(kept_groups(kept_heads(cut, attention), attention)) if attention is not None else 0
        found[layer] = Kept(groups, shape.heads // groups if groups else 0, shape.ffn)
    return found
