"""Mutual information between two models' activations: three estimators over paired numbers, in nats.

Activation-guided consensus merging (arXiv 2505.14009, section 3) asks how much a layer's output in
one model says about the same layer's output in another, both flattened over tokens and channels.

gaussian   -1/2 ln(1 - rho^2), exact for jointly normal pairs; sees linear dependence.
binned     plug-in estimate over 64 x 64 quantile bins; at most ln 64.
literal    plug-in estimate with every distinct number a value of its own, as the published script does.
           Nearly all floats are distinct, so it is close to ln(n) whatever the models do: for comparison only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BINS = 64

RESIDUAL_FLOOR = 2.0**-24
"""Least 1 - rho^2: below the square of what float32 rounding leaves there is nothing to measure, and
equal activations must give a finite number, the same for every layer (8.32 nats)."""


@dataclass(frozen=True)
class Moments:
    """Centred sums of paired numbers; two of them add up (Chan, Golub, LeVeque 1979)."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    distance: float = 0.0

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> Moments:
        """Return the sums of two equally long arrays of any shape."""
        x, y = _flat(x, y)
        if not x.size:
            return cls()
        a, b = x.astype(np.float64), y.astype(np.float64)
        mean_x, mean_y = float(a.mean()), float(b.mean())
        difference = a - b
        distance = float(difference @ difference)
        a -= mean_x
        b -= mean_y
        return cls(x.size, mean_x, mean_y, float(a @ a), float(b @ b), float(a @ b), distance)

    def plus(self, other: Moments) -> Moments:
        """Return the sums over both sets of pairs."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        weight = self.count * other.count / count
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        return Moments(
            count,
            self.mean_x + dx * other.count / count,
            self.mean_y + dy * other.count / count,
            self.xx + other.xx + dx * dx * weight,
            self.yy + other.yy + dy * dy * weight,
            self.xy + other.xy + dx * dy * weight,
            self.distance + other.distance,
        )

    def information(self) -> float:
        """Return -1/2 ln(1 - rho^2), at most that of `RESIDUAL_FLOOR`; equal constants count as equal."""
        if self.distance == 0:
            return -0.5 * math.log(RESIDUAL_FLOOR)
        spread = math.sqrt(self.xx) * math.sqrt(self.yy)  # the product alone may leave the range of float64
        if spread == 0:
            return 0.0
        rho = self.xy / spread
        return -0.5 * math.log(max(1.0 - rho * rho, RESIDUAL_FLOOR))


def gaussian(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mutual information of a bivariate normal with the sample's correlation, in nats."""
    return Moments.of(x, y).information()


def binned(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> float:
    """Return the plug-in mutual information over quantile bins of each variable, in nats.

    For independent numbers its expectation is (bins - 1)^2 / 2n, not 0.
    """
    x, y = _flat(x, y)
    if not x.size:
        return 0.0
    left, right = _quantile_bins(x, bins), _quantile_bins(y, bins)
    joint = np.bincount(left * bins + right, minlength=bins * bins).reshape(bins, bins)
    return _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint)


def _quantile_bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Return each number's bin: how many of the inner quantiles are not above it. Ties share a bin."""
    ranks = np.arange(1, bins) * len(values) // bins
    borders = np.unique(np.partition(values, ranks)[ranks])
    return np.searchsorted(borders, values, side="right")


def literal(x: np.ndarray, y: np.ndarray) -> float:
    """Return H(X) + H(Y) - H(X, Y) with every distinct number a label of its own, in nats; O(n log n)."""
    x, y = _flat(x, y)
    if not x.size:
        return 0.0
    _, left, count_x = np.unique(x, return_inverse=True, return_counts=True)
    _, right, count_y = np.unique(y, return_inverse=True, return_counts=True)
    pairs = left.astype(np.int64) * len(count_y) + right
    _, count = np.unique(pairs, return_counts=True)
    return _entropy(count_x) + _entropy(count_y) - _entropy(count)


def _entropy(counts: np.ndarray) -> float:
    counts = counts[counts > 0].astype(np.float64)
    total = counts.sum()
    return float(math.log(total) - (counts * np.log(counts)).sum() / total)


def _flat(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.shape != y.shape:
        raise ValueError(f"paired numbers have shapes {x.shape} and {y.shape}")
    return x.reshape(-1), y.reshape(-1)


ESTIMATORS = {"gaussian": gaussian, "binned": binned, "literal": literal}
