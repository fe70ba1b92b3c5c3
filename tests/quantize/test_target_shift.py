"""The moved target: against least squares, and on tokens nobody has seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.formats.scheme import Scheme
from surgeon.quantize import gptq
from surgeon.quantize.moments import Moments, held_out
from surgeon.quantize.target_shift import choose_amount, error, shifted

INPUTS, OUTPUTS = 64, 24
SCHEME = Scheme("int", 4, 32)


def streams(tokens, seed=0, noise=0.1):
    """Return (x, x0): what a matrix is fed by a quantized prefix, and by the original, float64."""
    shape = torch.Generator().manual_seed(5)
    mixing = torch.randn(INPUTS // 2, INPUTS, generator=shape, dtype=torch.float64) / (INPUTS // 2) ** 0.5
    drift = torch.randn(INPUTS, INPUTS, generator=shape, dtype=torch.float64) / INPUTS**0.5
    draw = torch.Generator().manual_seed(seed)
    original = torch.randn(tokens, INPUTS // 2, generator=draw, dtype=torch.float64) @ mixing
    original += 0.3 * torch.randn(tokens, INPUTS, generator=draw, dtype=torch.float64)
    return original + noise * original @ drift, original


def weights():
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def accumulated(x, x0):
    found = Moments.empty(INPUTS, cross=True)
    found.add(x, original=x0)
    return found


@pytest.mark.parametrize("order", ["none", "static-act", "group-aware"])
@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_it_is_the_formula(order, amount):
    x, x0 = streams(300)
    hessian, cross, weight = x.T @ x, (x0 - x).T @ x, weights()
    factor = gptq.factorise(hessian, order=order, group=32, dtype=torch.float64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    wanted = weight + amount * weight @ cross @ torch.linalg.inv(damped)
    assert shifted(weight, cross, factor, amount).numpy() == pytest.approx(wanted.numpy(), rel=1e-9, abs=1e-9)


def test_without_damping_it_is_least_squares():
    x, x0 = streams(300)
    factor = gptq.factorise(x.T @ x, damp=1e-12, dtype=torch.float64)
    found = shifted(weights(), (x0 - x).T @ x, factor)
    wanted = torch.linalg.lstsq(x, x0 @ weights().T).solution.T
    assert found.numpy() == pytest.approx(wanted.numpy(), rel=1e-6, abs=1e-7)


def test_equal_streams_move_nothing():
    x, _ = streams(300)
    factor = gptq.factorise(x.T @ x, dtype=torch.float64)
    assert torch.equal(shifted(weights(), torch.zeros(INPUTS, INPUTS), factor), weights())
    x0 = x + 1
    assert torch.equal(shifted(weights(), (x0 - x).T @ x, factor, 0.0), weights())


def test_an_invertible_map_before_is_undone():
    _, x0 = streams(500)
    draw = torch.Generator().manual_seed(3)
    mapping = torch.eye(INPUTS, dtype=torch.float64)
    mapping += 0.05 * torch.randn(INPUTS, INPUTS, generator=draw, dtype=torch.float64)
    x = x0 @ mapping
    outputs = x0 @ weights().T
    factor = gptq.factorise(x.T @ x, damp=1e-9, dtype=torch.float64)
    target = shifted(weights(), (x0 - x).T @ x, factor)
    left = {}
    for name, matrix in (("shifted", target), ("as it is", weights())):
        made, _ = gptq.quantize_with(matrix, factor, Scheme("int", 8, 32), scale_dtype="F32")
        values = torch.from_numpy(made.values()).double()
        left[name] = float((x @ values.T - outputs).square().sum() / outputs.square().sum())
    assert left["shifted"] < 1e-4 and left["as it is"] > 0.05


def test_the_error_is_that_of_the_outputs():
    x, x0 = streams(300)
    weight = weights().float()
    draw = torch.Generator().manual_seed(1)
    values = weight + 0.05 * torch.randn(weight.shape, generator=draw)
    exact = (x @ values.double().T - x0 @ weight.double().T).square().sum()
    constant = ((x0 - x) @ weight.double().T).square().sum()
    assert error(values, weight, accumulated(x, x0)) == pytest.approx(float(exact - constant), rel=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_further_the_better_on_other_tokens(bits):
    x, x0 = streams(4000, seed=1)
    seen, wanted = streams(4000, seed=2)
    weight = weights().float()
    outputs = wanted @ weight.double().T
    sums = accumulated(x, x0)
    assert sums.cross is not None
    factor = gptq.factorise(sums.hessian)
    errors = []
    for amount in (0.0, 0.5, 1.0):
        target = shifted(weight, sums.cross, factor, amount)
        made, _ = gptq.quantize_with(target, factor, Scheme("int", bits, 32), scale_dtype="BF16")
        values = torch.from_numpy(made.values()).double()
        errors.append(float((seen @ values.T - outputs).square().sum() / outputs.square().sum()))
    assert errors[0] > errors[1] > errors[2]


def test_the_grid_follows_the_target():
    x, x0 = streams(400)
    factor = gptq.factorise(x.T @ x)
    weight = weights().float()
    target = shifted(weight, 30 * ((x0 - x).T @ x), factor)  # far outside the old range
    made, _ = gptq.quantize_with(target, factor, SCHEME, scale_dtype="F32", clip=False)
    step = made.scales.max()
    assert target.abs().max() > 1.5 * weight.abs().max()
    assert step == pytest.approx(float(target.abs().max()) * 2 / 15, rel=1e-5)


def test_inputs_that_are_dead_take_no_part():
    x, x0 = streams(300)
    x[:, 7] = 0
    hessian, cross = x.T @ x, (x0 - x).T @ x
    factor = gptq.factorise(hessian, dtype=torch.float64)
    found = shifted(weights(), cross, factor)
    assert torch.equal(found[:, 7], weights()[:, 7])
    live = [j for j in range(INPUTS) if j != 7]
    small = hessian[live][:, live]
    small = small + 0.01 * small.diagonal().mean() * torch.eye(INPUTS - 1, dtype=torch.float64)
    wanted = weights()[:, live] + weights() @ cross[:, live] @ torch.linalg.inv(small)
    assert found[:, live].numpy() == pytest.approx(wanted.numpy(), rel=1e-8, abs=1e-8)


def test_without_a_factor_the_target_stays():
    x, x0 = streams(300)
    hessian = x.T @ x
    hessian[0, 1] = hessian[1, 0] = 100 * hessian.diagonal().max()
    factor = gptq.factorise(hessian)
    assert factor.unit is None
    assert torch.equal(shifted(weights(), (x0 - x).T @ x, factor), weights())


class TestAmount:
    def parts(self, tokens, noise=0.1, independent=False):
        x, x0 = streams(tokens, noise=noise)
        if independent:  # nothing to be learned from the tokens seen
            draw = torch.Generator().manual_seed(8)
            x = x0 + 0.5 * torch.randn(x0.shape, generator=draw, dtype=torch.float64)
        parts = Moments.empty(INPUTS, cross=True), Moments.empty(INPUTS, cross=True)
        for number, here in enumerate(np.array_split(np.arange(tokens), 8)):
            parts[held_out(number)].add(x[here], original=x0[here])
        return parts

    def test_by_the_samples_held_out(self):
        train, held = self.parts(160)
        amount, errors = choose_amount([weights().float()], train, held, SCHEME, scale_dtype="BF16")
        assert train.cross is not None
        factor = gptq.factorise(train.hessian)
        for tried, found in errors.items():
            target = shifted(weights().float(), train.cross, factor, tried)
            made, _ = gptq.quantize_with(target, factor, SCHEME, scale_dtype="BF16")
            values = torch.from_numpy(made.values())
            assert found == pytest.approx(error(values, weights().float(), held), rel=1e-5)
        assert errors[amount] == min(errors.values()) and amount > 0

    def test_what_does_not_carry_over_is_not_used_in_full(self):
        train, held = self.parts(40, independent=True)
        amount, errors = choose_amount([weights().float()], train, held, SCHEME, scale_dtype="BF16")
        assert amount < 1 and errors[amount] <= errors[0.0]

    def test_all_the_way_with_many_tokens_and_none_without_a_sample_to_try_it_on(self):
        train, held = self.parts(4 * INPUTS)
        assert choose_amount([weights()], train, held, SCHEME, scale_dtype="BF16") == (1.0, {})
        train, _ = self.parts(60)
        nothing = Moments.empty(INPUTS, cross=True)
        assert choose_amount([weights()], train, nothing, SCHEME, scale_dtype="BF16") == (0.0, {})
