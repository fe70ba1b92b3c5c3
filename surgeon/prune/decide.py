"""From a target to a cut: one function a method, all over the rankings and losses of one session."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from surgeon.errors import UsageError
from surgeon.prune import depth_targets
from surgeon.prune.choice import Choice
from surgeon.prune.goal import Goal
from surgeon.prune.levels import ffn_multiples, granularity
from surgeon.prune.per_layer import choose_per_layer
from surgeon.prune.request import Target
from surgeon.prune.session import Session, drops_needed
from surgeon.prune.uniform import choose_uniform
from surgeon.structure.check import shapes
from surgeon.structure.config import DERIVED_HEAD_DIM
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
        UsageError: E264 with the range that can be reached.
        InputError: E327, E362 to E369 no class holds what would come out.
    """
    request, structure = session.request, session.structure
    if request.method == "depth":
        _check_protected(session, target)
    if target.kind == "layers":
        if not 2 <= target.value < structure.layers:
            raise UsageError("E264", f"--keep-layers {target.value:g} of {structure.layers} layers",
                             help=f"2 to {structure.layers - 1}")  # fmt: skip
        return
    if request.method == "depth" and target.kind == "sparsity":
        _layers_left(structure.layers, target.value)
        return
    if request.method == "width" and target.kind == "sparsity":
        _share(session, target.value, rehearsal=True)
        return
    goal = session.goal(target)
    if request.layout == "per-layer":
        least = goal.cost.rest + sum(_least_layer(session, goal, layer) for layer in range(structure.layers))
    else:
        drops = structure.layers - 2 if request.method == "depth" else 0
        if "layers" in session.structures and request.method != "depth":
            drops = min(max(1, structure.layers // 2), structure.layers - 2)
        layers = sorted(_least_layer(session, goal, layer) for layer in range(structure.layers))
        least = goal.cost.rest + sum(layers[: structure.layers - max(0, drops)])
    goal.check(least)


def _check_protected(session: Session, target: Target) -> None:
    """Refuse to protect so many layers that too few are left to drop."""
    free = session.structure.layers - len(set(session.request.protect_layers))
    drops = _drops_of(session, target) if target.kind in ("layers", "sparsity") else 1
    if free < drops:
        raise UsageError("E267", f"--protect-layers leaves {free} of {session.structure.layers} layers to drop, {target.name} takes {drops}",
                         help="protect fewer layers")  # fmt: skip


def _least_layer(session: Session, goal: Goal, layer: int) -> float:
    """Return the cost of the smallest form a layer may take."""
    structure, request = session.structure, session.request
    whole = structure.shape(layer)
    if request.method == "depth" or layer in request.protect_layers:
        return goal.cost.layer(layer, whole)
    per_layer = request.layout == "per-layer"
    sizes = [(whole.heads, whole.groups)]
    if "heads" in session.structures and structure.attention[layer] is not None:
        each = whole.heads // whole.groups
        for mode in session.modes:
            for count in session.permitted.unit_counts(mode):
                sizes.append(
                    (count * each, count) if mode == "groups" else (count * whole.groups, whole.groups)
                )
        if per_layer:
            sizes.append((0, 0))
    ffn = whole.ffn
    if "ffn" in session.structures and structure.ffn[layer] is not None:
        ffn = 0 if per_layer else ffn_multiples(ffn, granularity(ffn, request.round_to))[-1]
    return min(
        goal.cost.layer(layer, LayerShape(heads, groups, whole.head_dim, ffn)) for heads, groups in sizes
    )


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
    plain = request.search == "dp"
    stock = request.layout == "uniform"
    floors: list[Choice] = []
    if stock or not request.protect_layers:
        try:
            floor = choose_uniform(
                session.ranking, session.structure, goal, session.losses, structures=session.structures,
                modes=session.modes, drops=session.drops, tolerance=request.tolerance, candidates=1 if plain else 32,
                round_to=request.round_to, allowed=session.writable if stock else None, deadline=deadline,
            )  # fmt: skip
            floors.append(floor)
        except UsageError:
            if stock:
                raise  # per layer, modules may go altogether: more can be reached
    if stock:
        return _decision(floors[0], goal, [], _step(session))
    found = choose_per_layer(
        session.ranking, session.structure, goal, session.losses, structures=session.structures,
        modes=session.modes, protect=request.protect_layers, floors=floors, seed=request.seed,
        candidates=0 if plain else 32, local=0 if plain else 64, round_to=request.round_to, deadline=deadline,
    )  # fmt: skip
    remarks = []
    if floors:
        remarks.append(f"true loss: uniform {floors[0].loss:.4g}, per layer {found.loss:.4g}")
    return _decision(found, goal, remarks, _step(session))


def _step(session: Session) -> int:
    """Return what kept FFN widths are multiples of; 1 where no FFN is cut."""
    width = next((part.width for part in session.structure.ffn if part is not None), 0)
    return granularity(width, session.request.round_to) if width and "ffn" in session.structures else 1


def _cheaper(choice: Choice, goal: Goal, step: int) -> list[str]:
    """Say that a plan beyond the band loses less, where one does: the target is kept to all the same."""
    better = min(choice.beyond, key=lambda one: one.loss, default=None)
    if better is None or not better.loss < choice.loss:
        return []
    kind = "faster" if goal.kind == "speedup" else "smaller"
    finer = next((size for size in (32, 8, 1) if size < step), None)
    way_out = f"; --round-to {finer} gives finer steps" if finer else ""
    return [
        f"a {kind} plan has a lower loss: {better.name}, predicted {goal.show(better.cost)}, loss {better.loss:.2g} against {choice.loss:.2g}{way_out}"
    ]


def _decision(choice: Choice, goal: Goal, remarks: list[str], step: int) -> Decision:
    if choice.stopped == "deadline":
        remarks.append(f"the search stopped at --search-budget after {len(choice.tried)} plans")
    if not choice.within:
        remarks.append(f"sizes are too coarse to come closer: {goal.show(choice.best.cost)} is the nearest")
    remarks += _cheaper(choice, goal, step)
    return Decision(
        choice.cut, goal.achieved(choice.best.cost), choice.loss, tuple(remarks),
        tuple((one.name, one.loss) for one in choice.tried),
    )  # fmt: skip


def _share(session: Session, share: float, *, rehearsal: bool = False) -> Decision:
    """Remove the same share of every layer's heads and channels.

    Args:
        rehearsal: only find out whether that can be written, with the first units in place of the best.
    """
    structure = session.structure
    mode = _share_mode(session, share)
    layers = []
    for layer in range(structure.layers):
        attention, ffn = structure.attention[layer], structure.ffn[layer]
        heads = channels = None
        if attention is not None and mode:
            units = attention.groups if mode == "groups" else attention.per_group
            keep = max(1, round(units * (1 - share)))
            if keep < units and rehearsal:
                heads = (session.permitted.fewer_heads(mode, keep).layers[layer] or LayerCut()).heads
            elif keep < units:
                heads = session.ranking(layer, "attention", mode).kept(keep)
        if ffn is not None and "ffn" in session.structures:
            keep = share_left(ffn.width, share, granularity(ffn.width, session.request.round_to))
            if keep < ffn.width:
                channels = (
                    tuple(range(keep)) if rehearsal else session.ranking(layer, "ffn", "channels").kept(keep)
                )
        layers.append(LayerCut(heads, channels))
    cut = Cut(tuple(layers))
    count = _hidden_left(session, cut, share)
    if count < structure.hidden:
        cut = Cut(cut.layers, tuple(range(count)) if rehearsal else session.hidden_kept(count))
    if cut == Cut.whole(structure.layers):
        raise UsageError("E264", f"--sparsity {share:g} removes nothing: the next smaller size lies further away",
                         help="a larger share, or --round-to 1")  # fmt: skip
    if rehearsal:
        session.permitted.check(cut)
    return Decision(cut)


def share_left(width: int, share: float, step: int) -> int:
    """Return how many of so many channels stay when a share goes: a multiple of the step, rounded up."""
    return min(width, step * max(1, math.ceil(width * (1 - share) / step - 1e-9)))


def _hidden_left(session: Session, cut: Cut, share: float) -> int:
    """Return how many channels of the residual stream stay; whole heads where a head's size follows from it."""
    structure = session.structure
    if "hidden" not in session.structures:
        return structure.hidden
    first = next((layer for layer, part in enumerate(structure.attention) if part is not None), None)
    shape = shapes(cut, structure)[first or 0]
    if structure.model_type in DERIVED_HEAD_DIM:
        return shape.heads * shape.head_dim
    step = shape.head_dim or 1
    if structure.hidden >= 512:
        step = math.lcm(step, granularity(structure.hidden, session.request.round_to))
    return share_left(structure.hidden, share, step)


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
    if target.kind in ("layers", "sparsity"):
        keep = int(target.value) if target.kind == "layers" else _layers_left(layers, target.value)
        most = max(_drops_of(session, one) for one in session.request.targets)
        return Decision(_dropped(layers, session.depth_ranking(most).dropped(keep)))
    assert goal is not None
    times = [goal.cost.layer(layer, structure.shape(layer)) for layer in range(layers)]
    ranking = session.depth_ranking(min(drops_needed(goal), layers - 2))
    drop: tuple[int, ...] = ()
    if goal.kind == "speedup":
        drop = depth_targets.choose(ranking, goal.cost.rest, times, goal.value)
    else:
        for drop in ranking.drops:
            if goal.cost.dense - sum(times[layer] for layer in drop) <= goal.budget:
                break
        else:
            raise UsageError("E264", f"{target.name} asks for more layers than {ranking.method} would drop",
                             help="protect fewer layers, or another --criterion")  # fmt: skip
    cut = _dropped(layers, drop)
    return Decision(cut, goal.achieved(goal.cost.total(cut)))


def _drops_of(session: Session, target: Target) -> int:
    layers = session.structure.layers
    return layers - (int(target.value) if target.kind == "layers" else _layers_left(layers, target.value))


def _layers_left(layers: int, share: float) -> int:
    keep = layers - round(layers * share)
    if not 2 <= keep < layers:
        raise UsageError("E264", f"--sparsity {share:g} of {layers} layers leaves {keep}",
                         help=f"a share from {1 / layers:.3f} to {(layers - 2) / layers:.3f}, or --keep-layers")  # fmt: skip
    return keep


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
    if any(part is not None for part in structure.attention):
        heads, groups = _range([shape.heads for shape in kept]), _range([shape.groups for shape in kept])
        parts.append(f"heads {heads} / kv {groups}")
    if any(part is not None for part in structure.ffn):
        parts.append("ffn " + _range([shape.ffn for shape in kept]))
    return ", ".join(parts)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
