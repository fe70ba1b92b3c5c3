"""What cuts do to a model's output: several cuts of one model scored in one pass over its layers.

A layer's weights are read once; for each cut its output matrices are replaced by masked ones (columns of what
is removed are zero, those of what stays solved again where somebody solved them), which computes what the
smaller model would. Cuts that agree up to some layer share their activations up to there.

The loss of a language model is the mean KL(dense || cut) of a token, in nats; that of a model without output
embedding, or one that sees later tokens, the normalised squared error of the last hidden state.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.conditions import threads
from surgeon.calibrate.head import Head
from surgeon.calibrate.logit_divergence import PLACES, divergences
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Where
from surgeon.prune.layer_sweep import LayerSweep
from surgeon.structure.check import check
from surgeon.structure.cut import Cut, Kept, LayerCut
from surgeon.structure.parts import Attention, Ffn, Structure

ENTRY, DENSE, FIRST = 0, 1, 2
"""Streams: the input of layer 0, the dense model's last hidden states, the first of those of cuts."""

CHUNKS = 4
"""Times `PLACES` positions whose last hidden states of all cuts are held at once, where memory allows."""


@dataclass(frozen=True)
class Solved:
    """An output matrix solved again for the inputs that stay.

    Attributes:
        weight: float32 [out, kept inputs].
        bias: [out], which takes the place of the module's or is added to a module without one; None leaves it.
    """

    weight: Tensor
    bias: Tensor | None = None


Weights = Callable[[int, str, Kept], Solved | None]
"""(layer, "attention" or "ffn", kept query heads or channels) -> weights; None takes the source's columns."""

Decision = LayerCut | None
Group = tuple[int, list[int]]
"""A stream and the cuts that share it so far."""


