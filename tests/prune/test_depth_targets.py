"""Layers to keep for a speedup: against arithmetic and exhaustive search."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from surgeon.errors import UsageError
from surgeon.prune.depth.uniform import keep_set
from surgeon.prune.depth_ranking import DepthRanking
from surgeon.prune.depth_targets import choose, ladder, layer_times, layers_to_keep
from surgeon.structure.cut import LayerShape


def ranking_of(scores, method="block_influence"):
    order = sorted(range(len(scores)), key=lambda n: scores[n])[: len(scores) - 2]
    drops = tuple(tuple(sorted(order[:k])) for k in range(len(order) + 1))
    return DepthRanking(method, len(scores), drops, (0.0,) * len(drops), tuple(scores))


def test_layers_to_keep_is_the_largest_number_that_is_fast_enough():
    drawn = np.random.default_rng(0)
    for _ in range(300):
        layers, each, rest = (
            int(drawn.integers(3, 65)),
            float(drawn.uniform(0.1, 3)),
            float(drawn.uniform(0, 20)),
        )
        most = (rest + layers * each) / (rest + 2 * each)
        speedup = float(drawn.uniform(1 + 1e-3, most))
        keep = layers_to_keep(rest, [each] * layers, speedup)
        assert 2 <= keep < layers
        reached = [(rest + layers * each) / (rest + n * each) for n in (keep, keep + 1)]
        assert reached[0] >= speedup * (1 - 1e-6) and reached[1] < speedup


def test_exact_steps_of_the_ladder_are_reached():
    times, rest = [0.1] * 32, 0.7
    steps = ladder(rest, times, [tuple(range(k)) for k in range(31)])
    assert steps[0] == (32, 1.0) and len(steps) == 31
    for keep, speedup in steps[1:]:
        assert layers_to_keep(rest, times, speedup) == keep


def test_the_output_head_counts():
    """A quarter of the time outside the layers: 1.5x leaves 17 of 32 layers, not 21."""
    assert layers_to_keep(10.0, [30 / 32] * 32, 1.5) == 17
    assert layers_to_keep(0.0, [1.0] * 32, 1.5) == 21


@pytest.mark.parametrize("speedup", [1.0, 0.5, 30.0, float("nan"), math.inf])
def test_unreachable(speedup):
    with pytest.raises(UsageError, match="E275") as caught:
        layers_to_keep(1.0, [1.0] * 8, speedup)
    assert "up to 3.00" in caught.value.help


def test_equal_layers_follow_the_ranking():
    scores = [9.0, 1.0, 3.0, 2.0, 8.0, 9.0]
    assert choose(ranking_of(scores), 0.0, [1.0] * 6, 1.5) == (1, 3)


def test_different_layers_cost_least_importance():
    drawn = np.random.default_rng(3)
    for _ in range(40):
        layers = int(drawn.integers(4, 9))
        times = [float(drawn.choice([1.0, 2.5])) for _ in range(layers)]
        scores = drawn.uniform(0.1, 1, layers).tolist()
        ranking, rest = ranking_of(scores), float(drawn.uniform(0, 2))
        may = set(ranking.drops[-1])
        dense = rest + sum(times)
        sets = [c for k in range(layers - 1) for c in combinations(sorted(may), k)]
        speedup = float(
            drawn.uniform(1.02, 0.98 * max(dense / (dense - sum(times[n] for n in c)) for c in sets))
        )
        fast = [c for c in sets if dense / (dense - sum(times[n] for n in c)) >= speedup]
        best = min(sum(scores[n] for n in c) for c in fast)
        if len(set(times)) > 1:
            found = choose(ranking, rest, times, speedup)
            assert found in fast and sum(scores[n] for n in found) == pytest.approx(best)


def test_even_spacing_with_different_layers_takes_the_first_set_that_is_fast_enough():
    drops = tuple(tuple(sorted(set(range(6)) - set(keep_set(6, 6 - k)))) for k in range(5))
    ranking = DepthRanking("uniform", 6, drops, (math.nan,) * 5)
    times = [1.0, 1.0, 3.0, 1.0, 1.0, 1.0]
    found = choose(ranking, 0.0, times, 1.3)
    slower = drops[drops.index(found) - 1]
    assert 8 / (8 - sum(times[n] for n in found)) >= 1.3 > 8 / (8 - sum(times[n] for n in slower))
    short = DepthRanking("uniform", 6, drops[:2], (math.nan,) * 2)
    with pytest.raises(UsageError, match="E275"):
        choose(short, 0.0, times, 3.0)


def test_protected_layers_limit_the_reach():
    ranking = DepthRanking("nmse", 4, ((), (1,)), (0.0, 0.1), (None, 0.1, None, None))
    with pytest.raises(UsageError, match="E275"):
        choose(ranking, 0.0, [1.0, 1.0, 2.0, 1.0], 1.9)
    assert choose(ranking, 0.0, [1.0, 1.0, 2.0, 1.0], 1.2) == (1,)


def test_times_come_from_the_table():
    class Table:
        rest = 1.0

        def layer(self, shape):
            return shape.heads + shape.ffn / 100

    assert layer_times(Table(), [LayerShape(4, 2, 8, 100), LayerShape(2, 2, 8, 50)]) == [5.0, 2.5]
