"""Confidence intervals: Wilson's score, bootstrap over clusters, McNemar's exact test.

Every interval is 95 %. The bootstrap resamples questions (or documents), never single samples of
one question: several replies to one question are not independent. Its random numbers are
counter-based, so equal data and seed give equal intervals everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from surgeon.seeds import stream_key, uniform

Z = 1.959963984540054
RESAMPLES = 2000
_CHUNK = 2_000_000


def wilson(hits: float, total: int) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson, JASA 1927, 22:209)."""
    share = hits / total
    centre = share + Z * Z / (2 * total)
    spread = Z * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    scale = 1 + Z * Z / total
    low = 0.0 if share == 0 else max(0.0, (centre - spread) / scale)  # exactly, where rounding is beside it
    return low, 1.0 if share == 1 else min(1.0, (centre + spread) / scale)


def bootstrap(
    clusters: int,
    statistics: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, tuple[float, float] | None]:
    """Return percentile intervals of statistics over resampled clusters (Efron, 1979).

    Args:
        clusters: how many there are; with fewer than two there is no interval.
        statistics: from drawn cluster numbers [resamples, clusters] to values [resamples] by name.
    """
    key = stream_key(seed, 0, "bootstrap")
    if clusters < 2:
        probe = statistics(np.zeros((1, max(clusters, 1)), dtype=np.int64))
        return dict.fromkeys(probe)
    parts: dict[str, list[np.ndarray]] = {}
    step = max(1, _CHUNK // clusters)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        draws = uniform(key, start * clusters, stop * clusters)
        # A draw of 1 - 2^-53 times a large count may round up to the count itself.
        chosen = np.minimum((draws * clusters).astype(np.int64), clusters - 1).reshape(stop - start, clusters)
        for name, values in statistics(chosen).items():
            parts.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values)) for name, values in parts.items()}


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value that two models solve equally many questions (McNemar, 1947).

    Args:
        only_first: questions that only the first model solved; ``only_second`` likewise.
    """
    total, least = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    terms = [
        math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(least + 1)
    ]
    top = max(terms)
    tail = top + math.log(sum(math.exp(t - top) for t in terms)) - total * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def noise_points(share: float, count: int) -> float:
    """Return how many points two accuracies over ``count`` questions each may differ by chance alone.

    1.96 standard errors of the difference of two independent shares; at the centre of Wilson's
    interval, since the observed share may be 0 or 1.
    """
    low, high = wilson(share * count, count)
    centre = (low + high) / 2
    return 100 * Z * math.sqrt(2 * centre * (1 - centre) / count)
