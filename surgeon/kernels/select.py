"""Exact order statistics of magnitudes over blocks, in bounded memory, with an even tie rule.

The key of a value is the 31 magnitude bits of its float32 pattern, which order like |x|. Two
counting passes find any k-th largest key exactly: first a histogram of the upper 16 bits, then
the lower 15 bits of the one bin that holds the threshold, kept per block.

Ties: of T entries equal to the threshold, q are kept: the j-th one (in file order) iff
floor((j+1) q / T) > floor(j q / T). The count is exact and no region of the tensor is
favoured, which matters because differences of bfloat16 weights tie by the thousand (a plain
unstable sort keeps up to 2.7 times more in some rows than in others).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

HIGH_BINS = 1 << 16
LOW_BITS = 15
LOW_MASK = np.uint32((1 << LOW_BITS) - 1)


def keys(values: np.ndarray) -> np.ndarray:
    """Return uint32 keys that order like |values|; float64 is ranked by its float32 magnitude."""
    return np.abs(values.astype(np.float32, copy=False)).view(np.uint32)


def high_histogram(key: np.ndarray) -> np.ndarray:
    """Return counts of the upper 16 of 31 bits, int64 [65536]."""
    return np.bincount(key >> np.uint32(LOW_BITS), minlength=HIGH_BINS).astype(np.int64)


@dataclass(frozen=True)
class Rank:
    """A wanted order statistic: the ``k`` largest are to be kept (0 <= k <= n).

    After the first pass ``bin`` holds the k-th largest key and ``above`` keys are in higher
    bins. k = 0 and k = n need no threshold: ``bin`` is -1.
    """

    k: int
    bin: int = -1
    above: int = 0


def locate(histogram: np.ndarray, k: int, exact: bool = False) -> Rank:
    """Find the bin of the k-th largest key; with ``exact`` even for k = n, whose key is the smallest."""
    total = int(histogram.sum())
    if k <= 0 or k > total or (k == total and not exact):
        return Rank(max(0, min(k, total)))
    from_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return Rank(k, HIGH_BINS - 1 - position, above)


def low_counts(key: np.ndarray, rank: Rank) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct lower 15 bits inside the rank's bin and their counts, for one block."""
    if rank.bin < 0:
        return np.empty(0, np.uint16), np.empty(0, np.int64)
    inside = key[(key >> np.uint32(LOW_BITS)) == np.uint32(rank.bin)] & LOW_MASK
    if inside.size > 4096:
        counts = np.bincount(inside, minlength=1 << LOW_BITS)
        present = np.flatnonzero(counts)
        return present.astype(np.uint16), counts[present]
    present, counts = np.unique(inside, return_counts=True)
    return present.astype(np.uint16), counts.astype(np.int64)


@dataclass(frozen=True)
class Threshold:
    """An exact threshold: keys above ``key`` are kept, and ``quota`` of ``ties`` equal to it.

    ``before`` gives, for each block (position, ordinal), how many ties lie before it.
    """

    key: int
    ties: int = 0
    quota: int = 0
    before: dict[tuple[int, int], int] = field(default_factory=dict)
    everything: bool = False
    nothing: bool = False


def resolve(rank: Rank, pieces: list[tuple[tuple[int, int], np.ndarray, np.ndarray]]) -> Threshold:
    """Turn per-block low counts (in block order) into the exact threshold."""
    if rank.bin < 0:
        return Threshold(0, everything=rank.k > 0, nothing=rank.k == 0)
    totals = np.zeros(1 << LOW_BITS, np.int64)
    for _, present, counts in pieces:
        totals[present] += counts
    wanted = rank.k - rank.above
    from_top = np.cumsum(totals[::-1])
    position = int(np.searchsorted(from_top, wanted))
    low = (1 << LOW_BITS) - 1 - position
    ties = int(totals[low])
    quota = wanted - (int(from_top[position - 1]) if position else 0)
    before: dict[tuple[int, int], int] = {}
    seen = 0
    for where, present, counts in pieces:
        before[where] = seen
        index = np.searchsorted(present, low)
        if index < len(present) and present[index] == low:
            seen += int(counts[index])
    return Threshold((rank.bin << LOW_BITS) | low, ties, quota, before)


def kept_ties(count: int, first: int, quota: int, ties: int) -> np.ndarray:
    """Return which of ``count`` consecutive ties, numbered from ``first``, the even rule keeps."""
    j = np.arange(first, first + count, dtype=np.int64)
    return (j + 1) * quota // ties > j * quota // ties


def keep_mask(key: np.ndarray, threshold: Threshold, where: tuple[int, int]) -> np.ndarray:
    """Return the boolean mask of kept entries of one block."""
    if threshold.everything or threshold.nothing:
        return np.full(key.shape, threshold.everything)
    mask = key > np.uint32(threshold.key)
    tied = np.flatnonzero(key == np.uint32(threshold.key))
    if tied.size:
        mask[tied] = kept_ties(tied.size, threshold.before[where], threshold.quota, threshold.ties)
    return mask


def band_mask(key: np.ndarray, outer: Threshold, inner: Threshold, where: tuple[int, int]) -> np.ndarray:
    """Return entries kept by ``outer`` but not by ``inner`` (inner keeps fewer, the largest ones).

    When both thresholds fall on the same key, the inner choice is made among the outer's ties,
    so that the band's count stays exact.
    """
    mask = keep_mask(key, outer, where)
    if inner.nothing:
        return mask
    if inner.everything:
        return np.zeros_like(mask)
    if outer.everything or outer.key != inner.key:
        return mask & ~keep_mask(key, inner, where)
    mask &= key <= np.uint32(inner.key)
    tied = np.flatnonzero(key == np.uint32(inner.key))
    if tied.size:
        j = np.arange(outer.before[where], outer.before[where] + tied.size, dtype=np.int64)
        kept = (j + 1) * outer.quota // outer.ties > j * outer.quota // outer.ties
        number = j * outer.quota // outer.ties  # ordinal among the outer's kept ties
        dropped = (number + 1) * inner.quota // outer.quota > number * inner.quota // outer.quota
        mask[tied] = kept & ~dropped
    return mask
