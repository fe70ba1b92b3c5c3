"""Relative errors of outputs: one pass forward over the unquantized model.

    loss = tr(D H D') / tr(W H W'),   H = sum of x x' over the tokens that reached the matrix

Of routed experts H = sum of g^2 x x', and what their matrices lose is divided by tr(W H W') of all experts of the layer
together, projection by projection: an expert that is hardly used, or with small gates, then counts little, and all
experts of a layer together count like one matrix that all tokens reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.quantize.allocation.sensitivity import Sensitivities
from surgeon.quantize.measuring.deltas import Quantizer
from surgeon.quantize.measuring.job import Job, projection
from surgeon.quantize.measuring.observed import walk_layers
from surgeon.quantize.observing import Inputs
from surgeon.quantize.output_error import energy


def measured(job: Job) -> Sensitivities:
    """Return the table of all matrices."""
    walk_layers(job, "relative errors of outputs", _Layers(job))
    return job.together()


class _Layers:
    """Measures layers, where they were computed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._quantizer = Quantizer(job.form, job.menu, job.options)
        self._layer = -1

    def _begin(self, layer: int) -> None:
        matrices = self._job.layers[layer]
        self._layer = layer
        self._rows = {matrix.label: row for row, matrix in enumerate(matrices)}
        self._errors, self._tokens = self._job.rows(matrices), [0] * len(matrices)
        self._energies = np.zeros(len(matrices))
        self._shared = self._quantizer.shared_scales(self._job.checkpoint, matrices)

    def part(self, layer: int, members: Sequence[Matrix], inputs: Inputs) -> None:
        if layer != self._layer:
            self._begin(layer)
        module = members[0].module
        hessian = inputs.whole(module).hessian
        weights = {matrix: read_matrix(self._job.checkpoint, matrix).to(hessian.device) for matrix in members}
        for matrix, weight in weights.items():
            row = self._rows[matrix.label]
            self._tokens[row] = inputs.tokens(module)
            self._energies[row] = energy(weight, hessian)
        for matrix, place, delta in self._quantizer.deltas(weights, inputs, self._shared):
            self._errors[self._rows[matrix.label], place] = max(0.0, energy(delta, hessian))

    def finish(self, layer: int) -> None:
        whole = _wholes(self._job.layers[layer], self._energies)[:, None]
        losses = np.where(whole > 0, self._errors / np.where(whole > 0, whole, 1.0), 0 * self._errors)
        self._job.keep(layer, losses, self._tokens)
        self._layer = -1


def _wholes(matrices: tuple[Matrix, ...], energies: np.ndarray) -> np.ndarray:
    """Return what the error of each matrix is divided by: its own energy, or that of its projection in all experts."""
    sums: dict[str, list[float]] = {}
    for matrix, value in zip(matrices, energies, strict=True):
        sums.setdefault(_part(matrix), []).append(float(value))
    return np.array([math.fsum(sums[_part(matrix)]) for matrix in matrices])


def _part(matrix: Matrix) -> str:
    return projection(matrix) if matrix.routed else matrix.label
