"""How local routing is: how well one fixed set of experts serves a stretch of text (SRP), and a cache of experts (SCH).

SRP and SCH are from "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert
Models" (arXiv 2505.16056). All windows, and every cache, lie within one sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from surgeon.errors import InputError, UsageError
from surgeon.seeds import stream_key, uniform

WINDOWS = (4, 16, 64, 256)
"""Lengths of stretches the measures are usually given for."""
DRAWS = 1000
"""Resamplings of the samples from which intervals are made."""
LEVEL = 0.95
CELLS = 1 << 22
"""Places of [tokens, experts] counted at once."""

Policy = Literal["sch", "lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = ("sch", "lru", "lfu", "belady")


@dataclass(frozen=True)
class Trace:
    """The choices of one layer, sample after sample.

    Attributes:
        index: [tokens, K] chosen experts, all different within a token; ``experts`` marks an empty slot.
        offsets: int64 [samples + 1], where samples begin and end in ``index``.
        experts: E.
    """

    index: np.ndarray
    offsets: np.ndarray
    experts: int

    @property
    def top_k(self) -> int:
        return int(self.index.shape[1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64."""
        return np.diff(self.offsets)

    def sample(self, number: int) -> np.ndarray:
        """Return the choices of one sample, [tokens, K]."""
        return self.index[self.offsets[number] : self.offsets[number + 1]]


