"""Magnitude: the smallest |W| of a matrix, of each row, or of the whole model become zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from surgeon.prune.sparse.masks import Pattern, share, smallest, smallest_groups, smallest_rows

SCOPES = ("layer", "row", "global")
"""layer: within each matrix; row: within each output; global: over all matrices together."""


def mask(
    weight: Tensor, sparsity: float | None = None, pattern: Pattern | None = None, *, scope: str = "layer"
) -> Tensor:
    """Return which weights become zero, bool [out, in].

    Args:
        weight: [out, in].
        sparsity: share that becomes zero: exactly round(s n) of the matrix, or of each row.
        pattern: or N:M.
        scope: "layer" or "row".
    """
    scores = weight.abs()
    if pattern is not None:
        return smallest_groups(scores, pattern)
    assert sparsity is not None
    if scope == "row":
        return smallest_rows(scores, share(sparsity, weight.shape[1]))
    return smallest(scores, share(sparsity, weight.numel()))


class GlobalThreshold:
    """The magnitude below which weights of all matrices become zero, and how many of those equal to it do.

    Found by counting float32 bit patterns (ordered like the magnitudes they stand for) in two passes over
    the matrices, 16 bits each: exact, with memory that does not grow with the model.

    Args:
        matrices: makes an iterator over all weights, float32, in the same order each time.
        sparsity: share of all of them.
    """

    def __init__(self, matrices: Callable[[], Iterable[Tensor]], sparsity: float) -> None:
        counts = np.zeros(1 << 16, np.int64)
        for matrix in matrices():
            counts += np.bincount(_bits(matrix) >> 16, minlength=1 << 16)
        wanted = share(sparsity, int(counts.sum()))
        self.limit = -1
        self._left = 0
        if not wanted:
            return
        high = int(np.searchsorted(counts.cumsum(), wanted))
        below = int(counts[:high].sum())
        fine = np.zeros(1 << 16, np.int64)
        for matrix in matrices():
            bits = _bits(matrix)
            fine += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
        low = int(np.searchsorted(fine.cumsum(), wanted - below))
        self.limit = high << 16 | low
        self._left = wanted - below - int(fine[:low].sum())

    def mask(self, weight: Tensor) -> Tensor:
        """Return which weights of the next matrix become zero; matrices come in their order, each once."""
        bits = _bits(weight)
        chosen = bits < self.limit
        equal = np.flatnonzero(bits == self.limit)[: self._left]
        self._left -= len(equal)
        chosen[equal] = True
        return torch.from_numpy(chosen).reshape(weight.shape)


def _bits(weight: Tensor) -> np.ndarray:
    return weight.abs().contiguous().reshape(-1).numpy().view(np.uint32).astype(np.int64)
