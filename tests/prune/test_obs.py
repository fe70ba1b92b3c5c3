"""Optimal brain surgeon: against rank-1 updates one at a time, the closed form, and trying everything."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import naive_obs

from surgeon.calibrate import damping
from surgeon.errors import InputError
from surgeon.prune import closed_form, obs
from surgeon.prune.closed_form import error_of, solve
from surgeon.prune.obs import removal_order

DAMP = 1e-2


def problem(columns=48, rows=20, tokens=200, seed=0, rank=None, dead=(), scale=1.0):
    """Return (W float32, H float64, X): correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or columns // 2, columns, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, len(mixing), generator=draw, dtype=torch.float64) @ mixing / len(mixing) ** 0.5
    if rank is None:
        x += 0.5 * torch.randn(tokens, columns, generator=draw, dtype=torch.float64)
    x *= torch.exp(0.7 * torch.randn(columns, generator=draw, dtype=torch.float64)) * scale
    x[:, list(dead)] = 0
    weight = torch.randn(rows, columns, generator=draw)
    return weight, x.T @ x / tokens, x


def exact(weight, hessian, kept, damp=DAMP):
    """Closed form by definition: W0 H[:, K] H[K, K]^-1."""
    matrix = naive_obs.damped_hessian(hessian, damp)
    return weight.double() @ matrix[:, kept] @ torch.linalg.inv(matrix[kept][:, kept])


def loss(weight, hessian, kept, damp=DAMP):
    """Damped error of a kept set by definition."""
    matrix = naive_obs.damped_hessian(hessian, damp)
    difference = -weight.double()
    if len(kept):
        difference[:, kept] += exact(weight, hessian, kept, damp)
    return float(torch.trace(difference @ matrix @ difference.T))


def by_samples(weight, x, solved, kept):
    """||(W - W0) X||^2 / ||W0 X||^2 by definition."""
    dense = x @ weight.double().T
    return float((x[:, kept] @ solved.double().T - dense).square().sum() / dense.square().sum())


def rest(order, removed):
    return sorted(int(unit) for unit in order[removed:])


# ---- order of columns --------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "shrink"), [(64, 0.8), (5, 0.95), (1, 0.5), (7, 1.1)])
def test_the_order_is_that_of_rank_one_updates_and_the_errors_are_those_of_their_weights(
    monkeypatch, block, shrink
):
    monkeypatch.setattr(obs, "BLOCK", block)
    monkeypatch.setattr(obs, "SHRINK", shrink)
    weight, hessian, x = problem()
    errors = [0.0]
    columns = list(range(48))
    order, _ = naive_obs.remove(
        weight.double(), hessian, DAMP, 48, lambda _, now: errors.append(by_samples(weight, x, now, columns))
    )
    found = removal_order(weight, hessian, damp=DAMP)
    assert found.order.tolist() == order and found.order.dtype == np.int32
    np.testing.assert_allclose(found.errors, errors, rtol=1e-9, atol=1e-12)
    assert found.errors[0] == 0 and found.errors[-1] == 1
    assert (found.precision, found.damp, found.escalated, found.dead) == ("float64", DAMP, False, 0)