# ---- SRP -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The best rule "keep an expert for a window when it has at least so many of its tokens".

    Attributes:
        value: F1 of keeping against using, in [0, 1]; 0 when nothing was ever used.
        threshold: tokens in the window from which on an expert is kept; 0 when nothing was ever used.
        size_ratio: kept (token, expert) places over used ones: how large the kept set is relative to top-k.
    """

    value: float
    threshold: int
    size_ratio: float


@dataclass(frozen=True)
class Routing:
    """Segment routing best performance of one layer for one window length.

    Attributes:
        window: tokens of a window, m.
        best: with one threshold for all experts.
        interval: 95 % by resampling samples; None with fewer than two.
        random: value of independent routing with the same loads; what ``best.value`` must be compared with.
        experts: float64 [E], every expert with its own threshold.
        samples: samples long enough; the others are left out.
        excluded: samples too short.
    """

    window: int
    best: Best
    interval: tuple[float, float] | None
    random: float
    experts: np.ndarray
    samples: int
    excluded: int

    def document(self) -> dict[str, Any]:
        """Return the measure as plain data."""
        return {
            "window": self.window, "value": self.best.value, "interval": None if self.interval is None else list(self.interval), "random": self.random,
            "threshold": self.best.threshold, "size_ratio": self.best.size_ratio, "samples": self.samples,
            "excluded": self.excluded, "experts": self.experts.tolist(),
        }  # fmt: skip


def segment_routing(trace: Trace, window: int, *, seed: int = 0, draws: int = DRAWS) -> Routing:
    """Measure how well one set of experts per window of ``window`` consecutive tokens replaces the choices of its tokens.

    Raises:
        InputError: E438 no sample is as long as the window.
        UsageError: E246 the window is shorter than one token.
    """
    if window < 1:
        raise UsageError("E246", f"a window of {window} tokens", help="at least 1; 16 and 64 are usual")
    fitting = [number for number, length in enumerate(trace.lengths) if length >= window]
    if not fitting:
        longest = int(trace.lengths.max(initial=0))
        raise InputError("E438", f"no sample is as long as a window of {window:,} tokens; the longest has {longest:,}",
                         help="give longer texts, or shorter windows")  # fmt: skip
    each = np.zeros((trace.experts, window + 1), dtype=np.int64)
    together = np.zeros((len(fitting), window + 1), dtype=np.int64)
    used, tokens = np.zeros(trace.experts, dtype=np.int64), 0
    for row, number in enumerate(fitting):
        index = trace.sample(number)
        found = window_histograms(index, trace.experts, window)
        each += found
        together[row] = found.sum(axis=0)
        used += np.bincount(index.reshape(-1), minlength=trace.experts + 1)[: trace.experts]
        tokens += len(index)
    windows = int(each[0].sum())
    return Routing(
        window, best_rule(together.sum(axis=0)), _srp_interval(together, seed, draws),
        best_rule(random_histogram(used / tokens, window, windows).sum(axis=0)).value,
        np.array([best_rule(row).value for row in each]), len(fitting), len(trace.lengths) - len(fitting),
    )  # fmt: skip


def window_histograms(index: np.ndarray, experts: int, window: int) -> np.ndarray:
    """Return how many windows of one sample hold an expert f times, int64 [E, window + 1], f = 0 .. window.

    Args:
        index: [tokens, K] choices of consecutive tokens, at least ``window`` of them; windows move by one token.
    """
    tokens = len(index)
    counts = np.zeros((experts, window + 1), dtype=np.int64)
    step = max(1, CELLS // experts)
    for start in range(0, tokens - window + 1, step):
        part = index[start : start + step + window - 1]
        chosen = np.zeros((len(part) + 1, experts + 1), dtype=np.int32)
        np.put_along_axis(chosen[1:], part.astype(np.int64), 1, axis=1)
        running = np.cumsum(chosen[:, :experts], axis=0, dtype=np.int32)
        inside = running[window:] - running[:-window]
        codes = inside + np.arange(experts, dtype=np.int64) * (window + 1)
        counts += np.bincount(codes.reshape(-1), minlength=counts.size).reshape(counts.shape)
    return counts


def best_rule(histogram: np.ndarray) -> Best:
    """Return the best threshold for a histogram over f = 0 .. m of (window, expert) pairs.

    With a threshold a, places that are kept and used: sum of f over f >= a; kept: m times the pairs with f >= a;
    used: sum of f. F1 = 2 * (kept and used) / (kept + used). Of equal thresholds the larger, which keeps less.
    """
    window = len(histogram) - 1
    times = np.arange(window + 1)
    hits = _from_the_end(histogram * times)[1:]
    kept = window * _from_the_end(histogram)[1:]
    used = hits[0] if window else 0
    if used <= 0:
        return Best(0.0, 0, 0.0)
    values = 2 * hits / (kept + used)
    place = window - 1 - int(np.argmax(values[::-1]))
    return Best(float(values[place]), place + 1, float(kept[place] / used))


def fixed_point(histogram: np.ndarray) -> int:
    """Return ceil(m/2 * F1) of the best rule, which is itself a best threshold.

    A window is worth keeping iff f > m F1 / 2: keeping it adds 2 f to the numerator and m to the denominator of F1,
    which raises the quotient iff 2 f / m > F1. Computed in whole numbers. 0 when nothing is used.
    """
    window = len(histogram) - 1
    rule = best_rule(histogram)
    if not rule.threshold:
        return 0
    times = np.arange(window + 1)
    hits = int((histogram * times)[rule.threshold :].sum())
    kept = window * int(histogram[rule.threshold :].sum())
    return -(-window * hits // (kept + int((histogram * times).sum())))


def random_histogram(shares: np.ndarray, window: int, windows: int) -> np.ndarray:
    """Return the expected histograms of tokens that choose independently, float64 [E, window + 1].

    Whatever the dependence of the experts within a token, the number of tokens of a window that choose one of them
    is binomial, so no simulation is needed.

    Args:
        shares: float64 [E], probability that a token chooses the expert.
        windows: windows of the histogram.
    """
    times = np.arange(window + 1)
    combinations = np.array(
        [math.lgamma(window + 1) - math.lgamma(f + 1) - math.lgamma(window - f + 1) for f in times]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        present = np.where(times > 0, times * np.log(shares)[:, None], 0.0)
        absent = np.where(times < window, (window - times) * np.log1p(-shares)[:, None], 0.0)
    return windows * np.exp(combinations + present + absent)


def _from_the_end(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values[::-1])[::-1]


def _srp_interval(histograms: np.ndarray, seed: int, draws: int) -> tuple[float, float] | None:
    """Return the interval of the best rule's value over resampled samples; ``histograms`` [samples, m + 1]."""
    if len(histograms) < 2:
        return None
    window = histograms.shape[1] - 1
    times = np.arange(window + 1)
    values = []
    for weights in _resampled(len(histograms), seed, draws):
        summed = weights @ histograms
        hits, kept = _from_the_end(summed * times)[1:], window * _from_the_end(summed)[1:]
        values.append(float((2 * hits / (kept + hits[0])).max()) if hits[0] > 0 else 0.0)
    return _reversed_percentiles(best_rule(histograms.sum(axis=0)).value, np.array(values))


