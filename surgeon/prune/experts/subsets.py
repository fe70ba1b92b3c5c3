"""NAEE: of all ways to keep r experts of a layer, the one whose output is nearest (arXiv 2402.14800, section 3.2).

For a token let f_i be the output of expert i, for all experts, g the weights of the layer as it is and g^S those after
the tokens are routed again among the experts of S alone (the others' logits at minus infinity). Then

    ||Z - Z_S||^2 = (g - g^S)' G (g - g^S),   G_ij = f_i . f_j,

so once the products G are there (E x E numbers a token), a subset costs a routing and no hidden state. The routing is
the model's own router, given the stored logits, whatever its kind.

Dropping one expert alone gives the leave-one-out error from the same numbers.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.experts import one_expert
from surgeon.calibrate.pieces import is_experts
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import EnvironmentFault, InputError, UsageError
from surgeon.prune.experts.rerouting import Rerouter, dense_weights
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import Experts

Search = Literal["auto", "exhaustive", "greedy"]
Kept = tuple[int, ...]

MOST_SUBSETS = 20_000
"""Subsets of a layer that are all tried; beyond it experts are removed one after the other."""

AT_ONCE = 1 << 25
"""Numbers of all experts' outputs held at once."""

TOKENS_AT_ONCE = 1 << 14

ROUNDING = 1e-6
"""Changes of weights below this share of a token's largest weight are rounding."""


class LayerOutputs:
    """What is kept of one layer's tokens: products of outputs, logits, weights.

    Attributes:
        tokens: how many.
    """

    def __init__(self, rerouter: Rerouter, count: int) -> None:
        self.count = count
        self._rerouter = rerouter
        self._blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._whole: float | None = None

    @property
    def tokens(self) -> int:
        return sum(len(logits) for _, logits, _ in self._blocks)

    def add(self, products: Tensor, logits: Tensor, weights: Tensor) -> None:
        """Add tokens: G float32 [T, E, E], logits [T, E], the layer's own weights float32 [T, E], 0 where not chosen."""
        self._blocks.append((products, logits, weights))

    def error(self, kept: Collection[int]) -> float:
        """Return sum over tokens of ||Z - Z_S||^2 for the experts that stay."""
        gone = [expert for expert in range(self.count) if expert not in kept]
        total = 0.0
        for products, logits, weights in self._blocks:
            for start in range(0, len(logits), TOKENS_AT_ONCE):
                chosen = slice(start, start + TOKENS_AT_ONCE)
                change = weights[chosen] - self._rerouter.weights(logits[chosen], gone)
                # The last bit of a softmax depends on the batch; a token that none of them served must cost nothing.
                change[change.abs() <= ROUNDING * weights[chosen].amax(-1, keepdim=True)] = 0
                total += _quadratic(products[chosen], change)
        return total

    @property
    def whole(self) -> float:
        """Sum over tokens of ||Z||^2."""
        if self._whole is None:
            self._whole = sum(_quadratic(products, weights) for products, _, weights in self._blocks)
        return self._whole


def _quadratic(products: Tensor, change: Tensor) -> float:
    """Return sum_t c_t' G_t c_t in float64; rounding may leave a hair below zero, which is zero."""
    found = torch.einsum("ti,tij,tj->t", change.double(), products.double(), change.double())
    return float(found.clamp_min(0).sum())


Finished = Callable[[int, LayerOutputs], Kept | None]
"""Called with a layer's number and what was kept of it; returns the experts that stay for what follows, or None."""


