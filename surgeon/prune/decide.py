"""From a target to a cut: one function a method, all over the rankings and losses of one session."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from surgeon.errors import UsageError
from surgeon.prune import depth_targets
from surgeon.prune.choice import Choice
from surgeon.prune.goal import Goal
from surgeon.prune.levels import granularity
from surgeon.prune.per_layer import choose_per_layer
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.prune.uniform import choose_uniform
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut, LayerCut, LayerShape


@dataclass(frozen=True)
class Decision:
    """A cut and why.

    Attributes:
        cut: what is kept.
        predicted: what the goal's cost says it reaches, in the target's unit; None without a goal.
        loss: true loss; None where none was computed.
        remarks: sentences for the user.
        tried: (name, loss) of everything that was compared.
    """

    cut: Cut
    predicted: float | None = None
    loss: float | None = None
    remarks: tuple[str, ...] = ()
    tried: tuple[tuple[str, float], ...] = field(default=())


def check_reachable(session: Session, target: Target) -> None:
    """Refuse a target out of reach before anything is calibrated (fault J6).

    Raises:
        UsageError: E264, E282 with the range that can be reached.
    """
    request, structure = session.request, session.structure
    if request.method == "width" and request.solver == "flap":
        session.check_bias()
    if target.kind == "layers":
        if not 2 <= target.value < structure.layers:
            raise UsageError("E264", f"--keep-layers {target.value:g} of {structure.layers} layers",
                             help=f"2 to {structure.layers - 1}")  # fmt: skip
        return
    if target.kind == "pattern" or (request.method == "width" and target.kind == "sparsity"):
        return
    goal = session.goal(target)
    layers = range(structure.layers)
    fewest = 2 if request.method == "depth" or "layers" in session.structures else structure.layers
    least = goal.cost.rest + sum(sorted(_least_layer(session, goal, layer) for layer in layers)[:fewest])
    goal.check(least)


def _least_layer(session: Session, goal: Goal, layer: int) -> float:
    """Return the cost of the smallest form a layer may take."""
    structure, request = session.structure, session.request
    whole = structure.shape(layer)
    if request.method == "depth" or layer in request.protect_layers:
        return goal.cost.layer(layer, whole)
    per_layer = request.layout == "per-layer"
    heads, groups, ffn = whole.heads, whole.groups, whole.ffn
    if "heads" in session.structures and heads:
        options = {"groups": (heads // groups, 1), "heads": (groups, groups)}
        heads, groups = (
            (0, 0) if per_layer else min((options[mode] for mode in session.modes), default=(heads, groups))
        )
    if "ffn" in session.structures and ffn:
        ffn = 0 if per_layer else min(ffn, granularity(ffn, request.round_to))
    return goal.cost.layer(layer, LayerShape(heads, groups, whole.head_dim, ffn))


def decide(session: Session, target: Target, goal: Goal | None, deadline: float | None) -> Decision:
    """Return the cut for a target.

    Args:
        goal: what the target means in cost; None for layers kept.
        deadline: seconds the search may take.
    """
    if session.request.method == "depth":
        return _depth(session, target, goal)
    if session.request.method == "width" and target.kind == "sparsity":
        return _share(session, target.value)
    assert goal is not None
    return _search(session, goal, deadline)


def _search(session: Session, goal: Goal, deadline: float | None) -> Decision:
    request = session.request
    drops: Sequence[tuple[int, ...]] = session.drops
    plain = request.search == "dp"
    protected = bool(request.protect_layers)
    floors: list[Choice] = []
    stock = request.layout == "uniform"
    if stock and protected:
        raise UsageError("E267", "--protect-layers cannot be kept in a uniform layout: all layers shrink alike",
                         help="--layout per-layer, or --method depth")  # fmt: skip
    if stock or not protected:
        try:
            floor = choose_uniform(
                session.ranking, session.structure, goal, session.losses, structures=session.structures,
                modes=session.modes or None, drops=drops, tolerance=request.tolerance,
                candidates=1 if plain else 32, round_to=request.round_to,
                allowed=session.writable if stock else None, deadline=deadline,
            )  # fmt: skip
            floors.append(floor)
        except UsageError:
            if stock:
                raise  # per layer, modules may go altogether: more can be reached
    if stock:
        return _decision(floors[0], goal, [])
    found = choose_per_layer(
        session.ranking, session.structure, goal, session.losses, structures=session.structures,
        modes=session.modes or None, protect=request.protect_layers, floors=floors, seed=request.seed,
        candidates=0 if plain else 32, local=0 if plain else 64, round_to=request.round_to, deadline=deadline,
    )  # fmt: skip
    remarks = []
    if floors:
        remarks.append(f"true loss: uniform {floors[0].loss:.4g}, per layer {found.loss:.4g}")
    return _decision(found, goal, remarks)


def _decision(choice: Choice, goal: Goal, remarks: list[str]) -> Decision:
    if choice.stopped == "deadline":
        remarks.append(f"the search stopped at --search-budget after {len(choice.tried)} plans")
    if not choice.within:
        remarks.append(f"sizes are too coarse to come closer: {goal.show(choice.best.cost)} is the nearest")
    return Decision(
        choice.cut, goal.achieved(choice.best.cost), choice.loss, tuple(remarks),
        tuple((one.name, one.loss) for one in choice.tried),
    )  # fmt: skip


def _share(session: Session, share: float) -> Decision:
    """Remove the same share of every layer's heads and channels."""
    structure = session.structure
    hidden = session.hidden_kept(share) if "hidden" in session.structures else None
    mode = _share_mode(session, share)
    layers = []
    for layer in range(structure.layers):
        attention, ffn = structure.attention[layer], structure.ffn[layer]
        heads = channels = None
        if attention is not None and mode:
            units = attention.groups if mode == "groups" else attention.per_group
            keep = max(1, round(units * (1 - share)))
            if keep < units:
                heads = session.ranking(layer, "attention", mode).kept(keep)
        if ffn is not None and "ffn" in session.structures:
            step = granularity(ffn.width, session.request.round_to)
            keep = min(ffn.width, step * max(1, math.ceil(ffn.width * (1 - share) / step - 1e-9)))
            if keep < ffn.width:
                channels = session.ranking(layer, "ffn", "channels").kept(keep)
        layers.append(LayerCut(heads, channels))
    cut = Cut(tuple(layers), hidden)
    if cut == Cut.whole(structure.layers):
        raise UsageError("E264", f"--sparsity {share:g} removes nothing: sizes are multiples of more than that",
                         help="a larger share, or --round-to 1")  # fmt: skip
    return Decision(cut)


