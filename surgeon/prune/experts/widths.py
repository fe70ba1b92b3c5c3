"""From scores of channels to the channels that stay, in a form that a reader holds (HEAPr, arXiv 2509.22299).

The paper ranks all channels of the model together, which gives every expert its own width; no stock class
loads that. So the layout is decided first, and channels are chosen within it:

    uniform    one width for all experts, each keeps its best channels: loads everywhere
    per-layer  one width a layer, of least total score: no reader holds it
    padded     the paper's ranking, every expert stored with zeros up to the widest: loads, saves little
    ragged     the paper's ranking as it is: only for evaluation, masked in place

A zero gate row, up row and down column (biases too) are exactly no channel in every family: the activation of 0
is 0, and where the up branch adds 1 (gpt-oss) the gate still gives 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError, close_matches
from surgeon.prune.experts.heapr import ChannelScores
from surgeon.prune.levels import RoundTo, granularity
from surgeon.search.knapsack import solve
from surgeon.structure.experts.cut import ExpertCut, Place
from surgeon.structure.experts.parts import Experts
from surgeon.structure.experts.view import ExpertView

Layout = Literal["uniform", "per-layer", "padded", "ragged"]
Scope = Literal["global", "per-layer", "per-expert"]

LEAST = 8
"""Channels an expert keeps at least where widths are not multiples of anything."""

HEADER_ENTRY = 160
"""Bytes of a file's header for one tensor, its name left out; a bound."""

Kept = dict[Place, np.ndarray]
"""(layer, expert) -> channels that stay, ascending."""


@dataclass(frozen=True)
class Widths:
    """Which channels stay.

    Attributes:
        cut: what stays, for `ExpertView`. The ragged and the per-layer one cannot be stored (``refusal``).
        layout: as asked for.
        stored: channels per expert of each layer, as a file would hold them; the mean of a ragged layer.
        removed: share of the channels of running layers' experts that go.
        saved: share of them that a file does without; less than ``removed`` in the padded layout.
        refusal: why this cannot be written for a reader, None when it can.
        notes: sentences for the user.
    """

    cut: ExpertCut
    layout: Layout
    stored: Mapping[int, float]
    removed: float
    saved: float
    refusal: str | None
    notes: tuple[str, ...]


def choose(
    scores: ChannelScores,
    experts: Experts,
    *,
    sparsity: float | None = None,
    width: int | None = None,
    layout: Layout = "uniform",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    min_width: int | None = None,
    protected: Mapping[int, Collection[int]] | None = None,
    without: tuple[int, ...] = (),
) -> Widths:
    """Choose the channels that stay.

    Args:
        scores: of the model; the lowest go. Of equal ones the lower (layer, expert, channel) stays.
        experts: of the model.
        sparsity: share of the channels of routed experts that go, between 0 and 1. Widths round up (uniform); the
            other layouts never keep more than is asked for.
        width: the uniform width, instead of ``sparsity``.
        layout: see the module.
        scope: which channels are ranked together in the padded and the ragged layout; the others have one rule.
        round_to: what uniform, per-layer and padded widths are multiples of.
        min_width: channels every expert keeps; default one multiple, in ragged and padded layouts 8.
        protected: layer -> experts that keep all channels where the layout can grant it.
        without: layers beyond the configured number that are left out.

    Raises:
        UsageError: E245 an option out of range; E269 a multiple out of range.
        InputError: E437 nothing would be removed, or so much cannot be.
    """
    _check(sparsity, width, layout, scope)
    step = granularity(experts.width, round_to)
    places = {(layer.index, expert) for layer in experts.running for expert in range(layer.count)}
    ranked = {place: values for place, values in scores.scores.items() if place in places}
    if ranked.keys() != places or any(len(values) != experts.width for values in ranked.values()):
        raise InputError("E436", "the channel scores are those of another model", help="measure them again")
    guarded = {(layer, expert) for layer, ids in (protected or {}).items() for expert in ids} & places
    if min_width is None:
        least = min(step if layout in ("uniform", "per-layer") else LEAST, experts.width)
    else:
        least = min_width
    if not 1 <= least <= experts.width:
        raise UsageError("E245", f"every expert cannot keep {least} of {experts.width} channels", help=f"from 1 to {experts.width}")  # fmt: skip
    problem = _Problem(experts, ranked, frozenset(guarded), step, least, scores.unmeasured, without)
    if layout == "uniform":
        found = problem.uniform(sparsity, width)
    elif layout == "per-layer":
        assert sparsity is not None
        found = problem.per_layer(sparsity)
    else:
        assert sparsity is not None
        found = problem.ranked_together(sparsity, layout, scope)
    return Widths(found.cut, layout, found.stored, found.removed, found.saved, found.refusal,
                  (*scores.notes(), *found.notes))  # fmt: skip


