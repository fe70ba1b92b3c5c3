"""Rounding to nearest: every code is the best there is, weights on a grid stay, and the stored form tells the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import rtn
from surgeon.quantize.grids import round_to_grid
from surgeon.quantize.output_error import energy, relative


def weights(rows=5, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_no_other_code_is_nearer(bits, symmetric):
    weight = weights()
    made = rtn.quantize(weight, Scheme("int", bits, 32, symmetric), scale_dtype="BF16")
    scales = np.repeat(made.scales, 32, axis=1)[..., None].astype(np.float64)
    zeros = np.repeat(made.zeros, 32, axis=1)[..., None].astype(np.float64)
    choices = (np.arange(2**bits) - zeros) * scales
    best = np.abs(choices - weight.numpy()[..., None]).min(-1)
    assert np.abs(made.values() - weight.numpy()) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_the_grid_keep_their_codes(bits, symmetric):
    """The same grid is given again: one made anew from these weights would be another."""
    draw = np.random.default_rng(bits)
    scheme = Scheme("int", bits, 16, symmetric)
    codes = draw.integers(0, 2**bits, (8, 64), dtype=np.uint8)
    scales = torch.from_numpy(draw.uniform(0.001, 0.1, (8, 4)).astype(np.float32)).bfloat16().float()
    zeros = torch.full((8, 4), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.from_numpy(draw.integers(0, 2**bits, (8, 4), dtype=np.uint8))
    before = Codes(scheme, codes, scales.numpy(), zeros.numpy())
    after = round_to_grid(torch.from_numpy(before.values()), scales, zeros, scheme)
    assert (after.codes == codes).all() and (after.values() == before.values()).all()


def test_ties_go_to_the_even_multiple():
    scheme = Scheme("int", 4, -1)
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 9.0, -9.0]])
    made = round_to_grid(weight, torch.ones(1, 1), torch.full((1, 1), 8, dtype=torch.uint8), scheme)
    assert (made.codes.astype(int) - 8).tolist() == [[0, 2, 2, 0, -2, -2, 7, -8]]


def test_two_and_three_bits_are_clipped_unless_told():
    weight = weights(rows=16)
    for bits in (2, 3, 4, 8):
        scheme = Scheme("int", bits, 32)
        plain, default, clipped = (
            rtn.quantize(weight, scheme, scale_dtype="F32", clip=clip) for clip in (False, None, True)
        )
        wanted = clipped if bits <= 3 else plain
        assert (default.scales == wanted.scales).all() and (default.codes == wanted.codes).all()
        error = [np.square(made.values() - weight.numpy()).sum() for made in (plain, clipped)]
        assert error[1] <= error[0]


def test_the_error_is_that_of_the_stored_scales():
    """With scales in bfloat16 the file's error is larger than one computed with unrounded scales; it must be the former."""
    weight, hessian = weights(rows=32), torch.eye(64)
    made = rtn.quantize(weight, Scheme("int", 8, 64), scale_dtype="BF16")
    assert (made.scales == torch.from_numpy(made.scales).bfloat16().float().numpy()).all()
    by_hand = np.square(made.values() - weight.numpy()).sum() / np.square(weight.numpy()).sum()
    assert relative(made, weight, hessian) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("columns", [1, 96, 512, 700])
def test_energy_is_the_trace(columns):
    draw = torch.Generator().manual_seed(columns)
    weight = torch.randn(7, columns, generator=draw, dtype=torch.float64)
    root = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    hessian = root @ root.T
    before = hessian.clone()
    assert energy(weight, hessian) == pytest.approx(
        float(torch.trace(weight @ hessian @ weight.T)), rel=1e-12
    )
    assert torch.equal(hessian, before)


def test_a_matrix_of_zeros_has_no_error():
    made = rtn.quantize(torch.zeros(3, 32), Scheme("int", 4, 32), scale_dtype="F16")
    assert relative(made, torch.zeros(3, 32), torch.eye(32)) == 0
