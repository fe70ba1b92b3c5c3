"""Removing experts and choosing bits together, against trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from surgeon.errors import UsageError
from surgeon.quantize.allocation import joint


def drawn_problem(seed, layers, experts, widths=2):
    drawn = np.random.default_rng(seed)
    kept = np.sort(drawn.random((layers, experts, widths)), axis=2)[:, :, ::-1] * drawn.random(
        (layers, experts, 1)
    )
    removal = drawn.random((layers, experts)) * 2
    sizes = np.sort(drawn.integers(2, 30, (layers, widths)), axis=1)
    return drawn, kept, removal, sizes


def equal(gone, experts, groups):
    """Whether every group of neighbouring experts loses as many."""
    each = experts // groups
    return len({sum(e // each == group for e in gone) for group in range(groups)}) == 1


def by_layer_everything(kept, removal, sizes, budget, active, groups=1):
    """Every P, every set of every layer, every width."""
    layers, experts, widths = kept.shape
    best = math.inf
    for count in range(experts - active + 1):
        menus = []
        for layer in range(layers):
            options = []
            for gone in itertools.combinations(range(experts), count):
                if not equal(gone, experts, groups):
                    continue
                stay = [e for e in range(experts) if e not in gone]
                for j in range(widths):
                    loss = sum(removal[layer, e] for e in gone) + sum(kept[layer, e, j] for e in stay)
                    options.append((loss, len(stay) * int(sizes[layer, j])))
            menus.append(options)
        if not all(menus):
            continue
        loss, size = np.array([o[0] for o in menus[0]]), np.array([o[1] for o in menus[0]])
        for options in menus[1:]:
            loss = np.add.outer(loss, [o[0] for o in options]).ravel()
            size = np.add.outer(size, [o[1] for o in options]).ravel()
        if (size <= budget).any():
            best = min(best, loss[size <= budget].min())
    return best


def by_expert_everything(kept, removal, sizes, budget, active, groups=1):
    layers, experts, widths = kept.shape
    best = math.inf
    per_layer = []
    for layer in range(layers):
        found = []
        for columns in itertools.product(range(-1, widths), repeat=experts):
            if not equal([e for e, j in enumerate(columns) if j < 0], experts, groups):
                continue
            loss = sum(removal[layer, e] if j < 0 else kept[layer, e, j] for e, j in enumerate(columns))
            size = sum(0 if j < 0 else int(sizes[layer, j]) for j in columns)
            found.append((columns.count(-1), loss, size))
        per_layer.append(found)
    for count in range(experts - active + 1):
        for chosen in itertools.product(*([o for o in found if o[0] == count] for found in per_layer)):
            if sum(size for _, _, size in chosen) <= budget:
                best = min(best, sum(loss for _, loss, _ in chosen))
    return best


def consistent(found, kept, removal, sizes):
    """Add the result up again, written out."""
    loss, size = 0.0, 0
    for layer, expert in np.ndindex(*removal.shape):
        column = found.columns[layer, expert]
        assert (column < 0) == found.removed[layer, expert]
        loss += removal[layer, expert] if column < 0 else kept[layer, expert, column]
        size += 0 if column < 0 else sizes[layer, column]
    assert (found.removed.sum(axis=1) == found.count).all()
    assert found.loss == pytest.approx(loss) and found.size == size


@pytest.mark.parametrize("seed", range(40))
def test_one_width_a_layer_equals_trying_everything(seed):
    drawn, kept, removal, sizes = drawn_problem(seed, 3, 5)
    most = 5 * int(sizes[:, 1].sum())
    budget = int(drawn.integers(most // 4, most + 1))
    expected = by_layer_everything(kept, removal, sizes, budget, 2)
    if math.isinf(expected):
        with pytest.raises(UsageError, match=f"is {2 * int(sizes[:, 0].sum()):,} bytes"):
            joint.by_layer(kept, removal, sizes, budget, active=2)
        return
    found = joint.by_layer(kept, removal, sizes, budget, active=2)
    assert found.loss == pytest.approx(expected, rel=2e-6)
    assert found.size <= budget and found.count <= 3
    assert all(len(set(row[row >= 0].tolist())) == 1 for row in found.columns)
    consistent(found, kept, removal, sizes)


@pytest.mark.parametrize("seed", range(25))
def test_a_width_for_each_expert_equals_trying_everything(seed):
    drawn, kept, removal, sizes = drawn_problem(100 + seed, 2, 4)
    most = 4 * int(sizes[:, 1].sum())
    budget = int(drawn.integers(most // 3, most + 1))
    expected = by_expert_everything(kept, removal, sizes, budget, 2)
    if math.isinf(expected):
        with pytest.raises(UsageError):
            joint.by_expert(kept, removal, sizes, budget, active=2)
        return
    found = joint.by_expert(kept, removal, sizes, budget, active=2, gap=0)
    assert found.loss == pytest.approx(expected, rel=2e-6)
    assert found.size <= budget
    consistent(found, kept, removal, sizes)
    assert found.loss <= joint.by_layer(kept, removal, sizes, budget, active=2).loss * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("granularity", ["layer", "expert"])
def test_groups_lose_equally_many_and_nothing_is_better(seed, granularity):
    layers, experts, groups = (3, 6, 3 if seed % 2 else 2) if granularity == "layer" else (2, 4, 2)
    everything, solve = (
        (by_layer_everything, joint.by_layer) if granularity == "layer" else (by_expert_everything, joint.by_expert)
    )  # fmt: skip
    drawn, kept, removal, sizes = drawn_problem(200 + seed, layers, experts)
    if seed % 3 == 0:
        removal[0, 1] = np.inf
    most = experts * int(sizes[:, 1].sum())
    budget = int(drawn.integers(most // 2, most))
    expected = everything(kept, removal, sizes, budget, 2, groups)
    free = everything(kept, removal, sizes, budget, 2)
    if math.isinf(expected):
        with pytest.raises(UsageError):
            solve(kept, removal, sizes, budget, active=2, groups=groups)
        return
    found = solve(kept, removal, sizes, budget, active=2, groups=groups, gap=0)
    assert found.loss == pytest.approx(expected, rel=2e-6) and expected >= free - 1e-12
    assert found.size <= budget and found.count % groups == 0
    assert (found.removed.reshape(layers, groups, -1).sum(axis=2) == found.count // groups).all()
    consistent(found, kept, removal, sizes)


def test_groups_bind():
    """Without groups both experts of the first half go; with them one of each."""
    kept = np.ones((1, 4, 1))
    removal = np.array([[0.1, 0.2, 3.0, 4.0]])
    sizes = np.array([[10]])
    for solve in (joint.by_layer, joint.by_expert):
        free = solve(kept, removal, sizes, 20, active=2)
        held = solve(kept, removal, sizes, 20, active=2, groups=2)
        assert np.flatnonzero(free.removed[0]).tolist() == [0, 1]
        assert np.flatnonzero(held.removed[0]).tolist() == [0, 2] and held.loss == pytest.approx(5.1)
    assert joint.removable(np.array([[np.inf, 1, 1, 1]]), 2) == 2
    with pytest.raises(ValueError, match="in 3 groups"):
        joint.by_layer(kept, removal, sizes, 40, active=2, groups=3)


@pytest.mark.parametrize("solve", [joint.by_layer, joint.by_expert])
def test_protected_experts_stay_and_free_ones_go(solve):
    _, kept, removal, sizes = drawn_problem(7, 3, 6)
    most = 6 * int(sizes[:, 1].sum())
    none = solve(
        kept, np.full_like(removal, np.inf), sizes, most // 2 + 6 * int(sizes[:, 0].sum()) // 2, active=2
    )
    assert none.count == 0 and not none.removed.any()
    # Free removal of two experts a layer, everything else protected.
    free = np.full_like(removal, np.inf)
    gone = np.array([[0, 3], [5, 1], [2, 4]])
    np.put_along_axis(free, gone, 0.0, axis=1)
    found = solve(kept, free, sizes, most, active=2)
    assert found.count == 2
    assert [np.flatnonzero(row).tolist() for row in found.removed] == [[0, 3], [1, 5], [2, 4]]
    assert (found.columns[~found.removed] == 1).all()
    # Everything is free: as many as may go, and of each layer those that cost most to keep.
    every = solve(kept, np.zeros_like(removal), sizes, most, active=2)
    assert every.count == 4
    for layer in range(3):
        column = every.columns[layer].max()
        if solve is joint.by_layer:
            assert set(np.flatnonzero(every.removed[layer])) == set(np.argsort(-kept[layer, :, column])[:4])


def test_one_layer_of_shared_experts_cannot_lose_more_than_all_layers():
    _, kept, removal, sizes = drawn_problem(8, 3, 6)
    removal[1] = np.inf
    found = joint.by_layer(kept, removal, sizes, 6 * int(sizes[:, 1].sum()), active=2)
    assert found.count == 0


@pytest.mark.parametrize("solve", [joint.by_layer, joint.by_expert])
def test_solving_again_with_the_number_fixed(solve):
    _, kept, removal, sizes = drawn_problem(9, 3, 6)
    budget = 3 * int(sizes[:, 1].sum())
    first = solve(kept, removal, sizes, budget, active=2)
    again = solve(kept, removal, sizes, budget, active=2, counts=[first.count])
    assert again.count == first.count and again.loss == pytest.approx(first.loss, rel=2e-4)
    losses = []
    for count in range(5):
        try:
            losses.append(solve(kept, removal, sizes, budget, active=2, counts=[count]).loss)
        except UsageError:
            losses.append(math.inf)
    assert int(np.argmin(losses)) == first.count
    with pytest.raises(ValueError, match="at most 4 can"):
        solve(kept, removal, sizes, budget, active=2, counts=[5])


def test_more_bytes_never_lose_more():
    _, kept, removal, sizes = drawn_problem(10, 4, 8, 3)
    low, high = 2 * int(sizes[:, 0].sum()), 8 * int(sizes[:, 2].sum())
    losses = [joint.by_layer(kept, removal, sizes, int(b), active=2).loss for b in np.linspace(low, high, 15)]
    assert all(b <= a * (1 + 2e-6) for a, b in itertools.pairwise(losses))


@pytest.mark.slow
def test_the_size_of_a_real_mixture():
    _, kept, removal, _ = drawn_problem(11, 48, 128, 4)
    sizes = np.tile(np.array([2, 3, 4, 8]) * 589_824, (48, 1))
    budget = int(48 * 128 * 2.7 * 589_824)
    for solve in (joint.by_layer, joint.by_expert):
        found = solve(kept, removal, sizes, budget, active=8)
        assert found.size <= budget and found.status == "optimal"
        consistent(found, kept, removal, sizes)
