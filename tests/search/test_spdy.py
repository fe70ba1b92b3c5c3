"""The coefficient search: never worse than its floors, the same for the same seed, and better where the plain program is wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.search import spdy
from surgeon.search.knapsack import solve


def tables(modules, levels, seed):
    drawn = np.random.default_rng(seed)
    errors = [np.r_[0.0, np.sort(drawn.random(levels - 2)), 1.0] for _ in range(modules)]
    times = [np.linspace(1.0, 0.0, levels) for _ in range(modules)]
    return errors, times


class Weighted:
    """A true loss in which modules matter differently, and neighbours that are both cut hurt more."""

    def __init__(self, errors, seed=0, neighbours=0.0):
        self.errors = errors
        self.weights = np.random.default_rng(seed).random(len(errors)) ** 2
        self.neighbours = neighbours
        self.calls: list[int] = []
        self.seen: list[tuple[int, ...]] = []

    def one(self, levels):
        parts = np.array([error[level] for error, level in zip(self.errors, levels, strict=True)])
        return float(self.weights @ parts + self.neighbours * (parts[1:] * parts[:-1]).sum())

    def __call__(self, batch):
        self.calls.append(len(batch))
        self.seen += [tuple(levels) for levels in batch]
        return [self.one(levels) for levels in batch]


def total(times, levels):
    return math.fsum(time[level] for time, level in zip(times, levels, strict=True))


def best_of_all(errors, times, budget, loss):
    choices = itertools.product(*(range(len(error)) for error in errors))
    return min(loss.one(levels) for levels in choices if total(times, levels) <= budget)


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_best_assignment_where_modules_matter_differently(seed):
    """The plain program takes errors for comparable, and is wrong."""
    errors, times = tables(6, 4, seed)
    loss = Weighted(errors, seed=seed)
    best = best_of_all(errors, times, 3.0, loss)
    found = spdy.search(errors, times, 3.0, loss, seed=1)
    assert loss.one(solve(errors, times, 3.0)) > 1.05 * best
    assert found.loss == pytest.approx(best)
    assert found.loss == loss.one(found.levels)
    assert total(times, found.levels) <= 3.0


def test_finds_better_where_neighbours_hurt_each_other():
    """No sum over modules can express it, so only the true loss shows it."""
    errors, times = tables(8, 4, 3)
    loss = Weighted(errors, seed=1, neighbours=1.0)
    best = best_of_all(errors, times, 4.0, loss)
    plain = loss.one(solve(errors, times, 4.0))
    found = spdy.search(errors, times, 4.0, loss)
    assert plain > 1.3 * best
    assert found.loss < 0.8 * plain


def test_a_large_problem_is_improved_within_the_evaluations_given():
    errors, times = tables(48, 12, 5)
    loss = Weighted(errors, seed=2)
    found = spdy.search(errors, times, 24.0, loss)
    assert found.loss < 0.5 * loss.one(solve(errors, times, 24.0))
    assert found.source == "fitted"
    assert found.evaluations == len(loss.seen) <= 1 + 32 + 64
    assert len(set(loss.seen)) == len(loss.seen)  # never the same assignment twice
    assert max(loss.calls) <= 8


def test_coefficients_give_the_assignment_again():
    errors, times = tables(12, 8, 7)
    loss = Weighted(errors, seed=3)
    found = spdy.search(errors, times, 6.0, loss)
    again = solve([c * error for c, error in zip(found.coefficients, errors, strict=True)], times, 6.0)
    assert tuple(again) == found.levels


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_never_loses_to_the_plain_program_or_a_floor(seed):
    drawn = np.random.default_rng(seed)
    errors, times = tables(5, 5, seed)
    budget = float(drawn.uniform(0.5, 4.5))

    def loss(batch):  # any loss at all, unrelated to the errors
        return [float(np.random.default_rng([seed, *levels]).random()) for levels in batch]

    floors = [[4] * 5, [3, 4, 4, 4, 4]]
    found = spdy.search(errors, times, budget, loss, floors=floors)
    plain = solve(errors, times, budget)
    assert found.loss <= min(loss([plain, *floors]))
    assert found.loss == min(trial.loss for trial in found.history)
    assert found.loss == loss([list(found.levels)])[0]


def test_the_seed_decides():
    errors, times = tables(20, 10, 11)
    loss = Weighted(errors, seed=4, neighbours=0.1)

    def history(seed):
        return spdy.search(errors, times, 9.0, loss, seed=seed).history

    assert history(1) == history(1)
    assert history(1) != history(2)


def test_nothing_fits():
    errors, times = tables(3, 4, 0)
    times = [time + 1 for time in times]
    assert spdy.search(errors, times, 2.9, Weighted(errors)) is None


def test_a_deadline_stops_cleanly_but_never_before_the_floors(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("surgeon.search.trials.Clock.__init__.__defaults__", (lambda: now[0],))
    errors, times = tables(30, 10, 2)
    loss = Weighted(errors)

    def slow(batch):
        now[0] += 10.0
        return loss(batch)

    found = spdy.search(errors, times, 15.0, slow, floors=[[9] * 30], deadline=35.0)
    assert found.stopped == "deadline"
    # Plain and floor take 10 s, two batches of 8 follow; a third would end after 40 s.
    assert found.evaluations == 2 + 16 and now[0] == 130.0
    found = spdy.search(errors, times, 15.0, slow, floors=[[9] * 30], deadline=0.0)
    assert (found.evaluations, found.stopped) == (2, "deadline")


def test_a_loss_that_is_not_a_number_is_never_the_best():
    errors, times = tables(6, 6, 1)
    loss = Weighted(errors)
    plain = solve(errors, times, 3.0)

    def broken(batch):
        return [math.nan if levels == plain else loss.one(levels) for levels in batch]

    found = spdy.search(errors, times, 3.0, broken)
    assert math.isfinite(found.loss) and list(found.levels) != plain
    assert next(trial for trial in found.history if trial.source == "plain").loss == math.inf


def test_every_assignment_handed_over_fits():
    errors, times = tables(25, 9, 8)
    loss = Weighted(errors, seed=6)
    spdy.search(errors, times, 12.5, loss)
    assert all(total(times, levels) <= 12.5 for levels in loss.seen)


def test_as_many_losses_as_assignments_must_come_back():
    errors, times = tables(3, 3, 0)
    with pytest.raises(ValueError, match="losses came back"):
        spdy.search(errors, times, 2.0, lambda batch: [])
