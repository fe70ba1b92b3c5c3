"""Bit widths of experts against trying everything, by closed forms, and the program over all layers."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from surgeon.errors import InputError, UsageError
from surgeon.quantize.allocation import milp, pmq
from surgeon.quantize.allocation.menus import Menu, Option
from surgeon.quantize.allocation.pmq import Experts, effective_bits, importance, solve, solve_average
from surgeon.quantize.allocation.sensitivity import routed_error

WIDTHS = (1, 2, 3)


def drawn_costs(drawn, count, columns=3):
    return np.sort(drawn.random((count, columns)), axis=1)[:, ::-1] * drawn.random((count, 1))


def combinations(count, columns=3):
    return np.array(list(itertools.product(range(columns), repeat=count)))


def everything(costs, sizes, budget, must=(), exact=False, pinned=None, combos=None):
    """Return the least cost of all allocations that obey every rule, or None."""
    combos = combinations(*costs.shape) if combos is None else combos
    rows = np.arange(costs.shape[0])
    total = sizes[rows, combos].sum(axis=1)
    good = (total == budget) if exact else (total <= budget)
    for column in must:
        good &= (combos == column).any(axis=1)
    for row, column in (pinned or {}).items():
        good &= combos[:, row] == column
    return costs[rows, combos][good].sum(axis=1).min() if good.any() else None


@pytest.mark.parametrize("count", [6, 7])
def test_equals_trying_everything(count):
    """500 tables in all, each in both forms, with and without widths that must appear."""
    combos = combinations(count)
    for seed in range(250):
        drawn = np.random.default_rng(count * 1000 + seed)
        costs = drawn_costs(drawn, count)
        if seed % 4 == 0:
            costs = drawn.random((count, 3))  # falling with no width
        sizes = np.tile(np.array(WIDTHS), (count, 1))
        if seed % 3 == 0:
            sizes = drawn.integers(0, 9, (count, 3)) * 4096 + drawn.integers(0, 99, (count, 1))
        for must, exact in itertools.product(((), (2, 1)), (False, True)):
            total = int(sizes[np.arange(count), drawn.integers(0, 3, count)].sum())
            expected = everything(costs, sizes, total, must, exact, combos=combos)
            one = Experts(costs, sizes, must)
            if expected is None:
                with pytest.raises(UsageError):
                    solve([one], total, exact=exact)
                continue
            found = solve([one], total, exact=exact)
            columns = found.columns[0]
            assert found.cost == pytest.approx(expected, rel=1e-12)
            assert found.cost == pytest.approx(costs[np.arange(count), columns].sum(), rel=1e-12)
            assert found.size == sizes[np.arange(count), columns].sum()
            assert found.size == total if exact else found.size <= total
            assert all((columns == column).any() for column in must)


def test_one_budget_over_layers_equals_trying_everything():
    for seed in range(60):
        drawn = np.random.default_rng(seed)
        counts = (3, 2, 3) if seed % 2 else (4, 4)
        must = (2, 1) if seed % 3 == 0 else ()
        costs = [drawn_costs(drawn, n) for n in counts]
        sizes = [
            np.tile(np.array(WIDTHS) * unit, (n, 1))
            for n, unit in zip(counts, drawn.integers(1, 4, 3), strict=False)
        ]
        layers = [Experts(c, s, must) for c, s in zip(costs, sizes, strict=True)]
        low, high = (sum(bounds) for bounds in zip(*(one.interval() for one in layers), strict=True))
        budget = int(drawn.integers(low, high + 1))
        best = math.inf
        parts = [combinations(n) for n in counts]
        tables = []
        for c, s, combos in zip(costs, sizes, parts, strict=True):
            rows = np.arange(len(c))
            allowed = (
                np.all([(combos == column).any(axis=1) for column in must], axis=0)
                if must
                else np.ones(len(combos), bool)
            )
            tables.append((c[rows, combos].sum(1)[allowed], s[rows, combos].sum(1)[allowed]))
        cost, size = tables[0]
        for more_cost, more_size in tables[1:]:
            cost, size = np.add.outer(cost, more_cost).ravel(), np.add.outer(size, more_size).ravel()
        best = cost[size <= budget].min()
        found = solve(layers, budget)
        assert found.cost == pytest.approx(best, rel=1e-12) and found.size <= budget
        if (size == budget).any():
            exact = solve(layers, budget, exact=True)
            assert exact.size == budget and exact.cost == pytest.approx(cost[size == budget].min(), rel=1e-12)
        # One budget for all layers is never worse than equal ones.
        shares = [
            max(one.interval()[0], budget * len(c) // sum(counts))
            for one, c in zip(layers, costs, strict=True)
        ]
        if sum(shares) <= budget:
            assert found.cost <= solve(layers, shares).cost + 1e-12


def test_equals_the_integer_program_where_everything_is_too_much():
    drawn = np.random.default_rng(4)
    layers = [Experts(drawn_costs(drawn, 32), np.tile(np.array([2, 3, 4]) * 700, (32, 1))) for _ in range(4)]
    budget = int(4 * 32 * 2.6 * 700)
    menus = [Menu(f"{n}.{row:03}", tuple(Option(str(j), int(one.sizes[row, j]), float(one.costs[row, j])) for j in range(3)))
             for n, one in enumerate(layers) for row in range(32)]  # fmt: skip
    assert solve(layers, budget).cost == pytest.approx(milp.solve(menus, budget, gap=0).loss, rel=2e-6)


def test_the_interval_of_the_rule_that_widths_must_appear():
    costs = drawn_costs(np.random.default_rng(0), 8)
    with pytest.raises(UsageError, match=r"between 1\.375 and 2\.875") as refused:
        solve_average(costs, WIDTHS, 1.0, must=(3, 2))
    assert refused.value.code == "E462"
    with pytest.raises(UsageError, match=r"in steps of 0\.125"):
        solve_average(costs, WIDTHS, 2.9, must=(3, 2), exact=True)
    feasible = []
    for total in range(8, 26):
        try:
            found = solve_average(costs, WIDTHS, total / 8, must=(3, 2), exact=True)
        except UsageError:
            continue
        assert found.sum() == total
        feasible.append(total)
    assert feasible == list(range(11, 24))
    # At most so many bits is possible however many they are.
    assert solve_average(costs, WIDTHS, 7.5).tolist() == [3] * 8
    assert solve_average(costs, WIDTHS, 7.5, must=(3, 2)).sum() == 23
    with pytest.raises(UsageError, match="cannot show them all"):
        solve_average(costs[:1], WIDTHS, 3.0, must=(3, 2))


def test_more_bits_never_cost_more_and_the_ends_are_uniform():
    costs = drawn_costs(np.random.default_rng(1), 12) + np.array([0.3, 0.2, 0.1])
    spent = [costs[np.arange(12), solve_average(costs, WIDTHS, k) - 1].sum() for k in np.linspace(1, 3, 20)]
    assert all(b <= a for a, b in itertools.pairwise(spent))
    assert (solve_average(costs, WIDTHS, 1) == 1).all() and (solve_average(costs, WIDTHS, 3) == 3).all()


def test_equal_experts_get_bits_in_the_order_of_their_importance():
    drawn = np.random.default_rng(2)
    phi, w = drawn.random(10), np.full(10, 0.1)
    eps = np.tile([0.8, 0.3, 0.1], (10, 1))
    costs = importance(phi, w, eps)
    for k in np.linspace(1, 3, 21):
        widths = solve_average(costs, WIDTHS, float(k), priority=phi * w)
        assert (np.diff(widths[np.argsort(phi)]) >= 0).all()


def test_ties_go_to_the_more_important_expert_and_then_to_the_lower_number():
    # Thirds are no binary fractions: sums of floats in different orders would differ.
    costs = np.tile([1.0, 1 / 3, 0.0], (9, 1)) / 7
    assert solve_average(costs, WIDTHS, 15 / 9).tolist() == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    priority = np.array([0, 0, 0, 0, 5, 0, 0, 9, 0])
    assert solve_average(costs, WIDTHS, 12 / 9, priority=priority).tolist() == [2, 1, 1, 1, 2, 1, 1, 2, 1]
    # Two and two bits cost what three and one do.
    costs = np.tile([1.0, 0.5, 0.0], (9, 1))
    assert solve_average(costs, WIDTHS, 15 / 9).tolist() == [3, 3, 3, 1, 1, 1, 1, 1, 1]
    assert solve_average(costs, WIDTHS, 15 / 9, priority=priority).tolist() == [3, 1, 1, 1, 3, 1, 1, 3, 1]
    everything_free = solve_average(np.zeros((5, 3)), WIDTHS, 2.2)
    assert everything_free.tolist() == [1] * 5
    assert solve_average(np.zeros((5, 3)), WIDTHS, 2.2, exact=True).tolist() == [3, 3, 3, 1, 1]
    # Between layers the first one decides first.
    layers = [Experts(costs[:2], np.tile(np.array(WIDTHS), (2, 1)))] * 2
    assert [c.tolist() for c in solve(layers, 8).columns] == [[2, 2], [0, 0]]


def test_an_expert_that_costs_nothing_gets_the_smallest_width():
    drawn = np.random.default_rng(3)
    phi, w, eps = drawn.random(8), drawn.random(8), drawn_costs(drawn, 8)
    phi[5] = w[5] = 0.0  # never routed
    eps[2, 0] = 0.0  # representable at one bit
    eps[2, 1:] = 0.0
    costs = importance(phi, w, eps)
    for k in (1.0, 1.7, 2.5, 3.0):
        found = solve_average(costs, WIDTHS, k)
        assert found[5] == 1 and found[2] == 1
    assert (importance(phi, w, eps, alpha=0, beta=0, gamma=0)[5] == 0).all()


def test_super_experts_are_pinned_and_charged():
    drawn = np.random.default_rng(6)
    for _ in range(40):
        costs = drawn_costs(drawn, 6)
        sizes = np.tile(np.array(WIDTHS), (6, 1))
        pinned = {int(drawn.integers(6)): 2, int(drawn.integers(6)): 2}
        found = solve([pmq.with_pins(Experts(costs, sizes), list(pinned))], 13)
        assert all(found.columns[0][row] == 2 for row in pinned)
        assert found.size <= 13
        assert found.cost == pytest.approx(everything(costs, sizes, 13, pinned=pinned), rel=1e-12)
    with pytest.raises(UsageError, match=r"between 1\.66667 and 3"):
        solve_average(drawn_costs(drawn, 6), WIDTHS, 1.5, pinned={0: 3, 1: 3})


def test_importance_is_the_formula():
    phi, w = np.array([0.5, 0.25]), np.array([0.2, 0.2])
    eps = np.array([[4.0, 2.0], [9.0, 1.0]])
    found = importance(phi, w, eps, alpha=2, beta=1.5, gamma=2)
    for i, j in np.ndindex(2, 2):
        assert found[i, j] == pytest.approx((phi[i] / 0.75) ** 2 * 0.5**1.5 * eps[i, j] ** 2)
    # Scaling the factors changes no choice.
    a = solve_average(importance(phi, w, eps), (1, 2), 1.5)
    assert np.array_equal(a, solve_average(1000 * importance(7 * phi, 3 * w, eps), (1, 2), 1.5))
    assert [round(effective_bits(b), 3) for b in (2, 3, 4)] == [2.141, 3.148, 4.156]
    by_part = importance(phi, w, np.stack([eps, eps], axis=1))
    assert by_part.shape == (2, 2, 2) and np.array_equal(by_part[:, 0], importance(phi, w, eps))


@pytest.mark.parametrize("active", [1, 2, 4])
def test_the_change_of_a_block_is_that_of_one_experts_tokens(active):
    drawn = np.random.default_rng(active)
    tokens, router = drawn.normal(size=(60, 6)), drawn.normal(size=(6, 5))
    experts, shared = drawn.normal(size=(5, 6, 6)), drawn.normal(size=(6, 6))
    scores = np.exp(tokens @ router)
    scores /= scores.sum(axis=1, keepdims=True)
    chosen = np.argsort(-scores, axis=1)[:, :active]
    gates = np.zeros_like(scores)
    np.put_along_axis(gates, chosen, np.take_along_axis(scores, chosen, axis=1), axis=1)
    gates /= gates.sum(axis=1, keepdims=True)

    def block(weights):
        out = tokens @ shared
        for e, weight in enumerate(weights):
            out = out + gates[:, e : e + 1] * np.tanh(tokens @ weight)
        return out

    for e in range(5):
        changed = experts.copy()
        changed[e] = np.round(changed[e])
        routed = gates[:, e] > 0
        change = np.tanh(tokens[routed] @ changed[e]) - np.tanh(tokens[routed] @ experts[e])
        expected = np.linalg.norm(block(changed) - block(experts))
        assert routed_error(gates[routed, e], change) == pytest.approx(expected, rel=1e-12)
    assert routed_error(np.zeros(0), np.zeros((0, 6))) == 0


def test_granularities_nest():
    drawn = np.random.default_rng(7)
    costs = np.stack([drawn_costs(drawn, 5), drawn_costs(drawn, 5)], axis=1)
    sizes = np.tile(np.array([[2, 4, 6], [1, 2, 3]]) * 512, (5, 1, 1))
    totals = {}
    for name, rows in (("projection", 10), ("expert", 5), ("layer", 1)):
        c, s = pmq.granularity(name, costs, sizes)
        assert c.shape == s.shape == (rows, 3)
        assert c.sum() == pytest.approx(costs.sum()) and s.sum() == sizes.sum()
        totals[name] = solve([Experts(c, s)], 5 * 3 * 2 * 512 + 700)
    assert totals["projection"].cost <= totals["expert"].cost <= totals["layer"].cost
    assert totals["layer"].columns[0].tolist() == [1]
    c, s = pmq.granularity("expert", costs, sizes)
    assert np.allclose(c[3], costs[3, 0] + costs[3, 1]) and s[3].tolist() == [1536, 3072, 4608]


def test_constant_bytes_do_not_make_the_program_larger():
    """Sizes whose own common divisor is 1: what every width has in common goes first."""
    drawn = np.random.default_rng(9)
    costs = drawn_costs(drawn, 64)
    unit = 2048 * 768 // 8
    sizes = np.arange(2, 5)[None] * unit + drawn.integers(0, 10**6, (64, 1)) * 2 + 1
    start = time.process_time()
    found = solve([Experts(costs, sizes)], int(sizes.min(axis=1).sum()) + 64 * unit)
    assert time.process_time() - start < 2
    nominal = solve_average(costs, (2, 3, 4), 3.0)
    assert np.array_equal(found.columns[0] + 2, nominal)


def test_sizes_without_a_common_unit_are_refused():
    drawn = np.random.default_rng(10)
    sizes = np.sort(drawn.integers(10**8, 10**9, (64, 3)) | 1, axis=1)
    with pytest.raises(InputError, match="share no unit") as refused:
        solve([Experts(drawn_costs(drawn, 64), sizes)], int(sizes[:, 1].sum()))
    assert refused.value.code == "E465"


def test_widths_that_a_row_cannot_have():
    costs = np.array([[np.inf, 0.5, 0.1], [0.9, 0.4, 0.2], [0.6, np.inf, np.inf]])
    sizes = np.tile(np.array(WIDTHS), (3, 1))
    assert solve([Experts(costs, sizes)], 4).columns[0].tolist() == [1, 0, 0]
    assert solve([Experts(costs, sizes)], 99).columns[0].tolist() == [2, 2, 0]
    with pytest.raises(UsageError, match="between 4 and 7"):
        solve([Experts(costs, sizes)], 3)
    with pytest.raises(ValueError):
        Experts(np.full((2, 3), np.inf), sizes[:2])


@pytest.mark.slow
def test_a_large_model_takes_seconds():
    drawn = np.random.default_rng(11)
    layers = [
        Experts(drawn_costs(drawn, 128), np.tile(np.array([1, 2, 3]), (128, 1)), (1, 2)) for _ in range(48)
    ]
    start = time.process_time()
    found = solve(layers, int(2.5 * 48 * 128))
    assert time.process_time() - start < 20
    assert found.size == int(2.5 * 48 * 128)
