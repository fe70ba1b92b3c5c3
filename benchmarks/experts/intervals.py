"""Intervals of losses: bootstrap over held-out blocks, and over random draws where there are any.

Domains count equally: a mean over domains is resampled within every domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
Losses = Mapping[str, np.ndarray]
"""domain -> float64 [blocks]."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def below_zero(self) -> bool:
        return self.high < 0

    @property
    def above_zero(self) -> bool:
        return self.low > 0


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Return the means of resamples of [..., blocks] over the last axis: [RESAMPLES, ...]."""
    blocks = values.shape[-1]
    draws = np.random.default_rng(seed).multinomial(blocks, [1 / blocks] * blocks, size=RESAMPLES) / blocks
    return np.tensordot(draws, values, axes=(1, -1))


def _interval(mean: float, resamples: np.ndarray) -> Interval:
    low, high = np.percentile(resamples, [2.5, 97.5])
    return Interval(float(mean), float(low), float(high))


def difference(one: Losses, other: Losses, domains: Sequence[str] | None = None) -> Interval:
    """Return the mean of one - other over domains, paired block by block."""
    gaps = [one[domain] - other[domain] for domain in domains or list(one)]
    resamples = np.mean([_resampled(gap, seed) for seed, gap in enumerate(gaps)], axis=0)
    return _interval(float(np.mean([gap.mean() for gap in gaps])), resamples)


def against_draws(one: Losses, draws: Sequence[Losses], domains: Sequence[str] | None = None) -> Interval:
    """Return the mean of one - mean of draws over domains; blocks and draws are both resampled."""
    parts = []
    for seed, domain in enumerate(domains or list(one)):
        gaps = np.stack([one[domain] - draw[domain] for draw in draws])
        parts.append((gaps.mean(), _resampled(gaps, seed)))
    by_draw = np.mean([part for _, part in parts], axis=0)
    return _interval(float(np.mean([mean for mean, _ in parts])), _over_draws(by_draw))


def mean_of_draws(draws: Sequence[Losses], parent: Losses, domains: Sequence[str] | None = None) -> Interval:
    """Return the mean loss of draws above the parent over domains; blocks and draws are both resampled."""
    found = against_draws(parent, draws, domains)
    return Interval(-found.mean, -found.high, -found.low)


def _over_draws(by_draw: np.ndarray) -> np.ndarray:
    """Resample the draws in every resample of blocks: [RESAMPLES, draws] -> [RESAMPLES]."""
    count = by_draw.shape[1]
    picked = np.random.default_rng(99).integers(count, size=by_draw.shape)
    return np.take_along_axis(by_draw, picked, axis=1).mean(1)


def over_draws(values: Sequence[float]) -> Interval:
    """Return the mean of values of random draws and where 95 % of the draws lie."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))
