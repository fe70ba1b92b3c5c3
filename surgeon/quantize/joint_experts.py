"""Which experts go and at how many bits the others stay, decided together: both losses on one scale.

    outputs = block_outputs(checkpoint, experts, samples, settings)
    scores = pmq_scores(checkpoint, experts, ...)             # of the same samples
    found = joint_experts(experts, scores, outputs, menu, budget, beside=bytes_beside(checkpoint, experts))

The scale is the relative error of a block's output, the weighted sum F of its routed experts over calibration tokens:

    expert e removed      sum over its tokens of || g f_e(x) ||^2               / sum over all tokens of || F(x) ||^2
    e stored in scheme j  sum over its tokens of || g (f_e(x) - f_ej(x)) ||^2   / the same

Both are exact for one expert by itself with routing and all gates as they are. Errors of several experts are added as if
they were uncorrelated, and what removal does to the gates of the others (renormalised, and a further expert selected
in the place of the one that is gone) is left out. So after a first solution, measure both again on the pruned model and
solve once more with the number of removed experts fixed.

Which of all solutions is best is solved exactly, see `surgeon.quantize.allocation.joint`. Super experts are never
removed, and routing groups lose equally many: their router cuts its rows at fixed borders.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.pieces import is_experts
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, UsageError
from surgeon.formats.scheme import Scheme
from surgeon.quantize.allocation import joint
from surgeon.quantize.expert_bits import Scores
from surgeon.structure.experts.check import check, valid_counts
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import Experts

MATRICES = frozenset({"gate", "up", "gate_up", "down"})


@dataclass(frozen=True)
class BlockOutputs:
    """What the n experts of one layer add to their block's output.

    Attributes:
        layer: its number.
        parts: float64 [n], sum over an expert's tokens of || g f(x) ||^2.
        energy: sum over all tokens of || F(x) ||^2, F being the weighted sum of the routed experts.
    """

    layer: int
    parts: np.ndarray
    energy: float


@dataclass(frozen=True)
class JointExperts:
    """Experts that stay, and how they are stored.

    Attributes:
        cut: what is removed; layers that no pass runs copy the last one that runs.
        schemes: label of a matrix of an expert that stays, by its number in the source -> its scheme.
        removed: experts that go from every layer.
        loss: predicted, the sum of relative errors over layers.
        size: bytes of the experts that stay, with what moves with them.
        status: of the solver: "optimal", "time limit" or "greedy".
    """

    cut: ExpertCut
    schemes: dict[str, Scheme]
    removed: int
    loss: float
    size: int
    status: str


def block_outputs(
    checkpoint: Checkpoint, experts: Experts, samples: Sequence[np.ndarray], settings: Settings, *,
    progress: Callable[[int, int], None] | None = None, stop: threading.Event | None = None,
) -> list[BlockOutputs]:  # fmt: skip
    """Return what every running layer of experts puts out on calibration text; one pass, nothing is kept of a token.

    Args:
        checkpoint: the model, as plain numbers.
        experts: where its experts are.
        samples: token ids, one array a sample; those that the scores are measured on.
        settings: where and how the model runs.
        progress, stop: as `surgeon.calibrate.walk.Walk.run`.

    Raises:
        InputError: E490 a layer of experts shows nothing; what a walk raises.
    """
    energies = _Energies({layer.index: layer.count for layer in experts.running})
    with Walk(checkpoint, samples, settings) as walk:
        walk.run(energies, progress=progress, stop=stop)
    return energies.found


class _Energies:
    """An observer that adds up squared norms of what experts put out (`surgeon.calibrate.experts.RoutingWatch`)."""

    def __init__(self, counts: Mapping[int, int]) -> None:
        self._counts = counts
        self._norms: dict[tuple[int, ...], Tensor] = {}
        self.found: list[BlockOutputs] = []

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was asked for")

    @contextmanager
    def around_layer(self, number: int, root: nn.Module, watching: Watching) -> Iterator[None]:
        """Listen to the experts of a layer while it runs."""
        if number not in self._counts:
            yield
            return
        module: Any = next((part for part in root.modules() if is_experts(part)), None)
        if module is None:
            raise InputError("E490", f"the experts of layer {number} do not run in a way that shows their outputs",
                             help="choose widths and experts one after the other: surgeon prune, then surgeon quantize")  # fmt: skip
        self._watching = watching
        self._on_input = bool(getattr(module, "surgeon_gates_input", False))
        self._parts, self._energy = np.zeros(self._counts[number]), 0.0
        module.surgeon_routing = self
        try:
            yield
        finally:
            del module.surgeon_routing
            self._norms.clear()
        self.found.append(BlockOutputs(number, self._parts, self._energy))

    def output(self, expert: int, rows: Tensor, slots: Tensor, out: Tensor, top_k_index: Tensor) -> None:
        """Note the squared norms of one expert's outputs [rows, hidden], before their weights."""
        batch = self._watching.batch
        if batch is None:
            return
        norms = self._norms.get(batch.samples)
        if norms is None:  # experts that are streamed come for several batches before any of them ends
            norms = torch.zeros(top_k_index.shape, dtype=torch.float64, device=out.device)
            self._norms[batch.samples] = norms
        norms[rows, slots] = out.double().square().sum(-1)

    def chosen(self, top_k_index: Tensor, top_k_weights: Tensor, total: Tensor) -> None:
        """Add up a batch: choices and weights [tokens, k], and the weighted sum [tokens, hidden]."""
        batch = self._watching.batch
        if batch is None:
            return
        norms = self._norms.pop(batch.samples, None)
        if norms is None:  # no token was routed
            norms = torch.zeros(top_k_index.shape, dtype=torch.float64, device=total.device)
        rows = self._watching.rows
        # Where the weight multiplies what enters an expert, its output has it already.
        parts = rows(norms) if self._on_input else rows(norms) * rows(top_k_weights).double().square()
        index = rows(top_k_index).reshape(-1).cpu().numpy()
        real = index < len(self._parts)
        flat = parts.reshape(-1).cpu().numpy()
        self._parts += np.bincount(index[real], flat[real], minlength=len(self._parts))
        self._energy += float(rows(total).double().square().sum())


