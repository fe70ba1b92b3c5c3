"""The front against brute force, steps, intervals, axes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.report import axis
from surgeon.report.pareto import Point, clearly_beaten, front, staircase

# Few distinct values, so that equal coordinates and equal points occur all the time.
POINTS = st.lists(
    st.builds(Point, st.integers(1, 6).map(float), st.integers(0, 6).map(lambda v: v / 6)), max_size=14
)


def dominates(a: Point, b: Point) -> bool:
    no_worse = a.tokens <= b.tokens and a.accuracy >= b.accuracy
    return no_worse and (a.tokens < b.tokens or a.accuracy > b.accuracy)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points):
    expected = {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)}
    found = front(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    lengths = [points[i].tokens for i in found]
    accuracies = [points[i].accuracy for i in found]
    assert lengths == sorted(lengths)
    assert accuracies == sorted(accuracies)


def test_the_measured_models():
    measured = [(242, 0.98), (54, 0.86), (156, 0.955), (214, 0.98), (57, 0.89), (118, 0.86), (179, 0.905), (140, 0.93)]  # fmt: skip
    points = [Point(float(t), a) for t, a in measured]
    assert [measured[i][0] for i in front(points)] == [54, 57, 140, 156, 214]


@given(POINTS, st.floats(0, 2), st.floats(0, 0.5))
def test_clearly_beaten_is_never_on_the_front_and_stays_beaten_with_narrower_intervals(points, dt, da):
    def widened(scale: float) -> list[Point]:
        return [
            Point(p.tokens, p.accuracy, p.tokens - scale * dt, p.tokens + scale * dt, p.accuracy - scale * da,
                  p.accuracy + scale * da)
            for p in points
        ]  # fmt: skip

    wide, narrow = clearly_beaten(widened(1)), clearly_beaten(widened(0.5))
    assert not any(wide[i] for i in front(points))
    assert all(b for a, b in zip(wide, narrow, strict=True) if a)


def test_touching_intervals_and_missing_intervals_beat_nothing():
    short = Point(50, 0.9, 45, 60, 0.85, 0.95)
    assert clearly_beaten([short, Point(70, 0.7, 61, 79, 0.6, 0.84)]) == [False, True]
    assert clearly_beaten([short, Point(70, 0.7, 60, 79, 0.6, 0.84)]) == [False, False]
    assert clearly_beaten([short, Point(70, 0.7, 61, 79, 0.6, 0.85)]) == [False, False]
    assert clearly_beaten([short, Point(70, 0.7)]) == [False, False]
    assert clearly_beaten([Point(50, 0.9), Point(70, 0.7, 61, 79, 0.6, 0.84)]) == [False, False]


@given(POINTS.filter(bool))
def test_the_staircase_is_the_best_accuracy_within_a_length(points):
    best = [points[i] for i in front(points)]
    corners = staircase(best, 10.0, -1.0)
    assert corners[0] == (best[0].tokens, -1.0)
    assert corners[-1] == (10.0, max(p.accuracy for p in points))
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        assert x0 == x1 or y0 == y1
        assert x1 >= x0 and y1 >= y0
        if x1 > x0:
            within = (x0 + x1) / 2
            assert y0 == max(p.accuracy for p in points if p.tokens <= within)


def test_no_points():
    assert front([]) == [] and clearly_beaten([]) == [] and staircase([], 1, 0) == []


@given(st.floats(-1e3, 1e3), st.floats(1e-1, 1e6), st.integers(2, 12))
def test_linear_ticks_are_round_inside_and_few(low, span, count):
    ticks = axis.linear_ticks(low, low + span, count)
    assert len(ticks) <= count + 1
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in ticks)
    step = axis.round_step(span, count)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6
    assert all(abs(b - a - step) < step * 1e-3 for a, b in itertools.pairwise(ticks))


@given(st.floats(0.5, 1e5), st.floats(1.01, 1e4))
def test_log_ticks_are_inside_and_rise(low, ratio):
    ticks = axis.log_ticks(low, low * ratio, 8)
    assert all(low * (1 - 1e-6) <= t <= low * ratio * (1 + 1e-6) for t in ticks)
    assert ticks == sorted(set(ticks))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.booleans())
def test_every_length_lies_on_its_axis(values, log):
    found = axis.tokens_axis(values, 50, 950, log)
    assert found.high > found.low
    for value in values:
        if value > 0 or not log:
            assert 50 - 1e-6 <= found.place(value) <= 950 + 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_every_accuracy_lies_on_its_axis(values):
    found = axis.accuracy_axis(values, 400, 20)
    assert 0 <= found.low < found.high <= 1
    assert all(20 - 1e-6 <= found.place(v) <= 400 + 1e-6 for v in values)


@pytest.mark.parametrize("log", [False, True])
def test_a_value_in_the_middle(log):
    found = axis.Axis(10, 1000, 0, 100, log)
    assert found.place(100 if log else 505) == pytest.approx(50)