# ---- SCH -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caching:
    """Hit rates of a cache of experts on one layer, averaged over samples.

    Attributes:
        size: experts it holds.
        window: tokens SCH looks ahead.
        cold: whether a first access that finds a free place is a hit (a cache filled beforehand) or a miss.
        rates: policy -> hit rate; "sch" evicts the expert with the fewest uses in the next ``window`` tokens, "belady"
            the one whose next use is farthest, which no policy can beat; "lru" and "lfu" only know the past.
        interval: 95 % of the SCH rate by resampling samples; None with fewer than two.
        samples: how many were averaged.
    """

    size: int
    window: int
    cold: Literal["hit", "miss"]
    rates: dict[str, float]
    interval: tuple[float, float] | None
    samples: int

    def document(self) -> dict[str, Any]:
        """Return the rates as plain data."""
        return {
            "size": self.size, "window": self.window, "cold": self.cold, **self.rates, "interval": None if self.interval is None else list(self.interval),
            "samples": self.samples,
        }  # fmt: skip


def segment_caching(
    trace: Trace, size: int, window: int, *, cold: Literal["hit", "miss"] = "hit", policies: Sequence[Policy] = POLICIES,
    seed: int = 0, draws: int = DRAWS,
) -> Caching:  # fmt: skip
    """Run a demand cache of ``size`` experts over every sample.

    Token by token all chosen experts are looked up, then made resident; whatever has to leave is taken from the
    experts this token did not choose.

    Raises:
        UsageError: E246 the cache is smaller than top-k.
    """
    if size < trace.top_k:
        raise UsageError("E246", f"a cache of {size} experts cannot hold the {trace.top_k} experts of one token",
                         help=f"at least {trace.top_k}; twice that is usual")  # fmt: skip
    rates: dict[str, float] = {}
    interval, counted = None, 0
    for policy in policies:
        hits, lookups = cache_hits(trace, size, policy, window=window, cold=cold)
        each = hits[lookups > 0] / lookups[lookups > 0]
        counted = len(each)
        rates[policy] = float(each.mean()) if counted else 0.0
        if policy == "sch" and counted > 1:
            means = np.array([weights @ each / counted for weights in _resampled(counted, seed, draws)])
            interval = _reversed_percentiles(rates[policy], means)
    return Caching(min(size, trace.experts), window, cold, rates, interval, counted)


def cache_hits(
    trace: Trace, size: int, policy: Policy, *, window: int = 16, cold: Literal["hit", "miss"] = "hit"
) -> tuple[np.ndarray, np.ndarray]:
    """Return hits and look-ups of every sample, int64 [samples] each.

    Samples move in step, one token of each at a time. Equal candidates leave by least recent use, then by number.
    """
    experts, lengths = trace.experts, trace.lengths
    order = np.argsort(-lengths, kind="stable")  # those that are still running are always the first rows
    samples, longest = len(lengths), int(lengths.max(initial=0))
    never = longest + 1
    resident = np.zeros((samples, experts + 1), dtype=bool)
    last = np.full((samples, experts + 1), -1, dtype=np.int64)
    worth = np.zeros((samples, experts + 1), dtype=np.int64)  # uses so far, uses ahead, or next use
    hits, lookups = np.zeros(samples, dtype=np.int64), np.zeros(samples, dtype=np.int64)
    ahead = _NextUses(trace) if policy == "belady" else None
    starts, sorted_lengths = trace.offsets[:-1][order], lengths[order]
    if policy == "sch":
        for step in range(1, min(window, longest - 1) + 1):
            _count(worth, trace.index, starts, sorted_lengths, step, 1)
    for step in range(longest):
        running = int(np.searchsorted(-sorted_lengths, -step, side="left"))
        rows = np.arange(running)[:, None]
        index = trace.index[starts[:running] + step].astype(np.int64)
        current = np.zeros((running, experts + 1), dtype=bool)
        current[rows, index] = True
        current[:, experts] = False
        before = resident[:running]
        missed = current & ~before
        found = current.sum(axis=1) - missed.sum(axis=1)
        if cold == "hit":
            found += np.minimum(np.maximum(size - before.sum(axis=1), 0), missed.sum(axis=1))
        hits[:running] += found
        lookups[:running] += current.sum(axis=1)
        before |= current
        last[rows, index] = step
        if policy == "lfu":
            worth[:running] += current
        elif ahead is not None:
            worth[rows, index] = never - ahead.at(starts[:running] + step, never)
        _evict(before, current, size, worth[:running], last[:running], never)
        if policy == "sch":  # the next token's window is tokens step + 2 .. step + 1 + window
            _count(worth, trace.index, starts, sorted_lengths, step + 1, -1)
            _count(worth, trace.index, starts, sorted_lengths, step + 1 + window, 1)
    back = np.empty(samples, dtype=np.int64)
    back[order] = np.arange(samples)
    return hits[back], lookups[back]


