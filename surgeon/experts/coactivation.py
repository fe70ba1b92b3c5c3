"""Which experts of a layer work on the same tokens.

Counts come from the choices of each token alone, so no pair spans two tokens, let alone two samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 8192
"""Tokens counted at once."""


class CoActivation:
    """Counts of pairs of experts chosen for the same token, gathered batch by batch.

    Attributes:
        pairs: int64 [E, E], symmetric, zero on the diagonal.
        counts: int64 [E], tokens of each expert.
        tokens: tokens seen.
    """

    def __init__(self, experts: int) -> None:
        self.pairs = np.zeros((experts, experts), dtype=np.int64)
        self.counts = np.zeros(experts, dtype=np.int64)
        self.tokens = 0

    def add(self, index: np.ndarray) -> None:
        """Count a batch.

        Args:
            index: [tokens, K] chosen experts, all different within a token; E marks an empty slot.
        """
        experts, slots = len(self.counts), index.shape[1]
        first, second = np.triu_indices(slots, 1)
        width = experts + 1  # the last row and column take what belongs to empty slots
        for start in range(0, len(index), BLOCK):
            block = np.sort(index[start : start + BLOCK].astype(np.int64), axis=1)
            self.counts += np.bincount(block.reshape(-1), minlength=width)[:experts]
            codes = block[:, first] * width + block[:, second]
            found = np.bincount(codes.reshape(-1), minlength=width * width).reshape(width, width)
            upper = found[:experts, :experts]
            self.pairs += upper + upper.T
        self.tokens += len(index)

    def share(self) -> np.ndarray:
        """Return C_ij / N, the share of tokens that use both, float64 [E, E]."""
        return _ratio(self.pairs, np.full_like(self.pairs, self.tokens))

    def of_total(self) -> np.ndarray:
        """Return C_ij over the sum of all C of the layer, float64 [E, E] (as STUN weighs pairs, arXiv 2409.06211)."""
        return _ratio(self.pairs, np.full_like(self.pairs, self.pairs.sum()))

    def conditional(self) -> np.ndarray:
        """Return P(j | i) = C_ij / n_i, float64 [E, E]; rows of experts without tokens are 0."""
        return _ratio(self.pairs, np.broadcast_to(self.counts[:, None], self.pairs.shape))

    def lift(self) -> np.ndarray:
        """Return C_ij N / (n_i n_j): how much more often than independent experts; 0 where one has no tokens."""
        return _ratio(self.pairs * float(self.tokens), np.outer(self.counts, self.counts))

    def jaccard(self) -> np.ndarray:
        """Return C_ij / (n_i + n_j - C_ij), float64 [E, E]; 0 where neither has tokens."""
        return _ratio(self.pairs, self.counts[:, None] + self.counts[None, :] - self.pairs)

    def strongest(self, count: int) -> list[Pair]:
        """Return the pairs of the highest Jaccard index, then of the most tokens; only pairs that occur."""
        first, second = np.triu_indices(len(self.counts), 1)
        found = np.flatnonzero(self.pairs[first, second])
        first, second = first[found], second[found]
        jaccard, lift = self.jaccard()[first, second], self.lift()[first, second]
        tokens = self.pairs[first, second]
        order = np.lexsort((second, first, -tokens, -jaccard))[:count]
        return [
            Pair(int(first[i]), int(second[i]), int(tokens[i]), float(jaccard[i]), float(lift[i]))
            for i in order
        ]


@dataclass(frozen=True)
class Pair:
    """Two experts of a layer.

    Attributes:
        first, second: experts, first < second.
        tokens: tokens that use both.
        jaccard: of the sets of tokens they work on.
        lift: over what independent experts with these loads would share.
    """

    first: int
    second: int
    tokens: int
    jaccard: float
    lift: float

    def document(self) -> dict[str, Any]:
        """Return the pair as plain data."""
        return {
            "experts": [self.first, self.second], "tokens": self.tokens, "jaccard": self.jaccard, "lift": self.lift
        }  # fmt: skip


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)
