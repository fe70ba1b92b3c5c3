"""Pairs of experts on the same token, against plain loops."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from surgeon.experts.coactivation import BLOCK, CoActivation


def drawn(tokens, experts, slots, seed=0):
    weights = np.random.default_rng(seed)
    return np.argsort(weights.random((tokens, experts)) ** np.arange(1, experts + 1), axis=1)[:, :slots]


def gathered(index, experts, pieces=1):
    found = CoActivation(experts)
    for part in np.array_split(index, pieces):
        found.add(part)
    return found


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_counts_equal_plain_loops(slots):
    index = drawn(300, 9, slots)
    pairs: Counter = Counter()
    for row in index.tolist():
        pairs.update(frozenset(p) for p in combinations(row, 2))
    found = gathered(index, 9, pieces=7)
    for i in range(9):
        for j in range(9):
            assert found.pairs[i, j] == (0 if i == j else pairs[frozenset((i, j))])
    assert (found.pairs == found.pairs.T).all() and (found.pairs.diagonal() == 0).all()
    assert (found.pairs.sum(axis=1) == found.counts * (slots - 1)).all()
    assert found.pairs.sum() == 300 * slots * (slots - 1) and found.tokens == 300
    assert found.counts.sum() == 300 * slots


def test_blocks_do_not_change_counts():
    index = drawn(BLOCK + 77, 5, 3).astype(np.uint16)
    once, often = gathered(index, 5), gathered(index, 5, pieces=13)
    assert (once.pairs == often.pairs).all() and (once.counts == often.counts).all()


def test_empty_slots_belong_to_nobody():
    found = gathered(np.array([[0, 1, 4], [4, 2, 4], [3, 4, 0]]), 4)
    assert found.counts.tolist() == [2, 1, 1, 1]
    assert found.pairs.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_normalisations_by_hand():
    found = gathered(np.array([[0, 1], [0, 1], [0, 2], [1, 2]]), 4)
    assert found.share()[0, 1] == 0.5 and found.of_total().sum() == pytest.approx(1)
    assert found.conditional()[0].tolist() == [0, 2 / 3, 1 / 3, 0]
    assert found.lift()[0, 1] == pytest.approx(2 * 4 / 9) and found.jaccard()[0, 1] == pytest.approx(2 / 4)
    for values in (found.share(), found.conditional(), found.lift(), found.jaccard(), found.of_total()):
        assert np.isfinite(values).all() and (values[3] == 0).all()  # expert 3 has no tokens


def test_strongest_pairs_come_first_and_empty_ones_never():
    found = gathered(np.array([[0, 1]] * 3 + [[2, 3]] * 5 + [[0, 2]]), 5)
    best = found.strongest(10)
    assert [(p.first, p.second, p.tokens) for p in best] == [(2, 3, 5), (0, 1, 3), (0, 2, 1)]
    assert best[0].jaccard == pytest.approx(5 / 6) and best[1].lift == pytest.approx(3 * 9 / (4 * 3))
    assert len(found.strongest(2)) == 2 and CoActivation(3).strongest(4) == []
