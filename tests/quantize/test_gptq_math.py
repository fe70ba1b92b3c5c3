"""GPTQ: against the paper's recursion with the inverse, every combination of codes, and its own identities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from surgeon.errors import InputError
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import columns, gptq, rtn
from surgeon.quantize import factor as factors
from surgeon.quantize.grids import grid, round_to_grid
from surgeon.quantize.output_error import relative

ORDERS = ("none", "static-act", "group-aware")


def problem(inputs=64, outputs=24, tokens=400, seed=0, dtype=torch.float64):
    """Return (W, X): correlated inputs of very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs // 2 or 1, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, len(mixing), generator=draw, dtype=torch.float64) @ mixing / len(mixing) ** 0.5
    x += 0.3 * torch.randn(tokens, inputs, generator=draw, dtype=torch.float64)
    x *= torch.exp(0.5 * torch.randn(inputs, generator=draw, dtype=torch.float64))
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    return weight.to(dtype), x.to(dtype)


def scheme(bits=4, group=16, symmetric=True):
    return Scheme("int", bits, group, symmetric)


def quantize(weight, hessian, wanted, **options):
    return gptq.quantize(weight, hessian, wanted, **({"scale_dtype": "F32", "clip": False} | options))


def exact_values(made: Codes) -> torch.Tensor:
    """What codes stand for, float64 (Codes.values rounds to float32)."""
    repeat = made.group
    scales = torch.from_numpy(made.scales).double().repeat_interleave(repeat, 1)
    zeros = torch.from_numpy(made.zeros).double().repeat_interleave(repeat, 1)
    return (torch.from_numpy(made.codes).double() - zeros) * scales


def trace(difference, hessian):
    return float(torch.trace(difference @ hessian @ difference.T))


