"""The load of a router: closed forms, plain loops, and the size of chance."""

import math

import numpy as np
import pytest

from surgeon.experts.load import covering, gini, load_of


def test_an_even_load_has_no_imbalance_in_any_figure():
    load = load_of(np.full(8, 25), tokens=100)
    assert load.cv == 0 and load.gini == 0 and load.entropy == pytest.approx(1.0, abs=1e-15)
    assert load.effective == pytest.approx(8.0) and load.max_over_mean == 1
    assert load.dead == () and load.rare == () and load.covering == {0.5: 4, 0.8: 7, 0.95: 8}


def test_all_tokens_on_one_expert():
    counts = np.zeros(6, np.int64)
    counts[4] = 50
    load = load_of(counts, tokens=50)
    assert load.gini == pytest.approx(5 / 6) and load.entropy == 0 and load.effective == 1
    assert load.max_over_mean == 6 and load.cv == pytest.approx(math.sqrt(5))  # var = mean^2 (E - 1)
    assert load.dead == (0, 1, 2, 3, 5) and load.covering == {0.5: 1, 0.8: 1, 0.95: 1}


def test_hand_example_with_weights_and_outputs():
    load = load_of(np.array([60, 30, 10, 0, 1]), tokens=101, gate=np.array([30.0, 24, 6, 0, 0]), gated=np.array([1.0, 8, 0.5, 0, 0.5]))  # fmt: skip
    assert load.selections == 101 and load.dead == (3,) and load.rare == (4,)  # the average is 20.2
    assert load.covering == {0.5: 1, 0.8: 2, 0.95: 3} and load.covering_output == {0.5: 1, 0.8: 1, 0.95: 3}
    assert load.gate_share is not None and load.mean_gate is not None
    np.testing.assert_allclose(load.gate_share, [0.5, 0.4, 0.1, 0, 0])
    np.testing.assert_allclose(load.mean_gate, [0.5, 0.8, 0.6, 0, 0])
    assert not load.reliable  # 101 choices are 20 for each expert
    assert load_of(np.array([60, 30, 10, 0, 60]), tokens=160).reliable


def test_gini_is_the_mean_difference_of_all_pairs():
    values = np.random.default_rng(0).gamma(0.7, size=23)
    pairs = sum(abs(a - b) for a in values for b in values)
    assert gini(values) == pytest.approx(pairs / (2 * len(values) ** 2 * values.mean()), rel=1e-12)


def test_covering_takes_the_heaviest_first_and_forgives_rounding():
    assert covering(np.array([0.1] * 10), (0.3, 0.7)) == {0.3: 3, 0.7: 7}
    mass = np.random.default_rng(1).random(31)
    for share, count in (covering(mass) or {}).items():
        heaviest = sorted(mass, reverse=True)
        assert sum(heaviest[:count]) >= share * mass.sum() > sum(heaviest[: count - 1])


def test_without_tokens_nothing_is_defined_and_nothing_is_nan():
    load = load_of(np.zeros(4), tokens=0, gate=np.zeros(4), gated=np.zeros(4))
    assert load.cv is load.gini is load.entropy is load.covering is load.mean_gate is None
    assert load.dead == (0, 1, 2, 3) and not load.reliable
    document = load.document()
    assert document["covering"] == {"0.5": None, "0.8": None, "0.95": None} and document["shares"] is None


def test_even_routing_of_few_tokens_looks_uneven_only_by_chance():
    ratios = []
    for seed in range(200):
        drawn = np.random.default_rng(seed).integers(0, 64, 500)
        ratios.append(load_of(np.bincount(drawn, minlength=64), tokens=500).cv_ratio)
    assert 0.97 < np.mean(ratios) < 1.03
    assert (
        load_of(np.bincount(drawn, minlength=64), tokens=500).cv > 0.25
    )  # which alone would look like imbalance


def test_a_single_expert_has_no_imbalance_to_speak_of():
    load = load_of(np.array([7]), tokens=7)
    assert load.cv == 0 and load.cv_expected == 0 and load.cv_ratio is None and load.entropy == 1
