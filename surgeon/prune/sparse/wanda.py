"""Wanda: |weight| times the norm of its input, compared within each output.

"A Simple and Effective Pruning Approach for Large Language Models" (Sun et al., arXiv 2306.11695, section 3):
S_ij = |W_ij| * ||X_j||_2, the floor(s in) smallest of each row become zero, no weight is updated.
"""

from __future__ import annotations

import math

from torch import Tensor

from surgeon.prune.sparse.masks import Pattern, smallest_groups, smallest_rows


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Return |W_ij| ||X_j|| [out, in]; ``norms`` [in] over all calibration tokens."""
    return weight.abs() * norms.to(weight)


def mask(
    weight: Tensor, norms: Tensor, sparsity: float | None = None, pattern: Pattern | None = None
) -> Tensor:
    """Return which weights become zero, bool [out, in].

    Args:
        weight: [out, in].
        norms: L2 norm of each input over all tokens [in].
        sparsity: share of each row, rounded down as published.
        pattern: or N:M.
    """
    found = scores(weight, norms)
    if pattern is not None:
        return smallest_groups(found, pattern)
    assert sparsity is not None
    return smallest_rows(found, math.floor(sparsity * weight.shape[1] + 1e-9))
