"""Metrics and intervals against closed forms, scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from surgeon.evaluate import intervals, metrics
from surgeon.evaluate.metrics import Outcomes


def outcomes(correct=None, tokens=None, finished=None, domains=None, reflective=None) -> Outcomes:
    shape = np.asarray(correct if correct is not None else tokens).shape
    count = shape[0]
    return Outcomes(
        tuple(f"q{i}" for i in range(count)), tuple(domains or [""] * count), None if correct is None else np.asarray(correct, bool),
        np.ones(shape, int) if tokens is None else np.asarray(tokens),
        np.ones(shape, bool) if finished is None else np.asarray(finished, bool),
        np.zeros(shape, bool) if reflective is None else np.asarray(reflective, bool),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hits", "total"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (196, 200), (1, 1000)]
)
def test_wilson_equals_scipy(hits, total):
    theirs = stats.binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert intervals.wilson(hits, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (3, 9), (40, 41), (200, 260)])
def test_mcnemar_equals_the_binomial_test(first, second):
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert intervals.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_of_a_mean_approaches_the_normal_interval():
    values = np.random.default_rng(0).normal(10, 3, 2000)
    low, high = intervals.bootstrap(2000, lambda rows: {"mean": values[rows].mean(axis=1)})["mean"]
    half = 1.96 * values.std() / math.sqrt(2000)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_bootstrap_depends_on_the_seed_alone_not_on_chunks(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    results = []
    for chunk in (60, 1000, 10**7):
        monkeypatch.setattr(intervals, "_CHUNK", chunk)
        results.append(intervals.bootstrap(50, lambda rows: {"m": values[rows].mean(axis=1)}, seed=5)["m"])
    assert results[0] == results[1] == results[2]
    assert results[0] != intervals.bootstrap(50, lambda rows: {"m": values[rows].mean(axis=1)}, seed=6)["m"]


def test_one_cluster_has_no_interval():
    assert intervals.bootstrap(1, lambda rows: {"m": np.ones(len(rows))}) == {"m": None}


def test_samples_of_one_question_are_not_independent():
    """16 equal samples for each of 30 questions carry no more information than one each."""
    single = np.arange(30)[:, None] < 12
    once = metrics.measure(outcomes(single))["accuracy"]
    often = metrics.measure(outcomes(np.repeat(single, 16, axis=1)))["accuracy"]
    assert often["value"] == once["value"] == pytest.approx(0.4)
    assert often["high"] - often["low"] == pytest.approx(once["high"] - once["low"], rel=0.12)


def test_metrics_of_a_small_table():
    correct = [[True, True], [True, False], [False, False], [True, True]]
    tokens = [[10, 20], [30, 40], [100, 100], [50, 50]]
    finished = [[True, True], [True, True], [False, False], [True, True]]
    found = metrics.measure(
        outcomes(correct, tokens, finished, reflective=[[True, False]] * 4), pass_at=[1, 2]
    )
    assert found["accuracy"]["value"] == 5 / 8
    assert found["tokens_mean"]["value"] == 50 and found["tokens_median"]["value"] == 45
    assert found["cap_rate"]["value"] == 0.25 and found["reflection_rate"]["value"] == 0.5
    assert found["intelligence_per_token"]["value"] == pytest.approx(1000 * 0.625 / 50)
    assert found["pass@1"]["value"] == pytest.approx(5 / 8) and found["pass@2"]["value"] == 0.75
    for name, metric in found.items():
        assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] == 4, name


def test_extremes_have_an_interval_of_positive_length():
    found = metrics.measure(outcomes(np.ones((30, 16), bool)))["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx(intervals.wilson(30, 30))


def test_pass_at_k_equals_enumeration():
    for samples, k in [(4, 1), (4, 2), (5, 3), (6, 6)]:
        for hits in range(samples + 1):
            draws = list(itertools.combinations([True] * hits + [False] * (samples - hits), k))
            expected = sum(any(d) for d in draws) / len(draws)
            assert metrics.pass_at_k(np.array([hits]), samples, k)[0] == pytest.approx(expected)


def test_paired_comparison_is_by_question():
    generator = np.random.default_rng(3)
    hard = generator.random(300)
    first = outcomes((generator.random(300) < hard)[:, None], generator.integers(50, 60, (300, 1)))
    second = outcomes(first.correct ^ (np.arange(300)[:, None] % 50 == 0), first.tokens * 2)
    shuffled = second.take(np.random.default_rng(4).permutation(300))
    found = metrics.paired(first, shuffled)
    assert found["accuracy_difference"]["value"] == pytest.approx(
        first.correct.mean() - second.correct.mean()
    )
    assert (
        found["tokens_ratio"]["value"] == found["tokens_ratio"]["low"] == found["tokens_ratio"]["high"] == 0.5
    )
    gained, lost = found["mcnemar"]["gained"], found["mcnemar"]["lost"]
    assert gained + lost == 6 and (gained - lost) / 300 == pytest.approx(
        found["accuracy_difference"]["value"]
    )
    paired_width = found["accuracy_difference"]["high"] - found["accuracy_difference"]["low"]
    alone = metrics.measure(first)["accuracy"]
    assert paired_width < 0.6 * (alone["high"] - alone["low"])  # what pairing is for


def test_paired_takes_only_common_questions():
    first, second = outcomes([[True], [False], [True]]), outcomes([[True], [False], [True]]).take([0, 1])
    assert metrics.paired(first, second)["tokens_ratio"]["n"] == 2


def test_domains():
    found = metrics.by_domain(outcomes([[True], [False], [True]], domains=["a", "b", "a"]))
    assert found["a"]["accuracy"]["value"] == 1.0 and found["b"]["accuracy"]["n"] == 1
    assert metrics.by_domain(outcomes([[True], [False]])) == {}
    assert list(metrics.by_domain(outcomes([[True], [False]], domains=["only", "only"]))) == ["only"]


def test_reflection_words_are_whole_words():
    pattern = metrics.reflection_pattern(metrics.REFLECTION_WORDS)
    for text in ("Wait, no.", "let me double-check", "LET ME VERIFY this", "recap:1,2", "Let me re-examine"):
        assert pattern.search(text), text
    for text in ("awaiting", "waiter", "recapture", "the total"):
        assert not pattern.search(text), text


def test_noise_is_that_of_two_independent_shares():
    assert intervals.noise_points(0.5, 100) == pytest.approx(13.86, abs=0.01)
    assert 0 < intervals.noise_points(1.0, 30) < intervals.noise_points(0.5, 30)


def test_intervals_of_all_and_none_end_exactly():
    for count in (3, 10, 30, 77):
        assert intervals.wilson(0, count)[0] == 0.0 and intervals.wilson(count, count)[1] == 1.0


@pytest.mark.parametrize("right", [False, True])
def test_pass_at_k_of_all_or_none_has_an_interval(right):
    found = metrics.measure(outcomes(correct=np.full((10, 4), right)), pass_at=(2,))["pass@2"]
    theirs = stats.binomtest(10 * right, 10).proportion_ci(0.95, method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