class _Gathering:
    """The observer of a walk that multiplies every expert's outputs with every other's."""

    def __init__(self, walk: Walk, experts: Experts, limit: int, finished: Finished) -> None:
        self._walk = walk
        self._record = experts.record
        self._counts = {layer.index: layer.count for layer in experts.running}
        total = sum(len(batch.samples) * batch.length for batch in walk.batches)
        self._stride = max(1, math.ceil(total / limit))
        self._finished = finished
        self._masked: tuple[Rerouter, list[int]] | None = None
        self._held: Any = None

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was wanted")

    @contextmanager
    def around_layer(self, number: int, root: nn.Module, watching: Watching) -> Iterator[None]:
        """Look at a layer while it runs, if it has experts."""
        self.release()
        if number not in self._counts:
            yield
            return
        module: Any = next(part for part in root.modules() if is_experts(part))
        if any(parameter.is_meta for parameter in module.parameters()):
            raise EnvironmentFault("E504", f"the experts of layer {number} do not fit the memory limit together, which trying subsets "
                                   "of them needs", help="raise --memory-limit, or use --method reap")  # fmt: skip
        count = self._counts[number]
        rerouter = Rerouter(number, root, self._record, count)
        outputs = LayerOutputs(rerouter, count)
        seen = 0

        def look(_: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            nonlocal seen
            if watching.batch is None:
                return
            hidden, index, scale = (*args, *kwargs.values())[:3]
            rows = watching.rows(torch.arange(len(hidden))[:, None])[:, 0]
            rows = rows[(-seen) % self._stride :: self._stride]
            seen += int(watching.batch.mask().sum())
            weights = dense_weights(index[rows], scale[rows], count)
            logits = rerouter.seen(len(hidden))[rows]
            again = rerouter.weights(logits, ())
            if not torch.allclose(again, weights, rtol=1e-3, atol=1e-5):
                raise InputError("E444", f"the routing of layer {number} cannot be repeated from its logits",
                                 help="this family is not supported here: use --method reap")  # fmt: skip
            for start in range(0, len(rows), step := max(1, AT_ONCE // (count * hidden.shape[-1]))):
                some = slice(start, start + step)
                outputs.add(_products(module, hidden[rows[some]]).cpu(), logits[some], weights[some].cpu())

        handle = module.register_forward_hook(look, with_kwargs=True)
        try:
            with rerouter.watching():
                yield
        finally:
            handle.remove()
        if not outputs.tokens:
            raise InputError("E444", f"no token was seen at the experts of layer {number}", help="this family is not supported here: use --method reap")  # fmt: skip
        stays = self._finished(number, outputs)
        if stays is not None:
            self._masked = (rerouter, [expert for expert in range(count) if expert not in stays])

    def mask(self, number: int) -> dict[str, Tensor]:
        """Let the layer that was just looked at run without the experts that go, until `release`."""
        if self._masked is not None:
            rerouter, gone = self._masked
            self._held = rerouter.without(gone)
            self._held.__enter__()
        return {}

    def release(self) -> None:
        if self._held is not None:
            self._held.__exit__(None, None, None)
        self._held = self._masked = None


def _products(module: Any, hidden: Tensor) -> Tensor:
    """Return f_i . f_j of all experts for tokens [T, hidden], float32 [T, E, E]."""
    rows = torch.arange(len(hidden), device=hidden.device)
    found = [
        one_expert(module, expert, rows, hidden, lambda e, name: getattr(module, name)[e]).float()
        for expert in range(module.num_experts)
    ]
    outputs = torch.stack(found, dim=1)
    return outputs @ outputs.transpose(1, 2)


def gather(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    experts: Experts,
    finished: Finished,
    *,
    progressive: bool = False,
    most_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Run a model over samples and hand over `LayerOutputs` of one layer after the other.

    Where products of all tokens would take more than a quarter of the memory limit, or ``most_tokens`` are fewer, every
    n-th token is used.

    Args:
        finished: called when a layer has run; the numbers are dropped afterwards.
        progressive: the next layer gets what this one puts out with only the experts that ``finished`` returns.

    Raises:
        InputError: E444 a family whose routing cannot be repeated; what a walk raises. EnvironmentFault: E504.
    """
    refuse_weighted_inputs(experts)
    limit = max(1, settings.budget() // 4 // (4 * experts.count * (experts.count + 2)))
    limit = limit if most_tokens is None else min(limit, most_tokens)
    with Walk(checkpoint, samples, settings) as walk:
        observer = _Gathering(walk, experts, limit, finished)
        try:
            walk.run(observer, progress=progress, stop=stop, replace=observer.mask if progressive else None)
        finally:
            observer.release()


def refuse_weighted_inputs(experts: Experts) -> None:
    """Raise E444 for a family whose experts' outputs cannot be weighed again."""
    if experts.record.router.gate_on == "input":
        raise InputError("E444", "this family's experts are given weighted inputs, so their outputs cannot be weighed again",
                         help="use --method reap")  # fmt: skip


def naee(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    experts: Experts,
    keep: int,
    *,
    search: Search = "auto",
    progressive: bool = False,
    most_tokens: int | None = None,
    protected: Mapping[int, Collection[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> tuple[ExpertCut, dict[str, Any]]:
    """Keep in every layer the experts whose output together is nearest to that of all.

    Args:
        keep: experts every layer keeps, equally many in each routing group.
        search: "exhaustive" tries all subsets, "greedy" removes the experts whose loss hurts least one after the other,
            "auto" tries all where a layer has at most 20,000.
        progressive: layers are chosen on what the pruned layers before them put out.
        most_tokens: of each layer that are looked at; None: all that memory allows.
        protected: layer -> experts that stay.
        progress, stop: as `surgeon.calibrate.walk.Walk.run`.

    Returns:
        What stays, and the record: search, and for each layer tokens, kept experts, and the error sum ||Z - Z_S||^2 over
        sum ||Z||^2.

    Raises:
        UsageError: E248 too many subsets for an exhaustive search, or numbers that do not go together; as `gather`.
    """
    _check(experts, keep, search, protected or {})
    kept: dict[int, Kept] = {}
    layers: dict[str, Any] = {}

    def finished(number: int, outputs: LayerOutputs) -> Kept:
        chosen, tried = best(outputs, keep, experts.groups, (protected or {}).get(number, ()), search)
        kept[number] = chosen
        error = outputs.error(chosen) / outputs.whole if outputs.whole else 0.0
        layers[str(number)] = {"kept": list(chosen), "tokens": outputs.tokens, "subsets": tried, "error": float(f"{error:.6g}")}  # fmt: skip
        return chosen

    gather(
        checkpoint, samples, settings, experts, finished, progressive=progressive, most_tokens=most_tokens,
        progress=progress, stop=stop,
    )  # fmt: skip
    last = kept[experts.running[-1].index]
    kept |= {layer.index: last for layer in experts.layers if not layer.runs}
    used = _search(experts, keep, search)
    return ExpertCut(kept), {"method": "naee", "search": used, "progressive": progressive, "layers": layers}


def leave_one_out(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    experts: Experts,
    *,
    most_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> dict[int, np.ndarray]:
    """Return for every layer sum_t ||y_t - y_t without i||^2 / T of each expert i, float64 [E]; higher is kept.

    y without i is the output with all tokens routed again, i's logit at minus infinity (NVIDIA Model-Optimizer's
    "independent" score).
    """
    found: dict[int, np.ndarray] = {}

    def finished(number: int, outputs: LayerOutputs) -> None:
        every = range(outputs.count)
        errors = [outputs.error([other for other in every if other != expert]) for expert in every]
        found[number] = np.array(errors) / max(1, outputs.tokens)

    gather(
        checkpoint,
        samples,
        settings,
        experts,
        finished,
        most_tokens=most_tokens,
        progress=progress,
        stop=stop,
    )
    return found


# ---- search --------------------------------------------------------------------------------------


def subsets(count: int, keep: int, groups: int) -> int:
    """Return how many ways there are to keep equally many experts in every group."""
    return math.comb(count // groups, keep // groups) ** groups


def best(
    outputs: LayerOutputs,
    keep: int,
    groups: int = 1,
    protected: Collection[int] = (),
    search: Search = "auto",
) -> tuple[Kept, int]:
    """Return the experts to keep, ascending, and how many subsets were tried; of equal ones the first in order."""
    size, each = outputs.count // groups, keep // groups
    ranges = [range(group * size, (group + 1) * size) for group in range(groups)]
    if search == "exhaustive" or (search == "auto" and subsets(outputs.count, keep, groups) <= MOST_SUBSETS):
        choices = [
            [
                one
                for one in itertools.combinations(members, each)
                if set(members) & set(protected) <= set(one)
            ]
            for members in ranges
        ]
        tried, found = 0, (math.inf, ())
        for parts in itertools.product(*choices):
            subset = tuple(itertools.chain(*parts))
            found = min(found, (outputs.error(subset), subset))
            tried += 1
        return found[1], tried
    stays = list(range(outputs.count))
    tried = 0
    while len(stays) > keep:
        free = [
            e for members in ranges if sum(m in stays for m in members) > each for e in members if e in stays
        ]
        tried += len(free := [expert for expert in free if expert not in protected])
        worst = min(free, key=lambda e: (outputs.error([other for other in stays if other != e]), -e))
        stays.remove(worst)
    return tuple(stays), tried


def _search(experts: Experts, keep: int, search: Search) -> str:
    few = subsets(experts.count, keep, experts.groups) <= MOST_SUBSETS
    return search if search != "auto" else "exhaustive" if few else "greedy"


def _check(experts: Experts, keep: int, search: str, protected: Mapping[int, Collection[int]]) -> None:
    count, groups = experts.count, experts.groups
    if not experts.top_k <= keep <= count or keep % groups:
        raise UsageError("E248", f"{keep} of {count} experts in {groups} routing groups cannot be kept, a token uses {experts.top_k}",
                         help=f"keep a multiple of {groups} from {experts.top_k} to {count}")  # fmt: skip
    if search not in ("auto", "exhaustive", "greedy"):
        raise UsageError("E248", f'"{search}" is no way to search subsets', help="auto, exhaustive or greedy")
    number = subsets(count, keep, groups)
    if search == "exhaustive" and number > MOST_SUBSETS:
        raise UsageError("E248", f"{number:,} subsets a layer are too many to try, the limit is {MOST_SUBSETS:,}",
                         help="--search greedy removes experts one after the other")  # fmt: skip
    each, size = keep // groups, count // groups
    for layer, ids in protected.items():
        for group in range(groups):
            inside = sorted(e for e in set(ids) if e // size == group)
            if len(inside) > each:
                raise UsageError("E248", f"{len(inside)} experts of layer {layer} are protected ({', '.join(map(str, inside))}), but only "
                                 f"{each} may stay", help="keep more experts, protect fewer, or --no-protect")  # fmt: skip
