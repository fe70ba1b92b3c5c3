"""Bytes that quantizing matrices takes beside a layer's weights, its activations and the sums over its inputs.

Counted before any text is run, so that a memory limit that is too small is refused with the number that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from surgeon.calibrate.matrices import Matrix
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.formats.scheme import Scheme
from surgeon.quantize.forms import Form
from surgeon.quantize.observing import Inputs
from surgeon.quantize.solving import WORKED_ON, Options, batchable

Group = list[tuple[Matrix, Scheme]]
"""Matrices with the same inputs, and their schemes."""

SQUARES = 2
"""Copies of a Hessian while it is brought into order and factorised; one more where it is drawn to its diagonal."""

COPIES = 16
"""Bytes a weight takes while it is rounded: four float32 (as read, on its grid, in order, as it is left) at most."""

HELD = 13
"""Bytes a weight takes meanwhile that waits beside it: as read, without dead inputs, in order, and its codes."""

PACKED = 12
"""Bytes a weight takes while its codes become the words of a format, with them and what was read."""


def workspace(group: Sequence[tuple[Matrix, Scheme]], *, few: bool) -> int:
    """Return the bytes that GPTQ takes for matrices with the same inputs, beside the sums over these inputs.

    Args:
        few: samples are held out of the sums, to choose how far the Hessian is drawn to its diagonal.
    """
    sizes = [matrix.elements for matrix, _ in group]
    squares = 4 * group[0][0].columns ** 2 * (SQUARES + few)
    if few:  # all at once, because one share is chosen for all
        return squares + HELD * (sum(sizes) - max(sizes)) + (COPIES + 4) * max(sizes)
    at_once = max(min(size, WORKED_ON) for size in sizes)  # the very large ones in parts
    return squares + max(COPIES * at_once + 6 * (max(sizes) - at_once), PACKED * max(sizes))


def reserved(
    layers: Iterable[Sequence[tuple[Matrix, Scheme]]], form: Form, *, few: bool, cross: bool = False
) -> int:
    """Return the bytes a pass has to leave to quantizing its layers.

    Args:
        layers: the matrices that GPTQ rounds, by layer.
        few: samples may be held out of the sums of every module, not of experts alone.
        cross: products with the inputs of the original model are summed, too.

    Returns:
        Of the layer that needs most: what is stored of it, the sums of one module, which are held whatever the limit on
        sums is, and the workspace of its matrices.
    """
    most = 0
    for layer in layers:
        groups: dict[str, list[tuple[Matrix, Scheme]]] = {}
        for matrix, scheme in layer:
            groups.setdefault(matrix.module, []).append((matrix, scheme))
        stored = sum(_stored(form, matrix, scheme) for matrix, scheme in layer)
        needs = []
        for group in groups.values():
            apart = few or group[0][0].routed
            needs.append(_sums(group[0][0], apart, cross) + workspace(group, few=apart))
        most = max(most, stored + max(needs, default=0))
    return most


def _sums(matrix: Matrix, apart: bool, cross: bool) -> int:
    parts = (2 if apart else 1) * (2 if cross and not matrix.routed else 1)
    return 4 * parts * matrix.columns**2


def _stored(form: Form, matrix: Matrix, scheme: Scheme) -> int:
    parts = form.layout(matrix.tensor, (matrix.rows, matrix.columns), scheme)
    return sum(math.prod(shape) * DTYPES[code].bits // 8 for _, code, shape in parts)


def batches(
    groups: Iterable[Group], inputs: Inputs, options: Options, device: torch.device
) -> Iterator[list[Group]]:
    """Yield groups of matrices in their order, those of neighbouring experts together where a GPU has room for them."""
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
    batch: list[Group] = []
    used, alone = 0, False
    for group in groups:
        needs, before = workspace(group, few=True), alone
        alone = not batchable(group, inputs, options)
        if batch and (alone or before or used + needs > free):
            yield batch
            batch, used = [], 0
        batch.append(group)
        used += needs
    if batch:
        yield batch