def _evict(
    resident: np.ndarray, current: np.ndarray, size: int, worth: np.ndarray, last: np.ndarray, never: int
) -> None:
    """Take out experts of the lowest worth, then of the least recent use, until ``size`` stay; in place."""
    surplus = resident.sum(axis=1) - size
    rows = np.flatnonzero(surplus > 0)
    if not len(rows):
        return
    surplus = surplus[rows]
    keys = worth[rows] * (never + 1) + last[rows] + 1
    keys[~resident[rows] | current[rows]] = np.iinfo(np.int64).max
    for turn in range(int(surplus.max())):
        open_ = np.flatnonzero(surplus > turn)
        worst = keys[open_].argmin(axis=1)
        resident[rows[open_], worst] = False
        keys[open_, worst] = np.iinfo(np.int64).max


def _count(
    worth: np.ndarray, index: np.ndarray, starts: np.ndarray, lengths: np.ndarray, step: int, sign: int
) -> None:
    """Add a later token's choices to the uses ahead, for the samples that have such a token; in place."""
    running = int(np.searchsorted(-lengths, -step, side="left"))
    if running:
        worth[np.arange(running)[:, None], index[starts[:running] + step].astype(np.int64)] += sign


class _NextUses:
    """For every choice the token of the sample at which the same expert is chosen next."""

    def __init__(self, trace: Trace) -> None:
        tokens, slots = trace.index.shape
        expert = trace.index.astype(np.int64).reshape(-1)
        place = np.repeat(np.arange(tokens), slots)
        sample = np.repeat(np.arange(len(trace.lengths)), trace.lengths * slots)
        order = np.lexsort((place, expert))
        after = order[1:]
        same = (expert[order[:-1]] == expert[after]) & (sample[order[:-1]] == sample[after])
        found = np.full(tokens * slots, -1, dtype=np.int64)
        found[order[:-1][same]] = place[after[same]] - trace.offsets[sample[after[same]]]
        self.next = found.reshape(tokens, slots)

    def at(self, places: np.ndarray, never: int) -> np.ndarray:
        """Return next uses [samples, K] of the choices at these places; ``never`` where there is none."""
        found = self.next[places]
        return np.where(found < 0, never, found)


# ---- intervals -------------------------------------------------------------------------------------


def _resampled(samples: int, seed: int, draws: int) -> np.ndarray:
    """Return how often each sample is drawn in each resampling, float64 [draws, samples]."""
    numbers = uniform(stream_key(seed, samples, "bootstrap over samples"), 0, draws * samples)
    drawn = np.minimum((numbers * samples).astype(np.int64), samples - 1).reshape(draws, samples)
    weights = np.zeros((draws, samples))
    np.add.at(weights, (np.arange(draws)[:, None], drawn), 1.0)
    return weights


def _reversed_percentiles(estimate: float, values: np.ndarray) -> tuple[float, float]:
    """Return the reverse-percentile interval 2 * estimate - quantile, within [0, 1] as the measures are."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return max(0.0, 2 * estimate - float(high)), min(1.0, 2 * estimate - float(low))