def test_float32_finds_the_same_order_over_several_blocks(monkeypatch):
    monkeypatch.setattr(obs, "FLOAT64_ORDER", 0)
    weight, hessian, _ = problem(columns=300, rows=80, tokens=900)
    order, _ = naive_obs.remove(weight.double(), hessian, DAMP, 300)
    found = removal_order(weight, hessian.float(), damp=DAMP)
    assert found.precision == "float32" and found.order.tolist() == order
    assert [removed for removed, _, _ in found.checks] == [150, 225, 270]
    for _, tracked, closed in found.checks:
        assert tracked == pytest.approx(closed, rel=1e-4)
    reference = removal_order(weight, hessian, damp=DAMP, precision="float64")
    np.testing.assert_allclose(found.errors, reference.errors, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("removed", [1, 17, 40, 47])
def test_greedy_updates_end_in_the_closed_form(removed):
    weight, hessian, _ = problem()
    order, updated = naive_obs.remove(weight.double(), hessian, DAMP, removed)
    kept = sorted(set(range(48)) - set(order))
    wanted = exact(weight, hessian, kept)
    np.testing.assert_allclose(updated[:, kept], wanted, atol=1e-9)
    np.testing.assert_allclose(solve(weight.double(), hessian, kept, DAMP), wanted, atol=1e-9)


def test_the_checks_hold_the_error_of_the_closed_form():
    weight, hessian, x = problem()
    found = removal_order(weight, hessian, damp=DAMP)
    for removed, tracked, closed in found.checks:
        kept = rest(found.order, removed)
        wanted = by_samples(weight, x, exact(weight, hessian, kept), kept)
        assert closed == pytest.approx(wanted, rel=1e-9) and tracked == pytest.approx(wanted, rel=1e-9)
        assert error_of(weight, hessian, solve(weight, hessian, kept, DAMP), kept) == pytest.approx(
            wanted, 1e-5
        )
    assert len(found.checks) == 3


@pytest.mark.parametrize("seed", range(5))
def test_against_every_choice_of_one_and_two_columns(seed):
    weight, hessian, _ = problem(columns=8, rows=3, tokens=30, seed=seed)
    found = removal_order(weight, hessian, damp=DAMP)
    single = [loss(weight, hessian, [k for k in range(8) if k != j]) for j in range(8)]
    assert int(found.order[0]) == int(np.argmin(single))
    pairs = {
        pair: loss(weight, hessian, [k for k in range(8) if k not in pair])
        for pair in itertools.combinations(range(8), 2)
    }
    chosen = tuple(sorted(found.order[:2].tolist()))
    assert pairs[chosen] >= min(pairs.values()) - 1e-12
    after_first = {p: v for p, v in pairs.items() if int(found.order[0]) in p}
    assert chosen == min(after_first, key=after_first.__getitem__)


def test_nothing_is_made_up_for_when_inputs_are_uncorrelated():
    weight, hessian, _ = problem(columns=12)
    hessian = torch.diag(hessian.diagonal())
    found = removal_order(weight, hessian, damp=0.0)
    saliency = weight.double().square().sum(0) * hessian.diagonal()
    assert found.order.tolist() == saliency.argsort().tolist()
    np.testing.assert_allclose(
        found.errors[1:], saliency.sort().values.cumsum(0) / saliency.sum(), rtol=1e-12
    )
    kept = rest(found.order, 7)
    assert torch.equal(solve(weight, hessian, kept, DAMP), weight[:, kept])
    pairs = itertools.combinations(range(12), 2)
    best = min(pairs, key=lambda pair: loss(weight, hessian, [k for k in range(12) if k not in pair], 0.0))
    assert tuple(sorted(found.order[:2].tolist())) == best


def test_a_column_with_a_twin_costs_nothing_and_its_twin_takes_over():
    weight, _, x = problem(columns=10)
    x[:, 7] = x[:, 2]
    hessian = x.T @ x / len(x)
    found = removal_order(weight, hessian, damp=1e-10)
    assert int(found.order[0]) in (2, 7) and found.errors[1] < 1e-8
    stays = 7 if int(found.order[0]) == 2 else 2
    kept = rest(found.order, 1)
    solved = solve(weight, hessian, kept, 1e-10)
    np.testing.assert_allclose(solved[:, kept.index(stays)], weight[:, 2] + weight[:, 7], atol=1e-4)


def test_equal_costs_go_by_number():
    found = removal_order(torch.ones(3, 6), torch.eye(6))
    assert found.order.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(found.errors, np.arange(7) / 6, atol=1e-12)


def test_scaling_the_hessian_changes_nothing():
    weight, hessian, _ = problem()
    first, second = (removal_order(weight, hessian * factor) for factor in (1, 1e6))
    assert first.order.tolist() == second.order.tolist()
    np.testing.assert_allclose(first.errors, second.errors, rtol=1e-6, atol=1e-12)


# ---- blocks, heads, groups ---------------------------------------------------------------------


def test_blocks_of_one_are_columns():
    weight, hessian, _ = problem()
    single, blocks = removal_order(weight, hessian), removal_order(weight, hessian, 1, groups=1)
    assert blocks.order.shape == (48, 1)
    assert blocks.order[:, 0].tolist() == single.order.tolist()
    np.testing.assert_allclose(blocks.errors, single.errors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_block_costs_what_removing_it_and_solving_again_costs(precision):
    weight, hessian, x = problem()
    found = removal_order(weight, hessian.to(getattr(torch, precision)), 6, precision=precision)
    gone: list[int] = []
    for step, unit in enumerate(found.order.tolist()):
        costs = {}
        for other in set(range(8)) - set(gone):
            left = [c for u in range(8) if u not in {*gone, other} for c in range(6 * u, 6 * u + 6)]
            costs[other] = loss(weight, hessian, left)
        assert unit == min(costs, key=costs.__getitem__)
        gone.append(unit)
        kept = [c for u in range(8) if u not in gone for c in range(6 * u, 6 * u + 6)]
        if kept:
            wanted = by_samples(weight, x, exact(weight, hessian, kept), kept)
            assert found.errors[step + 1] == pytest.approx(
                wanted, rel=1e-9 if precision == "float64" else 1e-4
            )
    assert found.errors[-1] == 1


def test_permuting_heads_permutes_the_order():
    weight, hessian, _ = problem()
    shuffled = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    columns = (shuffled[:, None] * 6 + torch.arange(6)).flatten()
    before = removal_order(weight, hessian, 6)
    after = removal_order(weight[:, columns], hessian[columns][:, columns], 6)
    assert shuffled[torch.from_numpy(after.order).long()].tolist() == before.order.tolist()
    np.testing.assert_allclose(after.errors, before.errors, rtol=1e-8, atol=1e-12)


def test_every_step_takes_one_head_of_every_group_the_cheapest_that_is_left():
    weight, hessian, x = problem()
    found = removal_order(weight, hessian, 4, groups=3)  # 12 heads, 4 in each group
    assert found.order.shape == (4, 3) and found.errors.shape == (5,)
    gone: set[int] = set()
    for step, heads in enumerate(found.order.tolist()):
        assert [head // 4 for head in heads] == [0, 1, 2]
        waiting = set(heads)
        while waiting:  # heads of one step go one after the other, each after the rest made up for the last
            costs = {}
            for head in set(range(12)) - gone:
                if any(head // 4 == other // 4 for other in waiting):
                    left = [c for h in range(12) if h not in gone | {head} for c in range(4 * h, 4 * h + 4)]
                    costs[head] = loss(weight, hessian, left)
            cheapest = min(costs, key=costs.__getitem__)
            assert cheapest in waiting
            waiting.discard(cheapest)
            gone.add(cheapest)
        kept = [c for h in range(12) if h not in gone for c in range(4 * h, 4 * h + 4)]
        if kept:
            wanted = by_samples(weight, x, exact(weight, hessian, kept), kept)
            assert found.errors[step + 1] == pytest.approx(wanted, rel=1e-9)
    assert sorted(gone) == list(range(12))


# ---- dead inputs and damping ---------------------------------------------------------------------


def test_dead_inputs_go_first_cost_nothing_and_do_not_thin_the_damping():
    weight, hessian, x = problem(dead=(3, 30, 31))
    found = removal_order(weight, hessian)
    assert found.order[:3].tolist() == [3, 30, 31] and found.dead == 3
    assert (found.errors[:4] == 0).all() and found.errors[4] > 0
    live = [j for j in range(48) if j not in (3, 30, 31)]
    alone = removal_order(weight[:, live], hessian[live][:, live])
    assert [live[j] for j in alone.order] == found.order[3:].tolist()
    np.testing.assert_allclose(found.errors[3:], alone.errors, rtol=1e-12)
    assert all(tracked == pytest.approx(closed, rel=1e-9) for _, tracked, closed in found.checks)
    mean = hessian.diagonal()[live].mean()
    added = damping.shift(hessian.diagonal(), DAMP)
    np.testing.assert_allclose(added[live], DAMP * mean)
    np.testing.assert_allclose(added[3], (1 + DAMP) * mean)
    kept = [j for j in range(48) if j % 3]
    solved = solve(weight, hessian, kept)
    assert torch.equal(solved[:, kept.index(31)], weight[:, 31])  # nothing is known about it
    assert by_samples(weight, x, solved, kept) < by_samples(weight, x, weight[:, kept], kept)


def test_dead_heads_go_first_within_their_groups():
    dead = [*range(4, 8), *range(36, 40), 2, 13]
    weight, hessian, x = problem(dead=dead)
    found = removal_order(weight, hessian, 4)
    assert found.order[:2].tolist() == [1, 9] and (found.errors[:3] == 0).all() and found.errors[3] > 0
    grouped = removal_order(weight, hessian, 4, groups=3)
    assert grouped.order[0, 0] == 1 and grouped.order[0, 2] == 9
    kept = [c for row in grouped.order[1:] for h in row for c in range(4 * h, 4 * h + 4)]
    wanted = by_samples(weight, x, exact(weight, hessian, sorted(kept)), sorted(kept))
    assert grouped.errors[1] == pytest.approx(wanted, rel=1e-9)


def test_a_module_that_never_fires_is_free():
    found = removal_order(torch.ones(2, 5), torch.zeros(5, 5))
    assert found.order.tolist() == [0, 1, 2, 3, 4] and (found.errors == 0).all() and found.dead == 5
    assert removal_order(torch.ones(2, 6), torch.zeros(6, 6), 2, groups=3).order.tolist() == [[0, 1, 2]]


def test_damping_is_raised_tenfold_and_recorded():
    weight, _, _ = problem(columns=16)
    hessian = torch.eye(16, dtype=torch.float64)
    hessian[3, 4] = hessian[4, 3] = 1.05  # an eigenvalue of -0.05
    found = removal_order(weight, hessian, damp=1e-3)
    assert found.escalated and found.damp == pytest.approx(0.1)
    assert removal_order(weight, torch.eye(16), damp=1e-3).escalated is False
    assert list(damping.escalated(0.5)) == pytest.approx([0.5, 5, 50, 500, 5000])
    assert list(damping.escalated(0)) == pytest.approx([0, 1e-4, 1e-3, 1e-2, 1e-1])


def test_a_hessian_that_stays_indefinite_is_refused_by_name():
    hessian = torch.eye(4) - torch.ones(4, 4) * 0.9
    hessian.fill_diagonal_(0.1)
    weight = torch.ones(2, 4)
    for run in (
        lambda: removal_order(weight, hessian * 1.0, damp=1e-7, module="model.layers.3.mlp.down_proj"),
        lambda: solve(weight, hessian, [0, 1], 1e-7, module="model.layers.3.mlp.down_proj"),
    ):
        with pytest.raises(InputError) as caught:
            run()
        assert caught.value.code == "E314" and "model.layers.3.mlp.down_proj" in caught.value.message
        assert "--damp" in (caught.value.help or "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused_by_name(value):
    hessian = torch.eye(4)
    hessian[2, 2] = value
    with pytest.raises(InputError) as caught:
        removal_order(torch.ones(2, 4), hessian, module="h.0.mlp.c_proj")
    assert caught.value.code == "E313" and "h.0.mlp.c_proj" in caught.value.message
    hessian = torch.eye(4)
    hessian[2, 1] = hessian[1, 2] = value
    with pytest.raises(InputError) as caught:
        removal_order(torch.ones(2, 4), hessian, module="h.0.mlp.c_proj")
    assert "h.0.mlp.c_proj" in caught.value.message


@pytest.mark.parametrize("size", [1, 10])
def test_float64_takes_over_where_float32_is_not_enough(monkeypatch, size):
    monkeypatch.setattr(obs, "FLOAT64_ORDER", 0)
    weight, hessian, _ = problem(columns=200, rows=30, tokens=600, rank=60)
    found = removal_order(weight, hessian, size, damp=1e-9)
    assert found.precision == "float64" and found.damp == 1e-9 and not found.escalated
    wanted = removal_order(weight, hessian, size, damp=1e-9, precision="float64")
    assert found.order.tolist() == wanted.order.tolist()


def test_a_wrong_tracked_error_does_not_pass_the_comparison(monkeypatch):
    monkeypatch.setattr(obs, "FLOAT64_ORDER", 0)
    weight, hessian, _ = problem()
    right = obs._attempt

    def drifting(*arguments):
        found, total = right(*arguments)
        factor = 1.02 if found.precision == "float32" else 1.0
        return obs.replace(found, errors=found.errors * factor), total

    monkeypatch.setattr(obs, "_attempt", drifting)
    assert removal_order(weight, hessian.float()).precision == "float64"
    assert removal_order(weight, hessian.float(), check=False).precision == "float32"


# ---- solved weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [0.0, 1e-2, 1.0])
def test_keeping_everything_returns_the_weights_bit_for_bit(damp):
    weight, hessian, _ = problem(rank=5, dead=(4,))
    assert torch.equal(solve(weight, hessian, range(48), damp), weight)


def test_damping_pulls_towards_the_original_weights():
    weight, hessian, _ = problem()
    kept = list(range(24))
    apart = [float((solve(weight, hessian, kept, damp) - weight[:, kept]).norm()) for damp in (1e-3, 1, 1e3)]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-2 * apart[0]


def test_the_solution_is_the_minimum():
    weight, hessian, x = problem()
    kept = list(range(0, 48, 2))
    solved = solve(weight.double(), hessian, kept, 0.0)
    best = by_samples(weight, x, solved, kept)
    by_regression = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    np.testing.assert_allclose(solved, by_regression, atol=1e-8)
    assert best < by_samples(weight, x, weight[:, kept], kept)


def test_large_systems_are_solved_in_float32_and_refined(monkeypatch):
    weight, hessian, _ = problem(columns=300, rows=20, tokens=900)
    kept = list(range(0, 300, 2))
    wanted = solve(weight, hessian, kept, 1e-4)
    monkeypatch.setattr(closed_form, "FLOAT64_COLUMNS", 0)
    found = solve(weight, hessian.float(), kept, 1e-4)
    change = wanted - weight[:, kept]
    assert float((found - wanted).norm() / change.norm()) < 1e-5
    checks = removal_order(weight, hessian, damp=1e-4).checks
    assert all(tracked == pytest.approx(closed, rel=1e-4) for _, tracked, closed in checks)


def test_arguments_are_left_alone():
    weight, hessian, _ = problem(dead=(1,))
    before = weight.clone(), hessian.clone()
    removal_order(weight, hessian)
    removal_order(weight, hessian, 4, groups=3)
    solve(weight, hessian, [1, 2, 3])
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert torch.equal(damping.damped(hessian, 0.5), naive_obs.damped_hessian(hessian, 0.5))


def test_products_stay_in_float32_and_the_setting_is_given_back():
    torch.set_float32_matmul_precision("medium")
    try:
        with damping.exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [1, 8])
def test_a_gpu_finds_the_same(size):
    weight, hessian, _ = problem(columns=512, rows=64, tokens=2000)
    here = removal_order(weight, hessian.float(), size)
    there = removal_order(weight.cuda(), hessian.float().cuda(), size)
    assert here.order.tolist() == there.order.tolist()
    np.testing.assert_allclose(here.errors, there.errors, rtol=1e-6, atol=1e-9)
    kept = rest(here.order, 300) if size == 1 else list(range(0, 512, 2))
    np.testing.assert_allclose(
        solve(weight.cuda(), hessian.float().cuda(), kept).cpu(),
        solve(weight, hessian.float(), kept),
        atol=1e-5,
    )