def _check(sparsity: float | None, width: int | None, layout: str, scope: str) -> None:
    for value, allowed, name in ((layout, get_args(Layout), "layout"), (scope, get_args(Scope), "scope")):
        if value not in allowed:
            raise UsageError("E245", f'unknown {name} "{str(value)[:40]}"',
                             help=((close_matches(str(value), allowed) or "") + " one of: " + ", ".join(allowed)).strip())  # fmt: skip
    if (sparsity is None) == (width is None) or (width is not None and layout != "uniform"):
        raise UsageError(
            "E245",
            "say how much goes once: a share of channels, or a width in the uniform layout",
            help="--sparsity 0.25 for a quarter of them",
        )
    if sparsity is not None and not 0 < sparsity < 1:
        raise UsageError(
            "E245", f"a share of {sparsity:g} of channels cannot go", help="a number between 0 and 1"
        )


@dataclass(frozen=True)
class _Problem:
    """The scores and everything that limits the choice."""

    experts: Experts
    scores: Mapping[Place, np.ndarray]
    guarded: frozenset[Place]
    step: int
    least: int
    unmeasured: Mapping[Place, np.ndarray]
    without: tuple[int, ...]

    # ---- uniform -------------------------------------------------------------------------------

    def uniform(self, sparsity: float | None, width: int | None) -> Widths:
        full = self.experts.width
        if width is None:
            assert sparsity is not None
            wanted = np.ceil((1 - sparsity) * full - 1e-9)  # 0.8 * 60 is a hair above 48
            width = max(int(-(-wanted // self.step)) * self.step, self.least)
        if width < 1:
            raise UsageError("E245", f"experts cannot have {width} channels", help=f"from 1 to {full}")
        if width >= full:
            raise InputError("E437", f"nothing would go: rounded up to a multiple of {self.step}, experts keep all {full} channels",
                             help="remove a larger share, or give a smaller --round-to")  # fmt: skip
        notes = []
        if self.guarded:
            notes.append(f"{len(self.guarded)} protected experts are narrowed to {width} channels like all others, because stock readers "
                         "hold one width only; each keeps its best channels")  # fmt: skip
        kept = {place: _best(values, width) for place, values in self.scores.items()}
        return self._made("uniform", kept, width, notes)

    # ---- per layer -----------------------------------------------------------------------------

    def per_layer(self, sparsity: float) -> Widths:
        """Give each layer one width, so that the summed scores of what goes are least and a budget is kept.

        The cost of a layer is convex in its width, because each expert gives up its lowest channels first; the
        exact solution is found by dynamic programming, also where the whole width is no multiple of the step.
        """
        full = self.experts.width
        layers = self.experts.running
        budget = int(np.floor((1 - sparsity) * full * sum(layer.count for layer in layers) + 1e-9))
        widths = _multiples(full, self.step, self.least)
        costs, sizes = [], []
        for layer in layers:
            lost = sum(_lost(self.scores[layer.index, expert]) for expert in range(layer.count))
            assert isinstance(lost, np.ndarray)
            cost = np.array([lost[full - width] for width in widths])
            if any((layer.index, expert) in self.guarded for expert in range(layer.count)):
                cost[[width < full for width in widths]] = np.inf
            costs.append(cost)
            sizes.append(np.array([layer.count * width for width in widths], dtype=np.float64))
        chosen = solve(costs, sizes, budget)
        if chosen is None:
            held = sum(1 for cost in costs if np.isinf(cost).any())
            raise InputError("E437", f"{1 - sparsity:.0%} of the channels cannot hold every layer"
                             + (f": {held} of {len(layers)} layers have protected experts and keep all" if held else f" at {self.least} or more a piece"),
                             help="remove a smaller share" + (", or --no-protect" if held else ", or give a smaller --round-to"))  # fmt: skip
        picked = {layer.index: widths[level] for layer, level in zip(layers, chosen, strict=True)}
        kept = {place: _best(values, picked[place[0]]) for place, values in self.scores.items()}
        found = self._made("per-layer", kept, None, [])
        if not found.removed:
            raise InputError("E437", "nothing would go", help="remove a larger share")
        return found

    # ---- padded and ragged ---------------------------------------------------------------------

    def ranked_together(self, sparsity: float, layout: Layout, scope: Scope) -> Widths:
        groups: dict[Place, list[Place]] = {}
        for place in sorted(self.scores):
            key = {"global": (0, 0), "per-layer": (place[0], 0), "per-expert": place}[scope]
            groups.setdefault(key, []).append(place)
        kept: Kept = {}
        for places in groups.values():
            kept.update(self._kept_of(places, sparsity))
        floor = [place for place, ids in kept.items() if len(ids) == self.least < self.experts.width]
        notes = []
        if floor:
            notes.append(f"{_plural(len(floor), 'expert', 'stays', 'stay')} with the least of {self.least} channels and could go entirely "
                         "(--method reap drops whole experts)")  # fmt: skip
        if layout == "ragged":
            return self._made(layout, kept, None, notes)
        widest = max(len(ids) for ids in kept.values())
        width = min(self.experts.width, -(-widest // self.step) * self.step)
        found = self._made(layout, kept, width, notes)
        if width == self.experts.width:
            why = ", because protected experts keep all channels" if self.guarded else ""
            extra = f"padded to the widest expert, all {width} channels are stored and the model gets no smaller{why}"
        else:
            extra = f"every expert is stored with {width} channels; the uniform layout of that width keeps more of them at the same size"
        return Widths(
            found.cut, layout, found.stored, found.removed, found.saved, None, (*found.notes, extra)
        )

    def _kept_of(self, places: list[Place], sparsity: float) -> Kept:
        """Return what stays of experts whose channels are ranked together."""
        full = self.experts.width
        values = np.stack([self.scores[place] for place in places])
        free = np.ones_like(values, dtype=bool)
        for row, place in enumerate(places):
            if place in self.guarded:
                free[row] = False
            else:
                free[row, _best(values[row], self.least)] = False
        going = int(np.floor(sparsity * values.size + 1e-9))
        candidates = np.flatnonzero(free)
        if going > len(candidates):
            raise InputError("E437", f"{going} of {values.size} channels cannot go: only {len(candidates)} may, the others are protected "
                             f"or the last {self.least} of an expert", help="remove a smaller share, or --no-protect")  # fmt: skip
        # Of equal scores the later one goes first.
        order = np.lexsort((-candidates, values.reshape(-1)[candidates]))
        stays = np.ones(values.size, dtype=bool)
        stays[candidates[order[:going]]] = False
        stays = stays.reshape(len(places), full)
        return {place: np.flatnonzero(stays[row]) for row, place in enumerate(places)}

    # ---- result --------------------------------------------------------------------------------

    def _made(self, layout: Layout, kept: Kept, width: int | None, notes: list[str]) -> Widths:
        full = self.experts.width
        channels = {place: tuple(map(int, ids)) for place, ids in kept.items() if len(ids) < full}
        idle = [layer for layer in self.experts.layers if not layer.runs and layer.index not in self.without]
        if idle and width is not None and width < full:
            for layer in idle:
                for expert in range(layer.count):
                    values = self.unmeasured.get((layer.index, expert))
                    if values is None:
                        raise InputError("E437", f"layer {layer.index} predicts further tokens and its experts cannot be narrowed",
                                         help="--mtp drop leaves the layer out")  # fmt: skip
                    channels[layer.index, expert] = tuple(map(int, _best(values, width)))
            notes.append(f"{_plural(len(idle), 'layer', 'that predicts', 'that predict')} further tokens, without part in the loss: experts there keep the {width} "
                         "channels with the largest weights (|up|^2 |down|^2)")  # fmt: skip
        total = len(kept) * full
        removed = 1 - sum(len(ids) for ids in kept.values()) / total
        stored = {
            layer.index: float(width)
            if width is not None
            else float(np.mean([len(kept[layer.index, expert]) for expert in range(layer.count)]))
            for layer in self.experts.running
        }
        saved = 1 - sum(stored[layer.index] * layer.count for layer in self.experts.running) / total
        cut = ExpertCut(channels=channels, width=width if layout == "padded" else None, without=self.without)
        return Widths(cut, layout, stored, removed, saved, REFUSALS.get(layout), tuple(notes))


REFUSALS: dict[Layout, str] = {
    "per-layer": "no program loads layers whose experts differ in width: stock classes take one width for all, and there is no "
    "reader of block_configs for mixtures of experts",
    "ragged": "no program loads experts that differ in width: this layout is evaluated, not written",
}  # fmt: skip
"""Layout -> why it cannot be written."""


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the ``count`` channels of highest score, ascending; of equal ones the lower number stays."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _lost(scores: np.ndarray) -> np.ndarray:
    """Return the sum of the n lowest scores for n = 0 ... I [I + 1]."""
    return np.concatenate([[0.0], np.cumsum(np.sort(scores))])


def _multiples(full: int, step: int, least: int) -> tuple[int, ...]:
    """Return the widths a layer may have, descending: the whole one and all multiples of the step."""
    return (full, *(width for width in range((full - 1) // step * step, 0, -step) if width >= least))


def _plural(count: int, what: str, one: str, more: str) -> str:
    return f"{count} {what} {one}" if count == 1 else f"{count} {what}s {more}"


# ---- targets ---------------------------------------------------------------------------------------


def channel_parameters(checkpoint: Checkpoint, experts: Experts) -> int:
    """Return the parameters of one channel, summed over all experts of all layers."""
    total = 0
    for layer in experts.layers:
        for tensor in layer.tensors:
            if tensor.channel_axis is not None and not tensor.companion:
                total += checkpoint.tensors[tensor.name].elements
    return total // experts.width


def sparsity_of_total(share: float, checkpoint: Checkpoint, experts: Experts) -> float:
    """Return the share of expert channels whose removal takes a share of all parameters away.

    Raises:
        UsageError: E245 the share is not between 0 and 1.
        InputError: E437 the channels of experts are not that many.
    """
    if not 0 < share < 1:
        raise UsageError(
            "E245", f"a share of {share:g} of parameters cannot go", help="a number between 0 and 1"
        )
    everything = sum(info.elements for info in checkpoint.tensors.values())
    narrowable = channel_parameters(checkpoint, experts) * experts.width
    if share * everything >= narrowable:
        raise InputError("E437", f"{share:.0%} of all parameters cannot go: the channels of experts are {narrowable / everything:.0%} of them",
                         help="remove a smaller share")  # fmt: skip
    return share * everything / narrowable


def width_for(
    checkpoint: Checkpoint,
    experts: Experts,
    *,
    size: float | None = None,
    parameters: float | None = None,
    round_to: RoundTo = "auto",
    without: tuple[int, ...] = (),
) -> int:
    """Return the largest uniform width with which a model has at most a size in bytes, or a number of parameters.

    Bytes are those of all tensors and a bound of the headers; what else changes with the width (shared experts
    that readers size by it) is counted.

    Raises:
        InputError: E437 even the least width is too large, or the whole one is not. What `ExpertView` raises.
        UsageError: E245 none of the two, or both.
    """
    if (size is None) == (parameters is None):
        raise UsageError("E245", "give a size or a number of parameters", help="such as 30GB or 20B")
    target = size if size is not None else parameters
    assert target is not None
    step = granularity(experts.width, round_to)

    def measure(width: int) -> int:
        ids = tuple(range(width))
        places = [
            (layer.index, expert)
            for layer in experts.layers
            if layer.index not in without
            for expert in range(layer.count)
        ]
        narrow = dict.fromkeys(places, ids) if width < experts.width else {}
        view = ExpertView(checkpoint, experts, ExpertCut(channels=narrow, without=without))
        infos = view.tensors.values()
        if parameters is not None:
            return sum(info.elements for info in infos)
        return sum(info.nbytes + len(info.name.encode()) + HEADER_ENTRY for info in infos)

    unit = "bytes" if size is not None else "parameters"
    widths = _multiples(experts.width, step, 1)
    whole, smallest = measure(widths[0]), measure(widths[-1])
    if whole <= target:
        raise InputError("E437", f"the model has {whole:,} {unit} already, not more than {target:,.0f}", help="give a smaller target")  # fmt: skip
    if smallest > target:
        raise InputError("E437", f"with experts of {widths[-1]} channels the model still has {smallest:,} {unit}, more than {target:,.0f}",
                         help="drop whole experts: --method reap, or give a larger target")  # fmt: skip
    low, high = 0, len(widths) - 1  # widths[high] fits, widths[low] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(widths[middle]) <= target else (middle, high)
    return widths[high]
