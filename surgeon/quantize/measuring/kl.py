"""Divergences, measured: one group of matrices changed at a time, the rest of the model as it is.

    loss = mean over positions of KL(p_model || p_changed), nats per token

The model is in memory as a whole. Hidden states of the search text at the input of every layer are kept, so that a changed
layer costs the layers from it on only; a divergence takes the head once for all schemes of a group.

A group is what must share a scheme inside one layer; ties across layers (a reader with one scheme for all experts of a model)
are measured layer by layer, since losses add up where an allocation is sought. What a group loses is shared among its
matrices in proportion to their parameters, so that the losses of its members add up to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.activations import InMemory
from surgeon.calibrate.batches import plan_batches
from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.head import Head
from surgeon.calibrate.logit_divergence import divergences
from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.errors import EnvironmentFault, UsageError
from surgeon.quantize.allocation.sensitivity import Sensitivities
from surgeon.quantize.measuring.deltas import Quantizer
from surgeon.quantize.measuring.job import Job
from surgeon.quantize.measuring.observed import by_module, walk_layers
from surgeon.quantize.observing import Inputs

MOST_GROUPS = 300
"""Each group takes as many runs of the model as there are schemes."""


def measured(job: Job) -> Sensitivities:
    """Return the table of all matrices.

    Raises:
        UsageError: E474 more groups than `MOST_GROUPS`.
        EnvironmentFault: E476 the model does not fit into memory.
    """
    count = sum(len(groups_of(job, layer)) for layer in range(len(job.layers)))
    if count > MOST_GROUPS:
        raise UsageError("E474", f"{count} groups of matrices are too many to measure one by one: {MOST_GROUPS} are the most",
                         help="use --sensitivity fisher, which is as good, or rel-output")  # fmt: skip
    if not job.complete:
        with (
            Whole(job) as model,
            threads(job.settings.threads),
            torch.no_grad(),
            memory_faults("a divergence"),
        ):
            layers = _Layers(job, model)
            if job.data_free:
                for layer in range(len(job.layers)):
                    if job.layers[layer] and not job.done(layer):
                        for members in by_module(job.layers[layer]).values():
                            layers.part(layer, members, None)
                        layers.finish(layer)
                    job.tell("divergences", layer + 1, len(job.layers))
            else:
                walk_layers(job, "divergences", layers)
    return job.together()


def groups_of(job: Job, layer: int) -> list[list[int]]:
    """Return the rows of a layer's matrices that are changed together."""
    found: dict[str, list[int]] = {}
    for row, matrix in enumerate(job.layers[layer]):
        found.setdefault(job.groups.get(matrix.label, matrix.label), []).append(row)
    return list(found.values())


class _Layers:
    """Measures layers of a model that is in memory."""

    def __init__(self, job: Job, model: Whole) -> None:
        self._job, self._model = job, model
        self._quantizer = Quantizer(job.form, job.menu, job.options)
        self._layer = -1

    def _begin(self, layer: int) -> None:
        self._layer = layer
        self._weights: dict[Matrix, Tensor] = {}
        self._changed: dict[Matrix, dict[int, Tensor]] = {}
        self._tokens: dict[str, int] = {}
        self._shared = self._quantizer.shared_scales(self._job.checkpoint, self._job.layers[layer])

    def part(self, layer: int, members: Sequence[Matrix], inputs: Inputs | None) -> None:
        if layer != self._layer:
            self._begin(layer)
        weights = {matrix: read_matrix(self._job.checkpoint, matrix) for matrix in members}
        for matrix, place, delta in self._quantizer.deltas(weights, inputs, self._shared):
            self._changed.setdefault(matrix, {})[place] = delta.cpu().add_(weights[matrix])
        self._weights |= weights
        module = members[0].module
        self._tokens[module] = self._job.tokens if inputs is None else inputs.tokens(module)

    def finish(self, layer: int) -> None:
        job, matrices = self._job, self._job.layers[layer]
        losses = job.rows(matrices)
        for rows in groups_of(job, layer):
            members = [matrices[row] for row in rows]
            places = [p for p in range(len(job.menu)) if all(p in self._changed.get(m, {}) for m in members)]
            versions = [{m: self._changed[m][place] for m in members} for place in places]
            found = self._model.divergences(layer, {m: self._weights[m] for m in members}, versions)
            share = np.array([m.elements for m in members]) / sum(m.elements for m in members)
            for place, loss in zip(places, found, strict=True):
                losses[rows, place] = loss * share
        job.keep(layer, losses, [self._tokens[matrix.module] for matrix in matrices])
        self._weights, self._changed = {}, {}
        self._layer = -1