def _share_mode(session: Session, share: float) -> str:
    """Return the attention mode whose units come closest to the share; whole groups when both do."""
    first = next((part for part in session.structure.attention if part is not None), None)
    if first is None or not session.modes:
        return ""

    def miss(mode: str) -> float:
        units = first.groups if mode == "groups" else first.per_group
        return abs(1 - max(1, round(units * (1 - share))) / units - share)

    return min(session.modes, key=miss)


def _depth(session: Session, target: Target, goal: Goal | None) -> Decision:
    structure = session.structure
    layers = structure.layers
    whole = [structure.shape(layer) for layer in range(layers)]
    if target.kind == "layers":
        return Decision(
            _dropped(layers, session.depth_ranking(layers - int(target.value)).dropped(int(target.value)))
        )
    assert goal is not None
    if target.kind == "sparsity":
        keep = max(2, layers - max(1, round(layers * target.value)))
        return Decision(_dropped(layers, session.depth_ranking(layers - keep).dropped(keep)))
    times = [goal.cost.layer(layer, shape) for layer, shape in enumerate(whole)]
    most = _most_drops(goal, times)
    ranking = session.depth_ranking(min(most, layers - 2))
    drop: tuple[int, ...] = ()
    if goal.kind == "speedup":
        drop = depth_targets.choose(ranking, goal.cost.rest, times, target.value)
    else:
        for drop in ranking.drops:
            if goal.cost.dense - sum(times[layer] for layer in drop) <= goal.budget:
                break
    cut = _dropped(layers, drop)
    return Decision(cut, goal.achieved(goal.cost.total(cut)))


def _most_drops(goal: Goal, times: list[float]) -> int:
    """Return how many layers may have to go: the cheapest first."""
    left = goal.cost.dense
    for number, time in enumerate(sorted(times), start=1):
        left -= time
        if left <= goal.budget:
            return number
    return len(times)


def _dropped(layers: int, drop: Sequence[int]) -> Cut:
    return Cut(tuple(None if layer in drop else LayerCut() for layer in range(layers)))


def in_words(cut: Cut, session: Session) -> str:
    """Return the sizes of what a cut leaves, in a few words."""
    structure = session.structure
    kept = shapes(cut, structure)
    parts = [
        f"{len(kept)} of {structure.layers} layers" if len(kept) < structure.layers else f"{len(kept)} layers"
    ]
    width = structure.hidden if cut.hidden is None else len(cut.hidden)
    parts.append(f"hidden {width}")
    parts.append(
        "heads "
        + _range([shape.heads for shape in kept])
        + " / kv "
        + _range([shape.groups for shape in kept])
    )
    parts.append("ffn " + _range([shape.ffn for shape in kept]))
    return ", ".join(parts)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
