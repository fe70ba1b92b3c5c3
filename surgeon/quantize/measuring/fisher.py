"""Errors of outputs weighted by squared gradients: one pass forward and one back.

    loss = 1/2 sum over tokens and outputs of g^2 (D x)^2, for each predicted token

with g = dL/dy at the matrix's output and labels drawn from the model's predictions: the diagonal of the Fisher information,
so that the loss estimates a divergence in nats per token. For matrices of experts g contains the routing weight; at the
last one it is the gradient at the block's output times it.

D of one layer's matrices in all schemes is held at a time, in the precision of the pass.

Source: NVIDIA ModelOpt's auto_quantize ("gradient").
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.damping import exact_products
from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.calibrate.output_gradients import output_gradients
from surgeon.calibrate.placement import Placement
from surgeon.calibrate.settings import Observer
from surgeon.quantize.allocation.sensitivity import Sensitivities
from surgeon.quantize.measuring.deltas import Quantizer
from surgeon.quantize.measuring.job import Job
from surgeon.quantize.measuring.observed import by_module
from surgeon.quantize.observing import Inputs


def measured(job: Job) -> Sensitivities:
    """Return the table of all matrices."""
    for resume in (True, False):
        if job.complete:
            break
        output_gradients(
            job.checkpoint, job.samples, job.layers, _Receiver(job), job.settings, seed=job.seed, stop=job.stop, resume=resume,
            progress=lambda done, total: job.tell("errors weighted by gradients", done, total),
        )  # fmt: skip
    return job.together()


class _Receiver:
    """Adds up the losses of one layer at a time."""

    def __init__(self, job: Job) -> None:
        self.identity = job.key
        self._job = job
        self._quantizer = Quantizer(job.form, job.menu, job.options)
        self._placement = Placement.of(job.settings.device, len(job.layers))
        self._inputs: Inputs | None = None
        self._deltas: dict[str, dict[int, Tensor]] = {}
        self._losses: dict[str, np.ndarray] = {}
        self._tokens: dict[str, int] = {}

    # ---- what the pass asks ----------------------------------------------------------------------------

    def wants_layer(self, layer: int) -> bool:
        return not self._job.done(layer)

    def observer(self, layer: int) -> Observer | None:
        if self._job.data_free:
            return None
        matrices = [own if number == layer else () for number, own in enumerate(self._job.layers)]
        self._inputs = Inputs(
            matrices, identity=self._job.key, finished=lambda layer: False, tokens=self._job.tokens
        )
        return self._inputs

    def begin(self, layer: int) -> None:
        job, matrices, inputs = self._job, self._job.layers[layer], self._inputs
        self._deltas, self._losses, self._tokens = {}, {}, {}
        shared = self._quantizer.shared_scales(job.checkpoint, matrices)
        device, dtype = self._placement.of_layer(layer), job.settings.torch_dtype
        for module, members in by_module(matrices).items():
            job.check_stop()
            weights = {matrix: read_matrix(job.checkpoint, matrix).to(device) for matrix in members}
            for matrix, place, delta in self._quantizer.deltas(weights, inputs, shared):
                self._deltas.setdefault(matrix.label, {})[place] = delta.to(dtype)
            if inputs is not None:
                inputs.done([module])
        self._inputs = None

    def outputs(self, matrix: Matrix, inputs: Tensor, gradients: Tensor, columns: slice) -> None:
        losses = self._losses.setdefault(matrix.label, np.zeros(len(self._job.menu)))
        if columns.start == 0:  # a head comes in parts
            self._tokens[matrix.label] = self._tokens.get(matrix.label, 0) + len(inputs)
        squares = gradients.square()
        with exact_products():
            for place, delta in self._deltas.get(matrix.label, {}).items():
                change = (inputs.to(delta.dtype) @ delta[columns].T).to(squares.dtype)
                losses[place] += float(change.square_().mul_(squares).sum(dtype=torch.float64))

    def end(self, layer: int, predicted: int) -> None:
        matrices = self._job.layers[layer]
        losses = self._job.rows(matrices)
        for row, matrix in enumerate(matrices):
            for place in self._deltas.get(matrix.label, {}):
                found = self._losses.get(matrix.label)
                losses[row, place] = 0.0 if found is None else found[place] / (2 * predicted)
        self._job.keep(layer, losses, [self._tokens.get(matrix.label, 0) for matrix in matrices])
        self._deltas = {}

    # ---- continuing later ------------------------------------------------------------------------------

    def state(self) -> Mapping[str, np.ndarray]:
        """Return nothing: what is finished lies in files."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up nothing; layers whose files are gone make the pass run again."""