class Whole:
    """A model in memory with the hidden states of a text before every layer; a context manager.

    Raises:
        EnvironmentFault: E476 it does not fit.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._checkpoint = job.checkpoint
        self._skeleton = skeleton = Skeleton(job.checkpoint, replace(job.settings, spill=None))
        lengths = [len(sample) for sample in job.search]
        self._batches = plan_batches(lengths, job.settings.batch_tokens, equal=True)
        size = torch.empty(0, dtype=skeleton.dtype).element_size()
        states = sum(lengths) * skeleton.hidden_size * size * (skeleton.layers + 2 + len(job.menu))
        weights = (
            sum(skeleton.bytes_of_layer(layer) for layer in range(skeleton.layers)) + skeleton.bytes_outside()
        )
        # Beside it: one layer that the calibration text passes through, its matrices in float32, and all they become.
        beside = max(skeleton.bytes_of_layer(layer) for layer in range(skeleton.layers))
        beside += (
            4 * (len(job.menu) + 1) * max(sum(matrix.elements for matrix in layer) for layer in job.layers)
        )
        if weights + states + beside > job.settings.budget():
            raise EnvironmentFault(
                "E476", f"measuring divergences needs about {(weights + states + beside) / 1e9:,.1f} GB for the whole model, the limit is "
                f"{job.settings.budget() / 1e9:,.1f} GB", help="raise --memory-limit, or use --sensitivity fisher or rel-output",
            )  # fmt: skip
        self._inputs: list[InMemory] = []
        self._calls: dict[tuple[int, int], tuple[Call, ...]] = {}
        self._final: list[Tensor] = []

    def __enter__(self) -> Whole:
        with torch.no_grad():
            skeleton = self._skeleton
            for layer in range(skeleton.layers):
                skeleton.fill(layer, skeleton.read_layer(layer))
            self._head = Head(self._checkpoint, self._job.settings, skeleton=skeleton)
            self._inputs = [InMemory(len(self._batches)) for _ in range(skeleton.layers)]
            for number, states in self._embedded():
                for layer in range(skeleton.layers):
                    self._inputs[layer].put(number, states)
                    states = self._call(layer, number, states)
                self._final.append(self._finish(number, states))
        return self

    def __exit__(self, *error: object) -> None:
        for layer in range(self._skeleton.layers):
            self._skeleton.empty(layer)
        self._inputs, self._final = [], []

    def _embedded(self) -> Iterator[tuple[int, Tensor]]:
        for number, batch in enumerate(self._batches):
            self._job.check_stop()
            recording = self._skeleton.record(batch.ids(self._job.search))
            self._calls.setdefault((len(batch.samples), batch.length), recording.calls)
            yield number, recording.hidden

    def _call(self, layer: int, number: int, states: Tensor) -> Tensor:
        batch = self._batches[number]
        return self._skeleton.call(layer, states, self._calls[len(batch.samples), batch.length][layer])

    def _finish(self, number: int, states: Tensor) -> Tensor:
        """Return the last hidden states [positions, hidden] of a batch; equal lengths, so there is no padding."""
        return self._skeleton.finish(self._batches[number].ids(self._job.search), states).flatten(0, 1)

    def divergences(
        self, layer: int, plain: Mapping[Matrix, Tensor], versions: Sequence[Mapping[Matrix, Tensor]]
    ) -> list[float]:
        """Return the divergence, nats per position, of the model with some matrices of one layer changed.

        Args:
            layer: theirs.
            plain: the matrices as they are, [out, in].
            versions: what they become, one mapping for each divergence.
        """
        if layer >= self._skeleton.layers:
            return [self._of_head(version) for version in versions]
        states: list[list[Tensor]] = []
        for version in versions:
            with self._changed(layer, plain, version):
                states.append([self._from(layer, number) for number in range(len(self._batches))])
        total = np.zeros(len(versions))
        for number, reference in enumerate(self._final):
            self._job.check_stop()
            if versions:
                total += divergences(self._head, reference, [one[number] for one in states]).sum(1).numpy()
        return [max(0.0, float(value)) for value in total / self._positions]

    @property
    def _positions(self) -> int:
        return sum(len(states) for states in self._final)

    def _from(self, layer: int, number: int) -> Tensor:
        """Run one batch from the input of a layer to behind the final norm."""
        self._job.check_stop()
        states = self._inputs[layer].get(number)
        for place in range(layer, self._skeleton.layers):
            states = self._call(place, number, states)
        return self._finish(number, states)

    @contextmanager
    def _changed(
        self, layer: int, plain: Mapping[Matrix, Tensor], version: Mapping[Matrix, Tensor]
    ) -> Iterator[None]:
        self._put(layer, version)
        try:
            yield
        finally:
            self._put(layer, plain)

    def _put(self, layer: int, values: Mapping[Matrix, Tensor]) -> None:
        """Replace matrices of a layer; of a stack of experts only those named."""
        parameters = dict(
            self._skeleton.model.get_submodule(self._skeleton.layer_path(layer)).named_parameters()
        )
        known = {(matrix.tensor, matrix.expert): matrix for matrix in values}
        for name, pieces in self._skeleton.pieces(layer).items():
            for piece in pieces:
                matrix = known.get((piece.tensor, int(piece.stored[0]) if piece.stored else None))
                if matrix is None:
                    continue
                value = values[matrix].T if matrix.transposed else values[matrix]
                target = parameters[name].data
                place = target[piece.index] if piece.index else target
                place.copy_(value[piece.stored[1:]] if piece.stored else value)

    def _of_head(self, version: Mapping[Matrix, Tensor]) -> float:
        """Return the divergence with the output head changed, block by block of the vocabulary."""
        (weight,) = version.values()
        total = 0.0
        for reference in self._final:
            self._job.check_stop()
            hidden = self._head.entering(reference)
            for start in range(0, len(hidden), 128):
                own, other = [], []
                for first, last, block, bias in self._head.blocks(self._head.rows_per_block(128)):
                    own.append(self._head.block_logits(hidden[start : start + 128], block, bias))
                    other.append(
                        self._head.block_logits(
                            hidden[start : start + 128], weight[first:last].to(block), bias
                        )
                    )
                p, q = (torch.log_softmax(torch.cat(part, 1).double(), 1) for part in (own, other))
                total += float((p.exp() * (p - q)).sum())
        return max(0.0, total / self._positions)
