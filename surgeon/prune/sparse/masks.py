"""Exactly so many zeros: the smallest scores of a matrix, of each row, of each group of M inputs.

Ties go to the lower index, so counts are exact and results do not depend on how a sort treats equals.
Thresholds with "<=", as in the published scripts, prune one too many plus all ties. Weights that are zero
already have the smallest score and count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.errors import UsageError


@dataclass(frozen=True)
class Pattern:
    """At least ``zeros`` zeros in each ``group`` consecutive inputs: 2:4."""

    zeros: int
    group: int

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read N:M.

        Raises:
            UsageError: E266 malformed, or nothing or everything would be zero.
        """
        first, sign, second = text.partition(":")
        if not sign or not first.isdecimal() or not second.isdecimal() or not 0 < int(first) < int(second):
            raise UsageError(
                "E266",
                f'the pattern "{text[:40]}" is not N:M with 0 < N < M',
                help="2:4 makes two of each four zero",
            )
        return cls(int(first), int(second))


def smallest_rows(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` smallest scores of each row, ties to the left; bool like ``scores`` [rows, n]."""
    rows, width = scores.shape
    if count <= 0 or not rows:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= width:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    chosen = scores < limit
    equal = scores == limit
    missing = count - chosen.sum(1, keepdim=True)
    return chosen | (equal & (equal.cumsum(1) <= missing))


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return the ``count`` smallest of all scores, ties to the lower flat index; bool of the same shape."""
    return smallest_rows(scores.reshape(1, -1), count).reshape(scores.shape)


def share(sparsity: float, elements: int) -> int:
    """Return how many of ``elements`` are zero at a sparsity, rounded to nearest (halves up)."""
    return math.floor(sparsity * elements + 0.5)


def smallest_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the ``zeros`` smallest of each group of consecutive inputs; scores [rows, in], in a multiple of the group."""
    rows, width = scores.shape
    grouped = scores.reshape(-1, pattern.group)
    return smallest_rows(grouped, pattern.zeros).reshape(rows, width)


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Say whether every group of a matrix [out, in] has its zeros."""
    return bool(((weight.reshape(-1, pattern.group) == 0).sum(1) >= pattern.zeros).all())
