"""Grids: against plain-Python loops over every group, and at the edges of types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.errors import InputError
from surgeon.formats.scheme import Scheme
from surgeon.quantize import grids
from surgeon.quantize.grids import SHRUNK, grid, round_to_grid

BITS = (2, 3, 4, 5, 6, 7, 8)
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def weights(rows=6, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def scheme(bits=4, group=16, symmetric=True):
    return Scheme("int", bits, group, symmetric)


def stored(value: np.float32, code: str) -> np.float32:
    return np.float32(torch.tensor(value).to(TYPES[code]).float().item())


def plain_grid(values, bits, symmetric, code, part=1.0):
    """Scale and zero point of one group, by definition, for groups that are not near zero."""
    top = 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    if symmetric:
        return stored(np.float32(2 * max(-low, high) * part / top), code), (top + 1) // 2
    scale = stored(np.float32((high - low) * part / top), code)
    return scale, min(max(round(float(np.float32(-low * part) / scale)), 0), top)


def plain_error(values, scale, zero, bits, importance):
    total = 0.0
    for value, share in zip(values, importance, strict=True):
        code = min(max(round(value / float(scale)) + zero, 0), 2**bits - 1)
        total += share * ((code - zero) * float(scale) - value) ** 2
    return total


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_whole_range_is_that_of_the_definition(bits, symmetric, code):
    weight = weights()
    scales, zeros = grid(weight, scheme(bits, 16, symmetric), clip=False, scale_dtype=code)
    assert scales.shape == zeros.shape == (6, 4)
    for row in range(6):
        for number in range(4):
            group = weight[row, 16 * number : 16 * number + 16].tolist()
            scale, zero = plain_grid(group, bits, symmetric, code)
            assert scales[row, number].item() == pytest.approx(float(scale), rel=4e-7 if code == "F32" else 0)
            assert int(zeros[row, number]) == zero


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_finds_the_least_error_of_all_candidates(bits, symmetric, weighted):
    weight = weights(rows=3, columns=32, seed=bits)
    weight[0, 3] = 0.3  # an outlier worth cutting
    importance = torch.linspace(0.1, 3, 32) if weighted else None
    wanted = scheme(bits, 16, symmetric)
    scales, zeros = grid(weight, wanted, clip=True, scale_dtype="BF16", importance=importance)
    chosen = []
    for row in range(3):
        for number in range(2):
            here = slice(16 * number, 16 * number + 16)
            group = weight[row, here].tolist()
            shares = importance[here].tolist() if importance is not None else [1.0] * 16
            tried = [
                plain_error(group, *plain_grid(group, bits, symmetric, "BF16", part), bits, shares)
                for part in SHRUNK
            ]
            found = plain_error(group, scales[row, number].item(), int(zeros[row, number]), bits, shares)
            assert found == pytest.approx(min(tried), rel=1e-4)
            chosen.append(tried.index(min(tried)))
    assert bits > 3 or max(chosen) > 10  # the search had something to find


def test_the_search_goes_on_while_one_group_gains():
    """A group that is exact at once shares a piece with one that wants a much smaller range."""
    exact = torch.tensor([0.0, 3.0]).repeat(32)[None]
    wide = weights(1, 64)
    wanted = scheme(2, 64, False)
    alone = [grid(part, wanted, clip=True, scale_dtype="F32")[0].item() for part in (exact, wide)]
    together = grid(torch.cat([exact, wide]), wanted, clip=True, scale_dtype="F32")[0]
    whole = grid(wide, wanted, clip=False, scale_dtype="F32")[0].item()
    assert together[:, 0].tolist() == alone
    assert alone[0] == 1 and alone[1] < 0.9 * whole


@pytest.mark.parametrize("code", TYPES)
def test_scales_are_what_their_type_can_hold(code):
    scales, _ = grid(weights(), scheme(), clip=True, scale_dtype=code)
    assert torch.equal(scales, scales.to(TYPES[code]).float())


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_weight_of_a_symmetric_group_misses_by_half_a_step(bits):
    weight = torch.zeros(1, 16)
    weight[0, 5] = 1.0
    made = round_to_grid(weight, *grid(weight, scheme(bits), clip=False, scale_dtype="F32"), scheme(bits))
    assert made.codes[0, 5] == 2**bits - 1
    assert 1 - made.values()[0, 5] == pytest.approx(made.scales[0, 0] / 2, rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_grids_hold_zero_and_both_ends(bits):
    weight = weights().abs() + 0.01  # zero lies outside the weights
    weight[:, 0] = 0
    wanted = scheme(bits, 16, False)
    made = round_to_grid(weight, *grid(weight, wanted, clip=False, scale_dtype="F32"), wanted)
    assert (made.values()[:, 0] == 0).all() and (made.zeros == 0).all()
    assert np.abs(made.values() - weight.numpy()).max() <= made.scales.max() * 0.5001


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("symmetric", "middle"), [(True, 8), (False, 0)])
def test_groups_of_zeros(symmetric, middle, clip):
    weight = weights()
    weight[2, 16:32] = 0
    wanted = scheme(4, 16, symmetric)
    scales, zeros = grid(weight, wanted, clip=clip, scale_dtype="F16")
    assert scales[2, 1] == 1 and zeros[2, 1] == middle
    made = round_to_grid(weight, scales, zeros, wanted)
    assert (made.codes[2, 16:32] == middle).all() and (made.values()[2, 16:32] == 0).all()


@pytest.mark.parametrize(("code", "floor"), [("F16", 2.0**-14), ("BF16", 1e-8), ("F32", 1e-8)])
def test_scales_stay_normal_numbers(code, floor):
    weight = torch.full((1, 16), 1e-12)
    scales, zeros = grid(weight, scheme(), clip=True, scale_dtype=code)
    assert scales.item() == pytest.approx(floor, rel=0.004)
    assert scales.item() >= torch.finfo(TYPES[code]).tiny
    assert (round_to_grid(weight, scales, zeros, scheme()).values() == 0).all()


def test_scales_beyond_float16_are_refused():
    weight = torch.full((1, 16), 1e6)
    with pytest.raises(InputError, match="beyond the range of F16") as caught:
        grid(weight, scheme(), clip=False, scale_dtype="F16", module="big.weight")
    assert caught.value.code == "E453" and "big.weight" in str(caught.value)
    grid(weight, scheme(), clip=False, scale_dtype="BF16")


@pytest.mark.parametrize(("columns", "group", "help"), [(96, 64, "32"), (24, 32, "-1")])
def test_inputs_that_do_not_divide_are_refused(columns, group, help):
    with pytest.raises(InputError, match=rf"a\.b has {columns} inputs.*group size {group}") as caught:
        grid(weights(2, columns), scheme(4, group), clip=False, scale_dtype="F32", module="a.b")
    assert caught.value.code == "E450" and f"--group-size {help}" in str(caught.value.help)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_by_name(value):
    weight = weights()
    weight[1, 2] = value
    with pytest.raises(InputError, match=r"a\.b holds a NaN") as caught:
        grid(weight, scheme(), clip=False, scale_dtype="F32", module="a.b")
    assert caught.value.code == "E451"


def test_other_kinds_and_widths_are_not_grids():
    for wrong in (Scheme("int", 9), Scheme("int", 1), Scheme("nf4", 4)):
        with pytest.raises(ValueError, match="not a grid"):
            grid(weights(), wrong, clip=False, scale_dtype="F32")


def test_a_row_can_be_one_group():
    weight = weights()
    scales, _ = grid(weight, scheme(4, -1), clip=False, scale_dtype="F32")
    assert torch.allclose(scales[:, 0], weight.abs().amax(1) * 2 / 15)


def test_pieces_do_not_show(monkeypatch):
    weight = weights(rows=37)
    whole = grid(weight, scheme(), clip=True, scale_dtype="BF16")
    codes = round_to_grid(weight, *whole, scheme()).codes
    monkeypatch.setattr(grids, "PIECE", 5 * 64)
    parts = grid(weight, scheme(), clip=True, scale_dtype="BF16")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert (round_to_grid(weight, *parts, scheme()).codes == codes).all()


def test_bfloat16_weights_are_computed_in_float32():
    weight = weights().bfloat16()
    narrow = grid(weight, scheme(), clip=True, scale_dtype="F32")
    wide = grid(weight.float(), scheme(), clip=True, scale_dtype="F32")
    assert narrow[0].dtype == torch.float32 and torch.equal(narrow[0], wide[0])
