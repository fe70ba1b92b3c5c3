"""The best cut that treats all layers alike, so that stock runtimes load the result.

All combinations of attention size and dropped layers are listed; each gets the widest FFN that meets the
budget, because a narrower one only loses more. The most promising by summed relative errors are compared
by true loss. Which units of a layer stay is that layer's own ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from surgeon.errors import UsageError
from surgeon.prune.choice import Choice, Losses, Rankings, Tried, finite_best
from surgeon.prune.goal import Goal
from surgeon.prune.levels import ModuleLevels, RoundTo, ffn_multiples, granularity, levels_of, useful_modes
from surgeon.search.trials import Clock
from surgeon.structure.cut import Cut, LayerCut, LayerShape
from surgeon.structure.parts import Structure

BEYOND = 4
"""Plans that cost less than the band, whose loss is computed, too: where sizes are coarse one may lose less."""

WHOLE = ""
"""The attention mode of a point that cuts no attention."""


@dataclass(frozen=True)
class Point:
    """One uniform cut before its units are chosen.

    Attributes:
        mode: of its attentions; "" when they are whole.
        attention: kept units of each attention; None keeps them whole.
        ffn: kept channels of each FFN; None keeps them whole.
        drop: layers that go.
        cost: of the model, in the unit of the goal.
        prior: summed relative errors, 1 for each module of a dropped layer.
    """

    mode: str
    attention: int | None
    ffn: int | None
    drop: tuple[int, ...]
    cost: float
    prior: float

    @property
    def name(self) -> str:
        """The point in a few words."""
        parts = []
        if self.attention is not None:
            parts.append(f"{self.attention} {'groups' if self.mode == 'groups' else 'heads per group'}")
        if self.ffn is not None:
            parts.append(f"FFN {self.ffn}")
        if self.drop:
            parts.append(f"{len(self.drop)} layers dropped")
        return ", ".join(parts) or "whole"


def choose_uniform(
    ranking: Rankings,
    structure: Structure,
    goal: Goal,
    losses: Losses,
    *,
    structures: Collection[str] = ("heads", "ffn"),
    modes: Sequence[str] | None = None,
    drops: Sequence[tuple[int, ...]] = ((),),
    tolerance: float = 0.03,
    candidates: int = 32,
    batch: int = 8,
    round_to: RoundTo = "auto",
    allowed: Callable[[Cut], bool] | None = None,
    deadline: float | None = None,
) -> Choice:
    """Return the uniform cut of least true loss among those that cost between (1 - tolerance) and all of the budget.

    Where granularity leaves nothing in that band, the cuts nearest below it are compared, and the
    choice says so (``within`` is False).

    Args:
        ranking: the units of each module in the order they go.
        structure: of the source.
        goal: what has to be reached.
        losses: true losses of cuts.
        structures: which may be cut: "heads", "ffn". Layers go by ``drops``.
        modes: attention modes to compare; None takes those that make a difference.
        drops: sets of layers that may go (`surgeon.prune.depth_ranking.DepthRanking.drops`), () among them.
        tolerance: relative width of the band.
        candidates: cuts whose true loss is computed at most.
        batch: cuts evaluated in one call.
        round_to: granularity of FFN widths.
        allowed: says whether a cut can be written, e.g. whether a stock class holds it.
        deadline: seconds; no batch after the first is begun that would probably end later.

    Raises:
        UsageError: E264 the goal cannot be reached, E270 layers differ in size, E271 none can be written.
        InputError: E339 no candidate has a finite loss.
    """
    grid = _Grid(ranking, structure, goal, frozenset(structures), modes, tuple(drops), round_to)
    goal.check(grid.least)
    points, within = grid.points(tolerance)
    chosen = _writable(_promising(points), grid, allowed, candidates)
    if candidates > 1:
        cheaper = [point for point in grid.fitting if point.cost < min(point.cost for point in points)]
        chosen += _writable(_promising(cheaper), grid, allowed, BEYOND, needed=False)
    clock = Clock(deadline)
    tried: list[Tried] = []
    stopped = "converged"
    for start in range(0, len(chosen), batch):
        if start and clock.over:
            stopped = "deadline"
            break
        part = chosen[start : start + batch]
        with clock.batch():
            found = losses([cut for _, cut in part])
        for (point, cut), loss in zip(part, found, strict=True):
            value = float(loss) if np.isfinite(loss) else float("inf")
            tried.append(Tried(cut, value, point.prior, point.cost, point.name))
    least = min(point.cost for point in points)
    inside = [one for one in tried if one.cost >= least]
    best = finite_best(inside)
    mode = next(point.mode for point, cut in chosen if cut == best.cut)
    return Choice(
        best, mode, tuple(inside), stopped, within, beyond=tuple(one for one in tried if one.cost < least)
    )


def _promising(points: Sequence[Point]) -> list[Point]:
    """Order points: the best prior of each number of dropped layers first, then the best prior of all.

    A dropped layer counts with relative errors of 1, which says little about what it does to the model; so
    the priors of different depths are not comparable, and each depth is tried.
    """
    ordered = sorted(points, key=lambda point: (point.prior, point.cost, point.name))
    first: dict[int, Point] = {}
    for point in ordered:
        first.setdefault(len(point.drop), point)
    heads = sorted(first.values(), key=lambda point: (point.prior, len(point.drop)))
    # Depths take turns with the list of all, so that neither uses up the candidates.
    turns = [point for pair in zip(ordered, heads, strict=False) for point in pair]
    return list(dict.fromkeys([*turns, *ordered]))


def _writable(
    points: Sequence[Point], grid: _Grid, allowed: Callable[[Cut], bool] | None, most: int, *, needed: bool = True
) -> list[tuple[Point, Cut]]:  # fmt: skip
    found: list[tuple[Point, Cut]] = []
    for point in points:
        cut = grid.cut(point)
        if allowed is None or allowed(cut):
            found.append((point, cut))
        if len(found) == most:
            break
    if not found and needed:
        raise UsageError(
            "E271", f"none of {len(points)} uniform cuts that reach the target can be written as a stock model",
            help="--layout per-layer, or --structures ffn,layers",
        )  # fmt: skip
    return found


class _Grid:
    """All uniform cuts of a model that a goal allows.

    Attributes:
        fitting: every point within the budget, once `points` was called.
    """

    def __init__(
        self, ranking: Rankings, structure: Structure, goal: Goal, structures: frozenset[str],
        modes: Sequence[str] | None, drops: tuple[tuple[int, ...], ...], round_to: RoundTo,
    ) -> None:  # fmt: skip
        self._ranking = ranking
        self._structure = structure
        self._goal = goal
        self.fitting: list[Point] = []
        self._drops = tuple(dict.fromkeys(((), *drops)))
        check_alike(structure, structures)
        self._attentions = self._attention_choices(structures, modes)
        self._widths: tuple[int, ...] = (0,)
        width = next((ffn.width for ffn in structure.ffn if ffn is not None), 0)
        if "ffn" in structures and width:
            self._widths = ffn_multiples(width, granularity(width, round_to))

    def _attention_choices(
        self, structures: frozenset[str], modes: Sequence[str] | None
    ) -> list[tuple[ModuleLevels | None, int]]:
        found: list[tuple[ModuleLevels | None, int]] = [(None, 0)]
        layer = next((n for n, one in enumerate(self._structure.attention) if one is not None), None)
        if "heads" not in structures or layer is None:
            return found
        for mode in useful_modes(self._structure) if modes is None else modes:
            levels = levels_of(self._structure, layer, "attention", mode)
            assert levels is not None
            found += [(levels, count) for count in levels.without_zero().counts[1:]]
        return found

    def _attention_cost(self, levels: ModuleLevels | None, count: int) -> np.ndarray:
        """Return what the attention of each layer costs [layers] with so many units."""
        structure = self._structure
        shapes = [
            structure.shape(n) if levels is None else levels.shape(count) for n in range(structure.layers)
        ]
        return self._module_cost("attention", structure.attention, shapes)

    def _ffn_cost(self, width: int) -> np.ndarray:
        """Return what the FFN of each layer costs [layers] at a width; 0 stands for its own."""
        own = [self._structure.shape(n) for n in range(self._structure.layers)]
        shapes = [replace(shape, ffn=width or shape.ffn) for shape in own]
        return self._module_cost("ffn", self._structure.ffn, shapes)

    def _module_cost(
        self, kind: str, present: Sequence[object | None], shapes: Sequence[LayerShape]
    ) -> np.ndarray:
        cost = self._goal.cost
        return np.array(
            [0.0 if present[n] is None else cost.module(n, kind, shape) for n, shape in enumerate(shapes)]
        )

    def _costs(self) -> Iterator[tuple[ModuleLevels | None, int, tuple[int, ...], np.ndarray]]:
        """Yield (attention levels, kept units, dropped layers, cost [widths]) of all cuts."""
        cost, layers = self._goal.cost, self._structure.layers
        beside = np.array([cost.beside(layer) for layer in range(layers)])
        ffn = np.array([self._ffn_cost(width) for width in self._widths])
        attention = [
            (levels, count, self._attention_cost(levels, count)) for levels, count in self._attentions
        ]
        for (levels, count, each), drop in product(attention, self._drops):
            kept = [layer for layer in range(layers) if layer not in drop]
            fixed = cost.rest + math.fsum((beside + each)[kept])
            yield levels, count, drop, fixed + ffn[:, kept].sum(axis=1)

    @property
    def least(self) -> float:
        """Cost of the smallest model of the grid."""
        return min(float(costs.min()) for *_, costs in self._costs())

    def points(self, tolerance: float) -> tuple[list[Point], bool]:
        """Return the largest cuts within the budget, and whether they lie in the band below it."""
        budget = self._goal.budget
        found = []
        for levels, count, drop, costs in self._costs():
            fitting = np.flatnonzero(costs <= budget)
            if len(fitting):  # widths descend
                first = int(fitting[0])
                found.append(self._point(levels, count, self._widths[first], drop, float(costs[first])))
        self.fitting = found
        inside = [point for point in found if point.cost >= budget * (1 - tolerance)]
        if inside:
            return inside, True
        nearest = max(point.cost for point in found)
        # One point alone would leave the loss no say; as wide a band below the nearest one does.
        return [point for point in found if point.cost >= nearest * (1 - tolerance)], False

    def _point(
        self, levels: ModuleLevels | None, count: int, width: int, drop: tuple[int, ...], cost: float
    ) -> Point:
        ffn = width if width != self._widths[0] else None
        prior = 0.0
        for layer in range(self._structure.layers):
            attention = self._structure.attention[layer] is not None
            channels = self._structure.ffn[layer] is not None
            if layer in drop:
                prior += attention + channels
                continue
            if attention and levels is not None:
                prior += self._ranking(layer, "attention", levels.mode).error(count)
            if channels and ffn is not None:
                prior += self._ranking(layer, "ffn", "channels").error(ffn)
        mode = WHOLE if levels is None else levels.mode
        return Point(mode, None if levels is None else count, ffn, drop, cost, prior)

    def cut(self, point: Point) -> Cut:
        """Return the cut of a point, each layer keeping its own best units."""
        layers: list[LayerCut | None] = []
        for layer in range(self._structure.layers):
            if layer in point.drop:
                layers.append(None)
                continue
            heads = channels = None
            if point.attention is not None and self._structure.attention[layer] is not None:
                heads = self._ranking(layer, "attention", point.mode).kept(point.attention)
            if point.ffn is not None and self._structure.ffn[layer] is not None:
                channels = self._ranking(layer, "ffn", "channels").kept(point.ffn)
            layers.append(LayerCut(heads, channels))
        return Cut(tuple(layers))


def check_alike(structure: Structure, structures: frozenset[str]) -> None:
    """Refuse to cut alike what differs from layer to layer (E270)."""
    attention = {(a.heads, a.groups, a.head_dim) for a in structure.attention if a is not None}
    ffn = {f.width for f in structure.ffn if f is not None}
    for part, sizes in (("heads", attention), ("ffn", ffn)):
        if part in structures and len(sizes) > 1:
            raise UsageError(
                "E270", f"layers of this {structure.model_type} model differ in their {part}, so they cannot be cut alike",
                help="--layout per-layer, or leave them out of --structures",
            )  # fmt: skip