def bytes_beside(checkpoint: Checkpoint, experts: Experts) -> dict[int, int]:
    """Return, by layer, the bytes that go with one expert beside its matrices: its row of the router, its biases."""
    return {
        layer.index: math.ceil(
            sum(checkpoint.tensors[tensor.name].nbytes for tensor in layer.tensors if tensor.role not in MATRICES) / layer.count
        )
        for layer in experts.running
    }  # fmt: skip


def losses(scores: Sequence[Scores], outputs: Sequence[BlockOutputs]) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of storing experts, [L, n, J], and of removing them, [L, n], on one scale.

    A layer that puts out nothing loses nothing. Super experts cannot be removed: infinity.
    """
    at = {one.layer: one for one in outputs}
    kept, removal = [], []
    for one in scores:
        block = at[one.layer]
        squares = np.square(np.asarray(one.error, dtype=np.float64))
        squares = squares.sum(axis=1) if squares.ndim == 3 else squares
        kept.append(squares / block.energy if block.energy > 0 else np.zeros_like(squares))
        gone = block.parts / block.energy if block.energy > 0 else np.zeros_like(block.parts)
        gone[list(one.super_experts)] = np.inf
        removal.append(gone)
    return np.stack(kept), np.stack(removal)


def joint_experts(
    experts: Experts, scores: Sequence[Scores], outputs: Sequence[BlockOutputs], menu: Sequence[Scheme], budget: int, *,
    beside: Mapping[int, int], granularity: Literal["expert", "layer"] = "layer", counts: Collection[int] | None = None,
    seconds: float = 60.0,
) -> JointExperts:  # fmt: skip
    """Return which experts go, and the scheme of every matrix of the others.

    Args:
        experts: where the experts are; decides how many must stay.
        scores: of every running layer, measured in the schemes of ``menu``.
        outputs: of the same layers and samples.
        menu: schemes.
        budget: bytes of all experts that stay, with what moves with them.
        beside: see `bytes_beside`.
        granularity: "layer": one scheme for the experts of a layer, which more readers load; "expert": one for each.
        counts: numbers of removed experts to choose among; all that the model allows by default.
        seconds: for each solve.

    Raises:
        UsageError: E462 nothing fits the budget; E489 the numbers of experts cannot be chosen so.
        InputError: E404 experts of a family that cannot lose any.
    """
    if {one.layer for one in scores} != {layer.index for layer in experts.running}:
        raise UsageError("E489", "the matrices of some layers of experts are kept as they are, but all layers lose as many experts",
                         help="leave no layer of experts out, or choose widths alone")  # fmt: skip
    names = tuple(scheme.name for scheme in menu)
    if any(tuple(one.schemes) != names for one in scores):
        raise ValueError(f"scores in {[one.schemes for one in scores]} and a menu of {names}")
    kept, removal = losses(scores, outputs)
    sizes = np.stack([_sizes(one) + beside[one.layer] for one in scores])
    possible = _counts(experts, removal, counts)
    solve = joint.by_expert if granularity == "expert" else joint.by_layer
    found = solve(
        kept,
        removal,
        sizes,
        budget,
        active=experts.top_k,
        counts=possible,
        groups=experts.groups,
        seconds=seconds,
    )
    return _result(experts, scores, menu, found)


def _counts(experts: Experts, removal: np.ndarray, counts: Collection[int] | None) -> list[int]:
    """Return the numbers of experts that may go from every layer."""
    most = joint.removable(removal, experts.groups)
    possible = [experts.count - keep for keep in valid_counts(experts)]
    wanted = sorted(p for p in possible if p <= most and (counts is None or p in counts))
    if not wanted:
        most = max((p for p in possible if p <= most), default=0)
        step = f" in steps of {experts.groups}" if experts.groups > 1 else ""
        raise UsageError("E489", f"from none to {most} of {experts.count} experts can go{step}, not {sorted(counts or ())}",
                         help=f"a token selects {experts.top_k}, protected experts stay, and routing groups lose equally many")  # fmt: skip
    return wanted


def _sizes(one: Scores) -> np.ndarray:
    """Return the bytes of one expert in each scheme, int64 [J]; they are alike within a layer."""
    sizes = np.asarray(one.sizes)
    sizes = sizes.sum(axis=1) if sizes.ndim == 3 else sizes
    if (sizes != sizes[0]).any():
        raise ValueError(f"experts of layer {one.layer} differ in size")
    return sizes[0].astype(np.int64)


def _result(
    experts: Experts, scores: Sequence[Scores], menu: Sequence[Scheme], found: joint.Joint
) -> JointExperts:
    kept: dict[int, tuple[int, ...]] = {}
    schemes: dict[str, Scheme] = {}
    for row, one in enumerate(scores):
        kept[one.layer] = tuple(np.flatnonzero(~found.removed[row]).tolist())
        for expert in kept[one.layer]:
            for part in one.members[expert]:
                for label in (part,) if isinstance(part, str) else part:
                    schemes[label] = menu[int(found.columns[row, expert])]
    last = kept[max(kept)]
    kept |= {layer.index: last for layer in experts.layers if not layer.runs}
    cut = ExpertCut(kept) if found.count else ExpertCut()
    check(experts, cut)
    return JointExperts(cut, schemes, found.count, found.loss, found.size, found.status)