def paper(weight, hessian, scales, zeros, bits, group, order, damp=0.01):
    """Algorithm 1 of the paper with static groups, one column at a time, the factor of the inverse; codes and error."""
    order = torch.as_tensor(order)
    matrix = hessian[order][:, order].clone()
    matrix.diagonal().add_(damp * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
    work = weight[:, order].clone()
    codes = torch.zeros_like(weight)
    total = 0.0
    for place, column in enumerate(order.tolist()):
        scale, zero = scales[:, column // group], zeros[:, column // group].double()
        code = (torch.round(work[:, place] / scale) + zero).clamp(0, 2**bits - 1)
        error = (work[:, place] - (code - zero) * scale) / upper[place, place]
        work[:, place:] -= error[:, None] * upper[place, place:]
        codes[:, column] = code
        total += float(error.square().sum())
    return codes.numpy().astype(np.uint8), total


def plain_order(diagonal, order, group):
    """The order of rounding in plain Python."""
    energy = diagonal.tolist()
    if order == "none":
        return list(range(len(energy)))
    if order == "static-act":
        return sorted(range(len(energy)), key=lambda j: (-energy[j], j))
    parts = [
        sorted(range(start, start + group), key=lambda j: (-energy[j], j))
        for start in range(0, len(energy), group)
    ]
    return [j for part in sorted(parts, key=lambda part: (-energy[part[0]], part[0] // group)) for j in part]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False), (8, True)])
def test_codes_are_those_of_the_paper(order, bits, symmetric):
    weight, x = problem()
    hessian = x.T @ x
    wanted = scheme(bits, 16, symmetric)
    scales, zeros = grid(weight, wanted, clip=False, scale_dtype="F32")
    made, record = quantize(weight, hessian, wanted, order=order)
    codes, total = paper(weight, hessian, scales, zeros, bits, 16, plain_order(hessian.diagonal(), order, 16))
    assert (made.codes == codes).all()
    assert record.damped_error == pytest.approx(total, rel=1e-9)
    assert (record.method, record.order, record.damp, record.escalated) == ("gptq", order, 0.01, False)


@pytest.mark.parametrize("order", ORDERS)
def test_loss_is_the_trace(order):
    weight, x = problem()
    hessian = x.T @ x
    made, record = quantize(weight, hessian, scheme(), order=order)
    difference = exact_values(made) - weight
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert record.damped_error == pytest.approx(trace(difference, damped), rel=1e-12)
    assert record.error == pytest.approx(trace(difference, hessian), rel=1e-11)
    assert record.error == pytest.approx(float((x @ difference.T).square().sum()), rel=1e-11)
    assert made.loss == pytest.approx(record.error / float((x @ weight.T).square().sum()), rel=1e-11)


def test_float32_gives_the_codes_of_float64_and_the_loss_of_its_codes():
    weight, x = problem(inputs=256, outputs=32, tokens=1500)
    hessian = x.T @ x
    weight = weight.float().double()
    wide, exact = quantize(weight, hessian, scheme(4, 64))
    narrow, record = quantize(weight.float(), hessian.float(), scheme(4, 64))
    assert (wide.codes != narrow.codes).mean() < 2e-3  # a tie that falls the other way takes a row with it
    assert record.error == pytest.approx(exact.error, rel=5e-3)
    assert record.error == pytest.approx(trace(exact_values(narrow) - weight, hessian), rel=1e-4)
    assert narrow.loss == pytest.approx(relative(narrow, weight, hessian), rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_independent_inputs_are_rounded_to_nearest(order, bits):
    weight, x = problem(dtype=torch.float32)
    hessian = torch.diag(x.square().sum(0))
    nearest = rtn.quantize(weight, scheme(bits), scale_dtype="BF16")
    made, _ = quantize(weight, hessian, scheme(bits), order=order, scale_dtype="BF16", clip=None)
    assert (made.codes == nearest.codes).all() and (made.scales == nearest.scales).all()


def test_the_scale_of_the_hessian_does_not_matter():
    weight, x = problem(dtype=torch.float32)
    hessian = x.T @ x
    first, _ = quantize(weight, hessian, scheme())
    for factor in (2.0**-40, 1 / 512, 2.0**30):
        made, record = quantize(weight, hessian * factor, scheme())
        assert (made.codes == first.codes).all() and made.loss == pytest.approx(first.loss, rel=1e-6)
        assert record.damp == 0.01


def test_no_choice_of_codes_is_better_than_the_best_of_all():
    """Two bits, four inputs: 256 combinations. The order of the means is optimum < GPTQ < rounding to nearest."""
    means = np.zeros(3)
    codes = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64)
    for seed in range(30):
        weight, x = problem(inputs=4, outputs=1, tokens=32, seed=seed)
        hessian = x.T @ x
        wanted = scheme(2, -1)
        scales, zeros = grid(weight, wanted, clip=False, scale_dtype="F32")
        every = (codes - zeros.double()) * scales - weight
        optimum = float(torch.einsum("ni,ij,nj->n", every, hessian, every).min())
        _, record = quantize(weight, hessian, wanted)
        nearest = trace(exact_values(round_to_grid(weight, scales, zeros, wanted)) - weight, hessian)
        assert optimum <= record.error * (1 + 1e-9)
        means += np.array([optimum, record.error, nearest]) / float((x @ weight.T).square().sum())
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_on_the_given_grid_stay(order, bits):
    draw = np.random.default_rng(bits)
    _, x = problem(dtype=torch.float32)
    scales = torch.from_numpy(draw.uniform(0.01, 0.1, (24, 4)).astype(np.float32))
    zeros = torch.full((24, 4), 2 ** (bits - 1), dtype=torch.uint8)
    before = Codes(
        scheme(bits), draw.integers(0, 2**bits, (24, 64), dtype=np.uint8), scales.numpy(), zeros.numpy()
    )
    factor = gptq.factorise(x.T @ x, order=order, group=16)
    made, record = gptq.quantize_with(
        torch.from_numpy(before.values()), factor, scheme(bits), scale_dtype="F32", given=(scales, zeros)
    )
    assert (made.codes == before.codes).all() and record.error == 0 and made.loss == 0


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_do_not_show(order):
    weight, x = problem(inputs=192)
    hessian = x.T @ x
    first, exact = quantize(weight, hessian, scheme(), order=order, block=1)
    for block in (7, 32, 128, 192, 500):
        made, record = quantize(weight, hessian, scheme(), order=order, block=block)
        assert (made.codes == first.codes).all()
        assert record.damped_error == pytest.approx(exact.damped_error, rel=1e-11)


def test_inputs_in_another_order_give_codes_in_another_order():
    weight, x = problem()
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    same = {}
    for order in ("static-act", "none"):
        first, _ = quantize(weight, x.T @ x, scheme(4, -1), order=order)
        y = x[:, shuffled]
        second, _ = quantize(weight[:, shuffled], y.T @ y, scheme(4, -1), order=order)
        same[order] = (first.codes[:, shuffled.numpy()] == second.codes).all()
    assert same["static-act"] and not same["none"]


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order):
    diagonal = torch.tensor([3.0, 1, 5, 5, 2, 9, 3, 0, 4, 4, 4, 9])
    found = factors.order_of(diagonal, order, 4).tolist()
    assert found == plain_order(diagonal, order, 4) and sorted(found) == list(range(12))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_rounding_to_nearest_on_other_tokens(bits):
    weight, x = problem(inputs=128, outputs=64, tokens=6000, dtype=torch.float32)
    train, test = x[:3000].T @ x[:3000], x[3000:].T @ x[3000:]
    nearest = relative(rtn.quantize(weight, scheme(bits, 32), scale_dtype="BF16", clip=True), weight, test)
    found = {}
    for order in ORDERS:
        made, _ = quantize(weight, train, scheme(bits, 32), order=order, scale_dtype="BF16", clip=True)
        found[order] = relative(made, weight, test) / nearest
    assert found["static-act"] < found["group-aware"] < found["none"] < 0.8


class TestDeadInputs:
    def hessian(self):
        weight, x = problem(dtype=torch.float32)
        x[:, [3, 40]] = 0
        return weight, x.T @ x

    def test_weights_become_zero_and_do_not_stretch_the_grid(self):
        weight, hessian = self.hessian()
        weight[:, 3] = 50
        for symmetric in (True, False):
            made, record = quantize(weight, hessian, scheme(4, 16, symmetric))
            assert record.dead == 2 and (made.values()[:, [3, 40]] == 0).all()
            assert made.scales.max() < 1

    def test_the_others_are_quantized_as_if_they_were_not_there(self):
        """Damping is the mean over live inputs: two dead ones of 64 must not change it."""
        weight, hessian = self.hessian()
        live = [j for j in range(64) if j not in (3, 40)]
        weight[:, [3, 40]] = 0
        wanted = scheme(4, -1)
        made, record = quantize(weight.double(), hessian.double(), wanted)
        alone, other = quantize(weight[:, live].double(), hessian[live][:, live].double(), wanted)
        assert (made.codes[:, live] == alone.codes).all()
        assert record.error == pytest.approx(other.error, rel=1e-9)


class TestFallback:
    def indefinite(self):
        weight, x = problem(dtype=torch.float32)
        hessian = x.T @ x
        hessian[0, 1] = hessian[1, 0] = 100 * hessian.diagonal().max()
        return weight, hessian

    def test_damping_is_raised_tenfold_until_it_is_enough(self):
        weight, x = problem(dtype=torch.float64)
        hessian = x.T @ x
        mean = hessian.diagonal().mean()
        lowest = torch.linalg.eigvalsh(hessian)[0]
        hessian.diagonal().sub_(lowest + 0.05 * mean)  # smallest eigenvalue is now -0.05 of the old mean
        _, record = quantize(weight, hessian, scheme())
        ratio = float(0.05 * mean / hessian.diagonal().mean())
        assert 0.01 < ratio < 0.1
        assert record.damp == pytest.approx(0.1) and record.escalated and record.method == "gptq"

    def test_a_hessian_beyond_repair_means_rounding_to_nearest_and_says_so(self):
        weight, hessian = self.indefinite()
        made, record = quantize(weight, hessian, scheme())
        nearest = rtn.quantize(weight, scheme(), scale_dtype="F32", clip=False)
        assert (made.codes == nearest.codes).all()
        assert record.method == "rtn" and "not positive definite" in record.fallback
        assert record.damp == pytest.approx(10) and record.escalated
        assert np.isnan(record.damped_error) and np.isfinite(made.loss)

    def test_three_escalations_are_all(self):
        tried = []
        weight, hessian = self.indefinite()
        original = factors._factored
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(factors, "_factored", lambda *a: (tried.append(float(a[2][5])), original(*a))[1])
            quantize(weight, hessian, scheme(), damp=0.02)
        assert np.array(tried) / tried[0] == pytest.approx([1, 10, 100, 1000])


class TestRefusals:
    def test_no_token(self):
        weight, _ = problem(dtype=torch.float32)
        with pytest.raises(InputError, match=r"no calibration token reached a\.b") as caught:
            quantize(weight, torch.zeros(64, 64), scheme(), module="a.b")
        assert caught.value.code == "E452"

    @pytest.mark.parametrize("where", [(0, 0), (3, 9)])
    def test_nan_in_the_hessian(self, where):
        weight, x = problem(dtype=torch.float32)
        hessian = x.T @ x
        hessian[where] = float("nan")
        with pytest.raises(InputError, match=r"the Hessian of a\.b holds a NaN") as caught:
            quantize(weight, hessian, scheme(), module="a.b")
        assert caught.value.code == "E451"

    def test_nan_in_the_weights(self):
        weight, x = problem(dtype=torch.float32)
        weight[0, 0] = float("inf")
        with pytest.raises(InputError, match="E451"):
            quantize(weight, x.T @ x, scheme())

    def test_group_that_does_not_divide(self):
        weight, x = problem(dtype=torch.float32)
        with pytest.raises(InputError, match="E450"):
            quantize(weight, x.T @ x, scheme(4, 48), order="group-aware")

    def test_a_factor_for_other_groups(self):
        weight, x = problem(dtype=torch.float32)
        factor = gptq.factorise(x.T @ x, order="group-aware", group=16)
        with pytest.raises(ValueError, match="made for another"):
            gptq.quantize_with(weight, factor, scheme(4, 32), scale_dtype="F32")


def test_one_factor_serves_several_matrices_and_widths():
    weight, x = problem(outputs=40, dtype=torch.float32)
    hessian = x.T @ x
    before = hessian.clone()
    factor = gptq.factorise(hessian)
    for rows, bits in itertools.product((slice(0, 10), slice(10, 40)), (2, 4, 8)):
        shared, _ = gptq.quantize_with(weight[rows], factor, scheme(bits), scale_dtype="F32", clip=False)
        alone, _ = quantize(weight[rows], hessian, scheme(bits))
        assert (shared.codes == alone.codes).all() and shared.loss == alone.loss
    assert torch.equal(hessian, before)


def test_weights_and_hessian_stay_as_they_are():
    weight, x = problem(dtype=torch.float32)
    hessian = x.T @ x
    hessian[3] = hessian[:, 3] = 0
    kept = weight.clone(), hessian.clone()
    quantize(weight, hessian, scheme())
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compiled_columns_give_the_same_bits(bits, symmetric, monkeypatch):
    """Outputs that are no multiple of the lanes, a last block that is short, more than one thread."""
    pytest.importorskip("numba")
    weight, x = problem(inputs=160, outputs=600, tokens=500, dtype=torch.float32)
    factor = gptq.factorise(x.T @ x)
    results = []
    for forced, threads in ((False, 1), (True, 1), (True, 3)):
        monkeypatch.setattr(columns, "_forced", forced)
        assert (columns.runner(weight) is not columns.sweep) == forced
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(
                gptq.quantize_with(weight, factor, scheme(bits, 32, symmetric), scale_dtype="BF16", block=96)
            )
    assert not columns._broken
    for made, record in results[1:]:
        assert (made.codes == results[0][0].codes).all() and record == results[0][1]


def test_without_numba_torch_does_it(monkeypatch):
    weight, x = problem(dtype=torch.float32)
    wanted, _ = quantize(weight, x.T @ x, scheme())

    def missing():
        raise ImportError("no numba")

    monkeypatch.setattr(columns, "_forced", True)
    monkeypatch.setattr(columns, "_broken", False)
    monkeypatch.setattr(columns, "_compiled", missing)
    made, _ = quantize(weight, x.T @ x, scheme())
    assert columns._broken and (made.codes == wanted.codes).all()