class TrueLoss:
    """Scores cuts against the dense model. A context manager, or to be closed.

    Args:
        checkpoint: the model.
        structure: of it.
        samples: token ids, one array each.
        settings: where and how it runs.
        most: cuts scored in one pass; fewer when their activations would not fit the memory.
        progress: called with (layers done, layers) of each pass.
        stop: set it to stop.

    Attributes:
        measure: "kl" or "nmse".
        at_once: cuts scored in one pass.
        passes: how often the layers were read.

    Raises (constructor):
        InputError: E380-E383, E385 the model cannot be run over the samples.
        EnvironmentFault: E504 a layer does not fit the memory limit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        samples: Sequence[np.ndarray],
        settings: Settings,
        *,
        most: int = 16,
        progress: Callable[[int, int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        budget = settings.budget()
        self._checkpoint = checkpoint
        self._structure = structure
        self._progress = progress
        self._settings = settings
        self._solved = _Cache(budget // 8)
        # An eighth is for solved weights; the sweep takes its own limit for layers and a quarter more for
        # streams; the rest is for logits.
        shared = replace(settings, memory_limit=budget * 3 // 5)
        self._sweep = LayerSweep(checkpoint, samples, shared, streams=FIRST + most, stop=stop)
        self._budget = shared.budget()
        skeleton = self._sweep.skeleton
        self._element = torch.empty(0, dtype=skeleton.dtype).element_size()
        places = sum(len(batch.samples) * batch.length for batch in self._sweep.batches)
        fitting = self._budget // 4 // max(1, places * skeleton.hidden_size * self._element) - FIRST
        # Where not even one fits, all lie in files, and reading the weights again would only cost more.
        self.at_once = min(most, fitting) if fitting >= 1 else most
        head = skeleton.causal and skeleton.head_module is not None
        self.measure = "kl" if head else "nmse"
        self._head = Head(checkpoint, shared, skeleton=skeleton) if head else None
        self._begun = False
        self.passes = 0

    def __enter__(self) -> TrueLoss:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release activations, files included, and solved weights."""
        with self._sweep:  # its streams end with its context
            self._solved.clear()
        self._begun = False

    def __call__(self, cuts: Sequence[Cut], weights: Weights | None = None) -> list[float]:
        """Return the loss of each cut; infinite where it is not finite.

        Args:
            cuts: what is kept; the residual stream stays whole.
            weights: solved weights; None takes the source's columns. What it returns is kept for later calls
                with an equal ``weights``.

        Raises:
            UsageError, InputError: as `surgeon.structure.check.check`; E384 the dense model's outputs are not finite.
            Interrupted: E130 ``stop`` was set.
        """
        config = self._checkpoint.config
        assert config is not None  # structure_of refuses a model without one
        for cut in cuts:
            assert cut.hidden is None, "a cut of the residual stream cannot share the model's other weights"
            check(cut, self._structure, config, allow_norm_approx=True)
        distinct = list(dict.fromkeys(cuts))
        found: dict[Cut, float] = {}
        with torch.no_grad(), threads(self._settings.threads):
            if not self._begun:
                self._begin()
            self._solved.use(weights)
            for start in range(0, len(distinct), self.at_once):
                part = distinct[start : start + self.at_once]
                found.update(zip(part, self._compare(self._run(part)), strict=True))
        return [found[cut] for cut in cuts]

    def _begin(self) -> None:
        """Compute the dense model's last hidden states."""
        sweep = self._sweep
        sweep.embed(ENTRY)
        [(stream, _)] = self._run([Cut.whole(self._structure.layers)])
        for number in range(len(sweep.batches)):
            final = sweep.get(stream, number)
            if not bool(torch.isfinite(sweep.real(number, final)).all()):
                raise InputError(
                    "E384", f"the outputs of {self._checkpoint.label} are not finite", where=Where(self._checkpoint.label),
                    help="its weights are damaged, or the precision is too narrow: try bfloat16 or float32",
                )  # fmt: skip
            sweep.put(DENSE, number, final)
        self._begun = True

    # ---- running -------------------------------------------------------------------------------

    def _run(self, cuts: Sequence[Cut]) -> list[Group]:
        """Leave the last hidden states of cuts in streams, and return which cuts are in which."""
        sweep, layers = self._sweep, self._structure.layers
        decisions = [[self._normal(cut, layer) for layer in range(layers)] for cut in cuts]
        needed = [n for n in range(layers) if any(decided[n] is not None for decided in decisions)]
        groups: list[Group] = [(ENTRY, list(range(len(cuts))))]
        free = list(range(FIRST + len(cuts) - 1, FIRST - 1, -1))
        self.passes += 1
        for done, layer in enumerate(sweep.over(needed)):
            groups = [
                part
                for group in groups
                for part in self._through(layer, group, [decided[layer] for decided in decisions], free)
            ]
            if self._progress is not None:
                self._progress(done + 1, len(needed))
        for stream, _ in groups:
            for number in range(len(sweep.batches)):
                sweep.put(stream, number, sweep.finish(stream, number))
        return groups

    def _through(
        self, layer: int, group: Group, decisions: Sequence[Decision], free: list[int]
    ) -> Iterator[Group]:
        """Take the cuts of one stream through a layer, and yield the streams they are in then."""
        stream, members = group
        parted: dict[Decision, list[int]] = {}
        for member in members:
            parted.setdefault(decisions[member], []).append(member)
        passing = parted.pop(None, None)  # a dropped layer leaves its input as it is
        if passing is not None:
            yield stream, passing
        for place, (decision, part) in enumerate(parted.items()):
            assert decision is not None
            last = place == len(parted) - 1 and passing is None and stream != ENTRY
            target = stream if last else free.pop()
            with self._installed(layer, decision) as skipped:
                self._sweep.advance(layer, [(stream, target)], skipped)
            yield target, part

    def _normal(self, cut: Cut, layer: int) -> Decision:
        """Return what a cut does to a layer, in one form: None for a part that stays whole."""
        kept = cut.layers[layer]
        if kept is None:
            return None
        whole = self._structure.shape(layer)
        heads = None if kept.heads is not None and len(kept.heads) == whole.heads else kept.heads
        channels = None if kept.channels is not None and len(kept.channels) == whole.ffn else kept.channels
        return LayerCut(heads, channels)

    @contextmanager
    def _installed(self, layer: int, decision: LayerCut) -> Iterator[list[str]]:
        """Mask the output matrices of the loaded layer, and give the names of those that are skipped altogether."""
        parts = ((self._structure.attention[layer], decision.heads), (self._structure.ffn[layer], decision.channels))  # fmt: skip
        skipped: list[str] = []
        with ExitStack() as held:
            for part, kept in parts:
                if part is None or kept is None:
                    continue
                if not kept:
                    skipped.append(part.output.module)
                else:
                    held.enter_context(self._masked(part, kept))
            yield skipped

    @contextmanager
    def _masked(self, part: Attention | Ffn, kept: Kept) -> Iterator[None]:
        module: Any = self._output_module(part)
        kind = "attention" if isinstance(part, Attention) else "ffn"
        solved = self._solved(part.layer, kind, kept)
        weight, bias = module.weight, module.bias
        module.weight = nn.Parameter(masked(weight, part, kept, solved), requires_grad=False)
        if solved is not None and solved.bias is not None:
            module.bias = nn.Parameter(solved.bias.to(weight.device, weight.dtype), requires_grad=False)
        try:
            yield
        finally:
            module.weight, module.bias = weight, bias

    def _output_module(self, part: Attention | Ffn) -> nn.Module:
        skeleton = self._sweep.skeleton
        path = next(
            path.removesuffix(".weight")
            for path, pieces in skeleton.pieces(part.layer).items()
            if len(pieces) == 1 and pieces[0].tensor == part.output.weight
        )
        return skeleton.model.get_submodule(f"{skeleton.layer_path(part.layer)}.{path}")

    # ---- comparing -----------------------------------------------------------------------------

    def _compare(self, groups: Sequence[Group]) -> list[float]:
        streams = [stream for stream, _ in groups]
        losses = self._divergence(streams) if self._head is not None else self._error(streams)
        by_cut = {
            member: loss for (_, members), loss in zip(groups, losses, strict=True) for member in members
        }
        # Rounding may leave the divergence of a model from itself a hair below 0.
        return [max(0.0, by_cut[n]) if math.isfinite(by_cut[n]) else math.inf for n in sorted(by_cut)]

    def _divergence(self, streams: Sequence[int]) -> list[float]:
        assert self._head is not None
        parts = [divergences(self._head, dense, others) for dense, others in self._positions(streams)]
        return torch.cat(parts, dim=1).mean(1).tolist()

    def _error(self, streams: Sequence[int]) -> list[float]:
        sweep, square, errors = self._sweep, 0.0, [0.0] * len(streams)
        for number in range(len(sweep.batches)):
            dense = sweep.real(number, sweep.get(DENSE, number)).double()
            square += float(dense.square().sum())
            for place, stream in enumerate(streams):
                other = sweep.real(number, sweep.get(stream, number))
                errors[place] += float((other.double() - dense).square().sum())
        return [error / square if square else math.nan for error in errors]

    def _positions(self, streams: Sequence[int]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield the dense model's states [n, hidden] and those of the streams at the same positions.

        As many at once as memory allows, so that the head is not read too often.
        """
        sweep = self._sweep
        each = sweep.skeleton.hidden_size * self._element * (1 + len(streams))
        most = max(1, min(CHUNKS, self._budget // 16 // (each * PLACES))) * PLACES
        held: list[list[Tensor]] = []
        room = most
        for number in range(len(sweep.batches)):
            rows = [sweep.real(number, sweep.get(stream, number)) for stream in (DENSE, *streams)]
            start = 0
            while start < len(rows[0]):
                held.append([row[start : start + room] for row in rows])
                start += len(held[-1][0])
                room -= len(held[-1][0])
                if not room:
                    yield _joined(held)
                    held, room = [], most
        if held:
            yield _joined(held)


def _joined(held: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    dense, *others = (torch.cat(parts) for parts in zip(*held, strict=True))
    return dense, others


def masked(weight: Tensor, part: Attention | Ffn, kept: Kept, solved: Solved | None = None) -> Tensor:
    """Return an output matrix whose removed inputs are zero, in the orientation of ``weight``.

    Args:
        weight: [out, in], or [in, out] for a Conv1D.
        part: whose output matrix it is.
        kept: query heads or channels that stay.
        solved: weights of the inputs that stay; None takes those of ``weight``.
    """
    inputs = torch.tensor(kept, dtype=torch.int64, device=weight.device)
    if isinstance(part, Attention):
        inputs = (
            inputs[:, None] * part.head_dim + torch.arange(part.head_dim, device=weight.device)
        ).reshape(-1)
    found = torch.zeros_like(weight)
    rows = found if part.output.input_axis == 1 else found.T
    source = weight if part.output.input_axis == 1 else weight.T
    if solved is None:
        rows[:, inputs] = source[:, inputs]
    else:
        rows[:, inputs] = solved.weight.to(weight.device, weight.dtype)
    return found


class _Cache:
    """Solved weights, the latest within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weights: Weights | None = None
        self._held: OrderedDict[tuple[int, str, Kept], Solved | None] = OrderedDict()
        self._bytes = 0

    def clear(self) -> None:
        self._held.clear()
        self._bytes = 0

    def use(self, weights: Weights | None) -> None:
        """Take weights from here; those of another source are forgotten."""
        if weights != self._weights:
            self.clear()
        self._weights = weights

    def __call__(self, layer: int, kind: str, kept: Kept) -> Solved | None:
        if self._weights is None:
            return None
        key = (layer, kind, kept)
        if key not in self._held:
            self._held[key] = self._weights(layer, kind, kept)
            self._bytes += _bytes(self._held[key])
        self._held.move_to_end(key)
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= _bytes(self._held.popitem(last=False)[1])
        return self._held[key]


def _bytes(solved: Solved | None) -> int:
    return 0 if solved is None else solved.weight.nbytes
