"""Counter-based random numbers."""

from __future__ import annotations

import numpy as np
import pytest

from surgeon.seeds import stream_key, uniform

KEY = stream_key(0, 1, "model.layers.0.mlp.up_proj.weight")


def test_any_cut_gives_the_same_numbers():
    whole = uniform(KEY, 0, 10_000)
    for size in (1, 7, 4096):
        parts = [uniform(KEY, s, min(s + size, 10_000)) for s in range(0, 10_000, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(uniform(KEY, 9_000, 9_100), whole[9_000:9_100])
    assert uniform(KEY, 5, 5).size == 0


def test_values_are_pinned():
    """A changed stream changes every random merge: that needs a new method version, not a new test."""
    assert stream_key(0, 1, "model.layers.0.mlp.up_proj.weight") == 13871663686698731878
    np.testing.assert_array_equal(
        uniform(12345, 0, 3), [0.1330796686614273, 0.20481663336165912, 0.11954258300911547]
    )


def test_uniform():
    n = 1_000_000
    draws = uniform(KEY, 0, n)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * n)
    assert abs(draws.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    counts = np.bincount((draws * 256).astype(int), minlength=256)
    chi = np.sum((counts - n / 256) ** 2 / (n / 256))
    assert abs(chi - 255) < 4 * np.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096, 1 << 17])
def test_neighbours_are_independent(lag):
    draws = uniform(KEY, 0, 1 << 19) - 0.5
    correlation = 12 * np.mean(draws[:-lag] * draws[lag:])
    assert abs(correlation) < 4.5 / np.sqrt(len(draws) - lag)


def test_low_bits_are_as_random_as_high_ones():
    bits = (uniform(KEY, 0, 1 << 18) * (1 << 53)).astype(np.uint64)
    for shift in range(0, 53, 4):
        share = np.mean((bits >> np.uint64(shift)) & np.uint64(1))
        assert abs(share - 0.5) < 4.5 * 0.5 / np.sqrt(1 << 18)


@pytest.mark.parametrize(
    "other",
    [
        (1, 1, "model.layers.0.mlp.up_proj.weight"),
        (0, 2, "model.layers.0.mlp.up_proj.weight"),
        (0, 1, "model.layers.1.mlp.up_proj.weight"),
        (0, 11, "model.layers.0.mlp.up_proj.weight"),
        (11, 1, "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_streams_are_independent(other):
    n = 1 << 18
    a, b = uniform(KEY, 0, n) - 0.5, uniform(stream_key(*other), 0, n) - 0.5
    assert abs(12 * np.mean(a * b)) < 4.5 / np.sqrt(n)
    assert not np.array_equal(a, b)


def test_far_elements_are_reachable():
    far = uniform(KEY, (1 << 40) - 2, (1 << 40) + 2)
    assert len(np.unique(far)) == 4
