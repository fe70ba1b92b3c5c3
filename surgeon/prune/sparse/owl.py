"""OWL: layers with more outliers keep more weights.

"Outlier Weighed Layerwise Sparsity" (Yin et al., arXiv 2310.05175, section 3). With A the concatenated
|W_ij| ||X_j|| of a block's matrices, D = 100 mean(A > M mean(A)) counts outliers. D is scaled to [0, 2 lambda] and
the kept shares are 1 - s plus the distance from the mean. Here the mean is weighted by the number of
weights, so that the model's sparsity is exact where blocks differ in size, and shares stay in [0.02, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.prune.sparse.masks import Pattern

THRESHOLD = 5.0
SPREAD = 0.08
LEAST_KEPT = 0.02


def sparsities(
    outliers: Sequence[float], weights: Sequence[int], sparsity: float, spread: float = SPREAD
) -> list[float]:
    """Return the sparsity of each block; their mean, weighted, is ``sparsity``.

    Args:
        outliers: D of each block, percent.
        weights: how many weights each block has.
        sparsity: of all of them.
        spread: lambda; kept shares lie within 2 lambda of each other.
    """
    found = np.asarray(outliers, np.float64)
    sizes = np.asarray(weights, np.float64) / float(np.sum(weights))
    distance = float(found.max() - found.min())
    if distance == 0.0:
        return [sparsity] * len(found)
    scaled = (found - found.min()) / distance * 2 * spread
    wanted = scaled - float(sizes @ scaled) + (1 - sparsity)
    least = min(LEAST_KEPT, 1 - sparsity)

    def kept(shift: float) -> np.ndarray:
        return np.clip(wanted + shift, least, 1.0)

    low, high = -1.0, 1.0
    for _ in range(100):  # clipped shares must still add up
        middle = (low + high) / 2
        low, high = (middle, high) if float(sizes @ kept(middle)) < 1 - sparsity else (low, middle)
    exact = kept((low + high) / 2)
    return [float(1 - share) for share in exact]


def patterns(
    outliers: Sequence[float], weights: Sequence[int], pattern: Pattern, spread: float = SPREAD
) -> list[Pattern]:
    """Return N:M for each block with whole N, one to M - 1, whose weighted mean comes nearest to the pattern's N.

    Whole parts first, then the blocks with the largest remainders get one more, as long as the total allows.
    """
    wanted = np.asarray(sparsities(outliers, weights, pattern.zeros / pattern.group, spread)) * pattern.group
    counts = np.clip(np.floor(wanted + 1e-9), 1, pattern.group - 1).astype(int)
    sizes = np.asarray(weights, np.float64)
    left = pattern.zeros * float(sizes.sum()) - float(counts @ sizes)
    for block in sorted(range(len(counts)), key=lambda b: (counts[b] - wanted[b], b)):
        if counts[block] < pattern.group - 1 and left >= sizes[block] / 2:
            counts[block] += 1
            left -= float(sizes[block])
    return [Pattern(int(count), pattern.group) for count in counts]


class Outliers:
    """Counts the outliers of one block's matrices; scores are kept as float32 until the block is complete."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self._threshold = threshold
        self._scores: list[np.ndarray] = []

    def add(self, scores: np.ndarray) -> None:
        """Add a matrix's |W_ij| ||X_j||."""
        self._scores.append(np.ascontiguousarray(scores, np.float32).reshape(-1))

    def percent(self) -> float:
        """Return D of everything that was added, and forget it."""
        count = sum(part.size for part in self._scores)
        mean = sum(float(part.sum(dtype=np.float64)) for part in self._scores) / max(count, 1)
        above = sum(int((part > self._threshold * mean).sum()) for part in self._scores)
        self._scores.clear()
        return 100.0 * above / max(count, 1)
