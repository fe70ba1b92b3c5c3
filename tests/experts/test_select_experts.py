"""Which experts stay: ties, groups, protection; against a search over all subsets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from surgeon.errors import InputError, UsageError
from surgeon.experts.select import select

NONE = np.zeros(8, np.int64)


def test_the_highest_scores_stay_in_ascending_order():
    assert select(np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), NONE, 3) == (4, 5, 7)


def test_ties_go_to_more_tokens_then_to_the_lower_number():
    tokens = np.array([0, 5, 0, 5, 0, 0, 0, 9])
    assert select(np.zeros(8), tokens, 3) == (1, 3, 7)
    assert select(np.zeros(8), tokens, 5) == (0, 1, 2, 3, 7)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_no_allowed_subset_has_a_higher_sum(seed, groups):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=8)
    protected = set(rng.choice(8, 2, replace=False).tolist())
    keep, size = 4, 8 // groups
    allowed = [
        set(s)
        for s in itertools.combinations(range(8), keep)
        if all(sum(e // size == g for e in s) == keep // groups for g in range(groups))
    ]
    fitting = [s for s in allowed if protected <= s]
    if not fitting:
        with pytest.raises(UsageError, match="are protected"):
            select(scores, NONE, keep, groups=groups, protected=protected)
        return
    best = max(fitting, key=lambda s: sum(scores[list(s)]))
    assert set(select(scores, NONE, keep, groups=groups, protected=protected)) == best


def test_protected_experts_stay_with_the_lowest_scores():
    assert 2 in select(np.array([9.0, 8, -5, 7]), NONE[:4], 1, protected={2})
    with pytest.raises(
        UsageError, match="2 experts of layer 3 are protected \\(0, 2\\), but only 1 may stay"
    ):
        select(np.zeros(4), NONE[:4], 1, protected={0, 2}, where="layer 3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused(bad):
    with pytest.raises(InputError, match="score of expert 1 of layer 0"):
        select(np.array([1.0, bad, 2]), NONE[:3], 2, where="layer 0")


@pytest.mark.parametrize("keep", [0, 9, 3])
def test_a_number_that_does_not_fit_is_refused(keep):
    with pytest.raises(UsageError):
        select(np.zeros(8), NONE, keep, groups=2)
