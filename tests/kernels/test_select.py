"""Exact selection by magnitude, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgeon.kernels import cast, select


def blocks_of(values: np.ndarray, size: int) -> list[tuple[tuple[int, int], np.ndarray]]:
    return [((0, i), select.keys(values[s : s + size])) for i, s in enumerate(range(0, len(values), size))]


def threshold_of(values: np.ndarray, k: int, size: int = 7, exact: bool = False) -> select.Threshold:
    """Find a threshold in two passes over blocks."""
    blocks = blocks_of(values, size)
    histogram = sum((select.high_histogram(key) for _, key in blocks), np.zeros(select.HIGH_BINS, np.int64))
    rank = select.locate(histogram, k, exact=exact)
    return select.resolve(rank, [(where, *select.low_counts(key, rank)) for where, key in blocks])


def kept_of(values: np.ndarray, threshold: select.Threshold, size: int = 7) -> np.ndarray:
    parts = [select.keep_mask(key, threshold, where) for where, key in blocks_of(values, size)]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def patterns(code: str):
    """Return arrays of finite values of a storage type, ties, subnormals and both zeros included."""
    bits = {"BF16": 16, "F16": 16, "F32": 32}[code]
    kind = np.uint16 if bits == 16 else np.uint32
    few = st.sampled_from(
        [0, 1 << (bits - 1), 1, 2, (1 << (bits - 1)) | 1, 0x3F80 if code == "BF16" else 0x3C00]
    )
    raw = arrays(kind, st.integers(1, 60), elements=few | st.integers(0, (1 << bits) - 1))

    def wide(raw: np.ndarray) -> np.ndarray:
        values = raw if code == "BF16" else raw.view(np.float16 if code == "F16" else np.float32)
        values = cast.widen(values, code).copy()
        values[~np.isfinite(values)] = 0
        return values

    return raw.map(wide)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_threshold_is_the_kth_largest(code):
    @settings(max_examples=60)
    @given(patterns(code), st.integers(1, 60), st.integers(1, 64))
    def check(values, k, size):
        k = min(k, len(values))
        ordered = np.sort(np.abs(values))[::-1]
        threshold = threshold_of(values, k, size, exact=True)
        assert threshold.key == int(ordered[k - 1 : k].view(np.uint32)[0])
        assert threshold.ties == np.count_nonzero(np.abs(values) == ordered[k - 1])
        assert threshold.quota == k - np.count_nonzero(np.abs(values) > ordered[k - 1])

    check()


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_exactly_k_of_the_largest_are_kept(code):
    @settings(max_examples=60)
    @given(patterns(code), st.integers(0, 61), st.integers(1, 64))
    def check(values, k, size):
        mask = kept_of(values, threshold_of(values, k, size), size)
        assert np.count_nonzero(mask) == min(k, len(values))
        if mask.any() and not mask.all():
            assert np.abs(values[mask]).min() >= np.abs(values[~mask]).max()
        np.testing.assert_array_equal(mask, kept_of(values, threshold_of(values, k, 1000), 1000))

    check()


def test_keys_order_like_magnitudes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 10.0**e, 200) for e in range(-44, 38, 6)]).astype(np.float32)
    np.testing.assert_array_equal(
        np.argsort(select.keys(values), kind="stable"), np.argsort(np.abs(values), kind="stable")
    )
    assert select.keys(np.array([-0.0, 0.0], np.float32)).tolist() == [0, 0]


def test_tied_entries_of_the_card():
    ones = np.array([1, -1, 1, -1], np.float32)
    assert kept_of(ones, threshold_of(ones, 2)).tolist() == [False, True, False, True]


def test_ties_are_spread_evenly():
    """A constant magnitude over a million entries: every tenth keeps its share to within one entry."""
    values = np.full(1_000_000, 2.0**-10, np.float32)
    mask = kept_of(values, threshold_of(values, 250_000, 65_536), 65_536)
    for tenth in np.split(mask, 10):
        assert abs(np.count_nonzero(tenth) - 25_000) <= 1
    assert np.count_nonzero(mask) == 250_000


@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 200), st.integers(1, 40))
def test_tie_quota_is_exact_and_independent_of_blocks(first, ties, quota, size):
    quota = min(quota, ties)
    whole = select.kept_ties(ties, 0, quota, ties)
    assert np.count_nonzero(whole) == quota
    parts = [select.kept_ties(min(size, ties - s), s, quota, ties) for s in range(0, ties, size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    tail = select.kept_ties(ties - min(first, ties), min(first, ties), quota, ties)
    np.testing.assert_array_equal(tail, whole[min(first, ties) :])


@settings(max_examples=150)
@given(patterns("BF16"), st.integers(0, 60), st.integers(0, 60), st.integers(1, 64))
def test_band_keeps_exactly_the_difference(values, inner, outer, size):
    n = len(values)
    inner, outer = sorted((min(inner, n), min(outer, n)))
    low, high = threshold_of(values, outer, size), threshold_of(values, inner, size)
    mask = np.concatenate([select.band_mask(key, low, high, where) for where, key in blocks_of(values, size)])
    assert np.count_nonzero(mask) == outer - inner
    if mask.any():
        order = np.sort(np.abs(values))[::-1]
        kept = np.sort(np.abs(values[mask]))[::-1]
        np.testing.assert_array_equal(kept, order[inner:outer])


def test_many_entries_in_one_bin():
    rng = np.random.default_rng(1)
    values = (1 + rng.random(50_000) * 2.0**-9).astype(np.float32)
    k = 12_345
    threshold = threshold_of(values, k, 20_000)
    assert threshold.key == int(np.sort(values)[::-1][k - 1 : k].view(np.uint32)[0])
    assert np.count_nonzero(kept_of(values, threshold, 20_000)) == k


def test_nothing_everything_and_empty():
    values = np.array([3.0, -1.0, 0.0], np.float32)
    assert kept_of(values, threshold_of(values, 0)).tolist() == [False] * 3
    assert kept_of(values, threshold_of(values, 3)).tolist() == [True] * 3
    empty = np.zeros(0, np.float32)
    histogram = select.high_histogram(select.keys(empty))
    assert histogram.shape == (select.HIGH_BINS,) and not histogram.any()
    assert select.locate(histogram, 1).bin == -1
    assert (
        select.keep_mask(select.keys(empty), select.resolve(select.locate(histogram, 1), []), (0, 0)).size
        == 0
    )
