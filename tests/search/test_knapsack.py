"""The knapsack against trying everything, and the promise that a budget is never exceeded."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.search.knapsack import solve


def total(table, levels):
    return math.fsum(row[level] for row, level in zip(table, levels, strict=True))


def exhaustive(costs, times, budget):
    """Return the least cost of all assignments that fit, or None."""
    fitting = [
        total(costs, levels)
        for levels in itertools.product(*(range(len(cost)) for cost in costs))
        if total(times, levels) <= budget
    ]
    return min(fitting, default=None)


def test_four_modules_of_four_levels_by_hand():
    errors = [np.array([0, 0.1, 0.5, 1.0])] * 2 + [np.array([0, 0.3, 0.4, 1.0])] * 2
    times = [np.array([4.0, 3, 2, 0])] * 4
    # 16 whole; 10 left: two modules lose one unit each, and two lose two units.
    assert solve(errors, times, 10) == [1, 1, 2, 2]
    assert solve(errors, times, 16) == [0, 0, 0, 0]
    assert solve(errors, times, 0) == [3, 3, 3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_equals_trying_everything(seed):
    drawn = np.random.default_rng(seed)
    costs = [np.sort(drawn.random(4)) for _ in range(4)]
    times = [np.sort(drawn.random(4))[::-1] for _ in range(4)]
    low, high = sum(t.min() for t in times), sum(t.max() for t in times)
    for share in (0.0, 0.2, 0.5, 0.9, 1.1):
        budget = low + share * (high - low) + 1e-12
        levels = solve(costs, times, budget)
        assert total(costs, levels) == pytest.approx(exhaustive(costs, times, budget), abs=0)


@pytest.mark.parametrize("seed", range(10))
def test_whole_numbers_are_solved_exactly_even_where_buckets_are_coarse(seed):
    drawn = np.random.default_rng(seed)
    unit = 131_072
    costs = [np.sort(drawn.random(5)) for _ in range(5)]
    times = [unit * np.sort(drawn.integers(0, 40, 5))[::-1] + 77 for _ in range(5)]
    low, high = sum(int(t.min()) for t in times), sum(int(t.max()) for t in times)
    budget = int(drawn.integers(low, high + 1))
    levels = solve(costs, times, budget, buckets=60)
    assert total(costs, levels) == exhaustive(costs, times, budget)


@st.composite
def problems(draw):
    modules = draw(st.integers(1, 5))
    shapes = [draw(st.integers(1, 4)) for _ in range(modules)]
    number = st.floats(0, 10, allow_nan=False, width=32)
    costs = [np.array(draw(st.lists(number, min_size=n, max_size=n))) for n in shapes]
    times = [np.array(draw(st.lists(number, min_size=n, max_size=n))) for n in shapes]
    return costs, times, draw(st.floats(0, 40, allow_nan=False)), draw(st.sampled_from([1, 7, 50, 1000]))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_never_exceeds_the_budget_and_is_as_good_as_promised(problem):
    costs, times, budget, buckets = problem
    levels = solve(costs, times, budget, buckets)
    best = exhaustive(costs, times, budget)
    assert (levels is None) == (best is None)
    if levels is None:
        return
    assert total(times, levels) <= budget
    assert total(costs, levels) >= best - 1e-9
    modules = len(costs)
    room = budget - sum(t.min() for t in times)
    worst = exhaustive(costs, times, budget - room * modules / max(buckets, 4 * modules) - 1e-9)
    if worst is not None:
        assert total(costs, levels) <= worst + 1e-9


def test_a_budget_that_cannot_be_met_has_no_solution():
    assert solve([np.array([0.0, 1.0])], [np.array([2.0, 1.0])], 0.99) is None
    assert solve([np.array([0.0])], [np.array([0.0])], -1e-9) is None
    assert solve([np.array([0.0])], [np.array([1.0])], float("nan")) is None


def test_levels_without_time_are_free():
    costs = [np.array([0.0, 0.4, 1.0]), np.array([0.0, 1.0])]
    times = [np.array([3.0, 0.0, 0.0]), np.array([2.0, 0.0])]
    assert solve(costs, times, 0.0) == [1, 1]
    assert solve(costs, times, 2.0) == [1, 0]
    assert solve(costs, [np.zeros(3), np.zeros(2)], 0.0) == [0, 0]


def test_an_infinite_cost_forbids_a_level():
    costs = [np.array([0.0, 0.4, np.inf]), np.array([0.0, 1.0])]
    times = [np.array([3.0, 2.0, 0.0]), np.array([2.0, 0.0])]
    assert solve(costs, times, 2.0) == [1, 1]
    assert solve(costs, times, 1.9) is None
    assert solve([np.array([np.inf])], [np.array([0.0])], 1.0) is None


def test_times_far_smaller_than_a_bucket_cannot_add_up_beyond_the_budget():
    """Each rounds to nothing; all of them together would not fit."""
    modules = 500
    times = [np.array([1.0, 0.0])] + [np.array([0.004, 0.0])] * modules
    costs = [np.array([0.0, 5.0])] + [np.array([0.0, 0.01])] * modules
    levels = solve(costs, times, 2.0, buckets=100)
    assert total(times, levels) <= 2.0
    assert total(costs, levels) == pytest.approx(2.5)  # 250 of the small ones beside the large one


@pytest.mark.parametrize(
    ("costs", "times"),
    [
        ([], []),
        ([[0.0]], []),
        ([[0.0, 1.0]], [[1.0]]),
        ([[]], [[]]),
        ([[np.nan]], [[1.0]]),
        ([[-np.inf]], [[1.0]]),
        ([[0.0]], [[-1.0]]),
        ([[0.0]], [[np.inf]]),
    ],
)
def test_tables_that_make_no_sense_are_refused(costs, times):
    with pytest.raises(ValueError):
        solve([np.array(c) for c in costs], [np.array(t) for t in times], 1.0)


def test_a_large_model_is_solved_quickly():
    """64 modules of 44 levels: what a proposal of the search costs on a model of 32 layers."""
    drawn = np.random.default_rng(0)
    errors = [np.sort(drawn.random(44)) for _ in range(64)]
    times = [np.sort(drawn.random(44))[::-1] for _ in range(64)]
    before = time.process_time()
    levels = solve(errors, times, 0.6 * sum(t[0] for t in times))
    assert time.process_time() - before < 2.0
    assert total(times, levels) <= 0.6 * sum(t[0] for t in times)
