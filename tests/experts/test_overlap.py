"""Overlap of domains and stability of choices."""

import numpy as np
import pytest

from surgeon.experts.overlap import bands, domain_overlaps, overlap, sentences, stability, top


def test_identical_disjoint_and_random_choices():
    scores = np.random.default_rng(0).random(64)
    assert overlap(scores, scores, 32) == 1.0 and overlap(scores, -scores, 32) == 0.0
    drawn = np.random.default_rng(1)
    found = [overlap(drawn.random(64), drawn.random(64), 16) for _ in range(400)]
    assert np.mean(found) == pytest.approx(16 / 64, abs=0.01)


def test_ties_go_to_the_lower_number():
    assert top(np.array([1.0, 2, 1, 2, 1]), 3).tolist() == [0, 1, 3]


def test_bands_are_thirds_in_order():
    assert bands([1, 2, 3, 5, 6, 7, 8]) == {"first": (1, 2), "middle": (3, 5, 6), "last": (7, 8)}
    assert bands([4, 9]) == {"all": (4, 9)}


def test_domains_are_compared_layer_by_layer():
    same, other = np.arange(8.0), np.arange(8.0)[::-1]
    scores = {
        "maths": {layer: same for layer in range(3)},
        "code": {0: same, 1: same, 2: other},
        "prose": dict.fromkeys(range(3), other),
    }
    found = {(o.first, o.second): o for o in domain_overlaps(scores, 4)}
    assert set(found) == {("maths", "code"), ("maths", "prose"), ("code", "prose")}
    assert found["maths", "code"].bands == {"first": 1.0, "middle": 1.0, "last": 0.0}
    assert found["maths", "code"].mean == pytest.approx(2 / 3) and not found["maths", "code"].near_chance
    assert found["maths", "prose"].expected == 0.5 and found["maths", "prose"].near_chance
    said = sentences(list(found.values()), {})
    assert len(said) == 2 and '"maths" and "prose" share 0% of their 4 best experts (chance 50%)' in said[0]


def test_a_choice_that_every_demonstration_makes_is_stable():
    rows = np.tile(np.arange(16.0), (30, 1))
    found = stability({0: rows, 1: rows}, 8)
    assert found.agreement == {5: 1.0, 10: 1.0, 25: 1.0} and found.halves == 1.0 and found.enough
    assert sentences([], {"": found}) == []


def test_a_choice_of_noise_is_at_chance_between_halves_and_the_worst_layer_is_named():
    drawn = np.random.default_rng(0)
    noise, steady = drawn.random((30, 64)), np.tile(np.arange(64.0), (30, 1))
    found = stability({0: noise}, 16, draws=200)
    assert found.halves == pytest.approx(0.25, abs=0.08)
    assert (
        found.agreement[25] > found.agreement[10] > found.agreement[5] > 0.25
    )  # parts agree with what contains them
    mixed = stability({3: steady, 4: noise}, 16)
    assert mixed.worst is not None and mixed.worst[0] == 4 and not mixed.enough
    assert 'too few demonstrations of "maths"' in sentences([], {"maths": mixed})[0]


def test_domains_whose_choices_are_noise_are_not_said_to_differ():
    drawn = np.random.default_rng(2)
    found = {name: stability({0: drawn.random((6, 32))}, 8) for name in ("maths", "code")}
    apart = domain_overlaps({"maths": {0: np.arange(32.0)}, "code": {0: -np.arange(32.0)}}, 8)
    assert apart[0].near_chance and len(sentences(apart, {})) == 1
    assert (
        all("too few" in sentence for sentence in sentences(apart, found))
        and len(sentences(apart, found)) == 2
    )


def test_agreement_equals_plain_sets_and_repeats():
    rows = np.random.default_rng(3).gamma(0.3, size=(11, 12))
    found = stability({0: rows}, 5, draws=1, seed=9)
    assert found == stability({0: rows}, 5, draws=1, seed=9) and set(found.agreement) == {5, 10}
    from surgeon.experts.overlap import _order

    order = _order(11, 9, 0)
    best = [set(np.argsort(-rows[order[:n]].sum(axis=0))[:5].tolist()) for n in (5, 10, 11)]
    assert found.agreement == {5: len(best[0] & best[2]) / 5, 10: len(best[1] & best[2]) / 5}
    second = set(np.argsort(-rows[order[5:10]].sum(axis=0))[:5].tolist())
    assert found.halves == len(best[0] & second) / 5


def test_one_demonstration_says_nothing():
    found = stability({0: np.ones((1, 4))}, 2)
    assert found.halves is None and found.agreement == {} and not found.enough
    assert "one demonstration" in sentences([], {"": found})[0]


def test_groups_keep_equally_many():
    scores = np.array([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert top(scores, 4).tolist() == [0, 1, 2, 3] and top(scores, 4, 2).tolist() == [0, 1, 6, 7]
    other = np.array([9.0, 1, 8, 2, 7, 3, 6, 4])
    assert overlap(scores, other, 4, 2) == 0.5 and overlap(scores, other, 4) == 0.5
    assert top(other, 4, 2).tolist() == [0, 2, 4, 6]
