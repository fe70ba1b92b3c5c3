"""What PMQ asks of the experts of a model: how often each is selected, with what weight, and what storing it costs its block.

    layers = pmq_scores(checkpoint, experts, matrices, menu, form, samples, settings, Options("rtn"))
    widths = pmq.solve([layer.rows() for layer in layers], budget)

    phi_i    tokens that selected expert i / tokens
    w_i      its routing probability before the selection is renormalised, summed over these tokens / tokens
    eps_ij   || sum over these tokens of g (f_i(x) - f_ij(x)) ||, the change of the block's output where expert i alone is
             stored in scheme j: the router's input and all other experts stay as they are, so nothing else is computed;
             by projection f_ij is the expert with only its gate and up, or only its down projection, in scheme j

Two passes over the unquantized model, the second with the inputs of one block at a time in memory. The published code
measures eps with plain rounding, which is enough to rank experts; with GPTQ it is that of the quantizer.

Super experts (`surgeon.experts.super_experts`) are pinned at the largest scheme, and charged. That is not in the paper.

Source: MC-MoE (arXiv 2410.06270, section 3.2).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.experts import routed, weighted_expert
from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.calibrate.output_gradients import Places, places_of
from surgeon.calibrate.routing import Routed, route
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.errors import InputError, Interrupted, Where
from surgeon.experts.super_experts import by_peaks
from surgeon.experts.top_p import probabilities
from surgeon.formats.scheme import Scheme
from surgeon.quantize.allocation import pmq
from surgeon.quantize.forms import Form
from surgeon.quantize.measuring.deltas import Quantizer, name_of
from surgeon.quantize.measuring.observed import by_module
from surgeon.quantize.observing import Inputs
from surgeon.quantize.solving import Options
from surgeon.structure.experts.parts import Experts

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerScores:
    """One layer of n experts in J schemes.

    Attributes:
        layer: its number.
        schemes: names, J of them.
        members: of each expert, the labels of its matrices; by projection a tuple of them for each.
        frequency: phi, float64 [n].
        weight: w, float64 [n].
        error: eps, float64 [n, J], or [n, P, J] by projection.
        sizes: bytes, int64, of the shape of ``error``.
        super_experts: those that must not lose anything.
    """

    layer: int
    schemes: tuple[str, ...]
    members: tuple[tuple[Any, ...], ...]
    frequency: np.ndarray
    weight: np.ndarray
    error: np.ndarray
    sizes: np.ndarray
    super_experts: tuple[int, ...] = ()

    @property
    def unused(self) -> tuple[int, ...]:
        """Experts that no token selected: they cost nothing in any scheme, and get the smallest."""
        return tuple(np.flatnonzero(self.frequency == 0).tolist())

    def rows(
        self, *, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0, must: Sequence[str] = ()
    ) -> pmq.Experts:
        """Return what can be chosen: one row an expert, one column a scheme, super experts pinned; not by projection.

        Args:
            alpha, beta, gamma: exponents of frequency, weight and error.
            must: schemes that must appear in the layer.
        """
        costs = pmq.importance(self.frequency, self.weight, self.error, alpha=alpha, beta=beta, gamma=gamma)
        columns = tuple(self.schemes.index(name) for name in must)
        found = pmq.Experts(costs, self.sizes, columns, priority=self.frequency * self.weight)
        return pmq.with_pins(found, self.super_experts)


def pmq_scores(
    checkpoint: Checkpoint, experts: Experts, layers: Sequence[Sequence[Matrix]], menu: Sequence[Scheme], form: Form,
    samples: Sequence[np.ndarray], settings: Settings, options: Options, *, by_projection: bool = False,
    progress: Tell | None = None, stop: threading.Event | None = None,
) -> list[LayerScores]:  # fmt: skip
    """Return the scores of every layer of experts that runs and whose experts' matrices are all given.

    Args:
        checkpoint: the model, as plain numbers.
        experts: where its experts are.
        layers: matrices by layer; those that are not of experts are ignored.
        menu: schemes.
        form: says how they are stored.
        samples: calibration tokens, one array a sample.
        settings: where and how the model runs.
        options: of the quantizer.
        by_projection: of each projection of an expert by itself, gate and up together, instead of whole experts.
        progress: called with (what, done, total).
        stop: set it to stop.

    Raises:
        InputError: E477 no layer of experts can be scored, or a scheme fits an expert's matrices nowhere; E430.
        Interrupted: E130.
    """
    tell = progress or (lambda *_: None)
    counts = {layer.index: layer.count for layer in experts.running}
    wanted = {n: [m for m in layer if m.routed] for n, layer in enumerate(layers) if n in counts}
    wanted = {number: matrices for number, matrices in wanted.items() if matrices}
    if not wanted:
        raise InputError("E477", f"{checkpoint.label} has no experts whose widths could be chosen", where=Where(checkpoint.label),
                         help="widths of experts are chosen in mixtures of experts stored as plain numbers")  # fmt: skip
    use = _Use(experts, counts)
    total = route(checkpoint, samples, settings, use, experts=experts, stop=stop,
                  progress=lambda done, steps: tell("routing", done, steps))  # fmt: skip
    pinned = [one for one in by_peaks(use.peaks, total) if one.certain]
    errors = _Errors(
        checkpoint, wanted, counts, Quantizer(form, menu, options), len(menu), options, by_projection, stop
    )
    with Walk(checkpoint, samples, replace(settings, spill=None)) as walk:
        errors.run(walk, tell)
    found = []
    for number, matrices in wanted.items():
        members, known = errors.members[number], {m.label: m for m in matrices}
        sizes = np.array(
            [[[sum(_bytes(form, known[label], s) for label in part) for s in menu] for part in own] for own in members],
            dtype=np.int64,
        )  # fmt: skip
        values = errors.values[number]
        if not by_projection:
            members, sizes, values = tuple(own[0] for own in members), sizes[:, 0], values[:, 0]
        found.append(LayerScores(
            number, tuple(scheme.name for scheme in menu), members, use.tokens[number] / use.seen[number],
            use.shares[number] / use.seen[number], values, sizes,
            tuple(one.expert for one in pinned if one.layer == number),
        ))  # fmt: skip
    return found


def _bytes(form: Form, matrix: Matrix, scheme: Scheme) -> int:
    stored = form.layout(name_of(matrix), (matrix.rows, matrix.columns), scheme)
    return sum(math.prod(shape) * DTYPES[code].bits // 8 for _, code, shape in stored)


class _Use:
    """Counts selections, adds up routing probabilities, and keeps the largest outputs (a `RoutingObserver`)."""

    identity = "pmq"
    wants_logits = True
    wants_sums = False

    def __init__(self, experts: Experts, counts: Mapping[int, int]) -> None:
        self._score = experts.record.router.score
        self.seen = dict.fromkeys(counts, 0)
        self.tokens = {layer: np.zeros(count) for layer, count in counts.items()}
        self.shares = {layer: np.zeros(count) for layer, count in counts.items()}
        self.peaks = {layer: np.zeros(count) for layer, count in counts.items()}

    def routed(self, batch: Routed) -> None:
        assert batch.logits is not None
        count = len(self.tokens[batch.layer])
        index = batch.index.cpu().numpy()
        rows, slots = np.nonzero(index < count)
        chosen = index[rows, slots]
        shares = probabilities(batch.logits.cpu().numpy(), self._score)
        self.seen[batch.layer] += len(index)
        self.tokens[batch.layer] += np.bincount(chosen, minlength=count)
        self.shares[batch.layer] += np.bincount(chosen, shares[rows, chosen], minlength=count)
        np.maximum.at(
            self.peaks[batch.layer], chosen, batch.peaks.cpu().numpy()[rows, slots].astype(np.float64)
        )

    def expert_sums(self, layer: int, sums: Tensor) -> None:
        raise AssertionError("sums of outputs were not asked for")


class _Errors:
    """Measures eps of every expert, layer by layer of a walk: an observer that keeps what one block is given."""

    def __init__(
        self, checkpoint: Checkpoint, layers: Mapping[int, Sequence[Matrix]], counts: Mapping[int, int],
        quantizer: Quantizer, schemes: int, options: Options, by_projection: bool, stop: threading.Event | None,
    ) -> None:  # fmt: skip
        self._by_projection = by_projection
        self._checkpoint, self._layers, self._counts = checkpoint, layers, counts
        self._quantizer, self._schemes, self._stop = quantizer, schemes, stop
        self._hessians = options.method == "gptq"
        self.values: dict[int, np.ndarray] = {}
        self.members: dict[int, tuple[tuple[tuple[str, ...], ...], ...]] = {}

    def run(self, walk: Walk, tell: Tell) -> None:
        """Run all layers."""
        self._skeleton = walk.skeleton
        matrices = [self._layers.get(number, ()) for number in range(walk.layers)]
        self._inputs = Inputs(matrices, identity="pmq", finished=lambda layer: not self._hessians)
        walk.run(self, stop=self._stop, progress=lambda done, total: tell("errors of experts", done, total))

    # ---- what a walk asks ------------------------------------------------------------------------------

    def wants(self, module: str) -> bool:
        return self._hessians and self._inputs.wants(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("a walk that knows observe_tokens calls that")

    def observe_tokens(self, module: str, inputs: Tensor, gates: Tensor | None, samples: Tensor) -> None:
        self._inputs.observe_tokens(module, inputs, gates, samples)

    @contextmanager
    def around_layer(self, number: int, root: nn.Module, watching: Watching) -> Iterator[None]:
        """Keep what a layer's experts are given while it runs, then measure them."""
        module: Any = self._skeleton.expert_module(number)
        if number not in self._layers or module is None:
            yield
            return
        given: list[tuple[Tensor, Tensor, Tensor]] = []

        def keep(part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if watching.batch is not None:
                states, index, weights = (*args, *kwargs.values())[:3]
                rows = [watching.rows(value).detach().cpu() for value in (states, index, weights)]
                given.append((rows[0], rows[1], rows[2]))

        handle = module.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        self._measure(number, module, given)
        self._inputs.forget()

    # ---- one layer -----------------------------------------------------------------------------------------

    def _measure(self, layer: int, module: Any, given: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        hidden, index, weights = (torch.cat(parts) for parts in zip(*given, strict=True))
        matrices, count = self._layers[layer], self._counts[layer]
        places = places_of(self._skeleton, layer, matrices)
        own = [
            {id(m): m for (_, e), listed in places.items() if e == expert for m, _ in listed}
            for expert in range(count)
        ]
        names = {id(m): name.rpartition(".")[2] for (name, _), listed in places.items() for m, _ in listed}
        parts = self._parts(names.values())
        self.members[layer] = tuple(
            tuple(tuple(m.label for m in found.values() if names[id(m)] in part) for part in parts)
            for found in own
        )
        chosen = {expert: (rows, slots) for expert, rows, slots in routed(index, count)}
        errors = np.zeros((count, len(parts), self._schemes))
        device = self._skeleton.placement.of_layer(layer)
        for expert, found in enumerate(own):
            if self._stop is not None and self._stop.is_set():
                raise Interrupted("E130", "interrupted while experts were measured")
            if expert in chosen:
                rows, slots = chosen[expert]
                tokens = hidden[rows].to(device), weights[rows, slots].to(device)
                errors[expert] = self._error(
                    layer, module, expert, list(found.values()), places, parts, *tokens
                )
        self.values[layer] = errors

    def _parts(self, names: Iterable[str]) -> list[frozenset[str]]:
        """Return the parameters of an expert that share a scheme: all, or what enters it, and what leaves it."""
        held = frozenset(names)
        if not self._by_projection:
            return [held]
        down = frozenset(name for name in held if name.startswith("down_proj"))
        return [part for part in (held - down, down) if part]

    def _error(
        self, layer: int, module: Any, expert: int, matrices: Sequence[Matrix], places: Places,
        parts: Sequence[frozenset[str]], inputs: Tensor, gates: Tensor,
    ) -> np.ndarray:  # fmt: skip
        """Return eps of one expert by part and scheme, on its own tokens, [P, J]."""
        plain = self._skeleton.read_expert(layer, expert)
        versions = [{name: value.clone() for name, value in plain.items()} for _ in range(self._schemes)]
        fitted = np.zeros((len(matrices), self._schemes), dtype=bool)
        order = {matrix.label: row for row, matrix in enumerate(matrices)}
        shared = self._quantizer.shared_scales(self._checkpoint, matrices)
        at = {m.label: (name.rpartition(".")[2], columns)
              for (name, e), listed in places.items() if e == expert for m, columns in listed}  # fmt: skip
        for members in by_module(matrices).values():
            held = {matrix: read_matrix(self._checkpoint, matrix).to(inputs.device) for matrix in members}
            for matrix, place, delta in self._quantizer.deltas(
                held, self._inputs if self._hessians else None, shared
            ):
                name, columns = at[matrix.label]
                target = versions[place][name]
                view = target.T if module.is_transposed else target
                view[columns] += delta.to(target)
                fitted[order[matrix.label], place] = True
        if not fitted.all():
            row, place = np.argwhere(~fitted)[0]
            raise InputError("E477", f"{matrices[row].label} cannot be stored in scheme {place + 1} of the menu",
                             where=Where(tensor=matrices[row].label), help="choose a group size that divides the experts' width")  # fmt: skip
        rows = torch.arange(len(inputs))

        def out(slices: Mapping[str, Tensor]) -> Tensor:
            return weighted_expert(module, expert, rows, inputs, gates, lambda _, name: slices[name]).double()

        reference = out(plain)
        return np.array([
            [float(torch.linalg.vector_norm(out(plain | {name: version[name] for name in part}) - reference)) for version in versions]
            for part in parts
        ])  # fmt: skip
