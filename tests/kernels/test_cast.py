"""Rounding to 16 bits, bit for bit as torch does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgeon.kernels import cast

EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def torch_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_widening_every_bf16_pattern_is_exact():
    ours = cast.widen(EVERY_PATTERN, "BF16")
    theirs = torch.from_numpy(EVERY_PATTERN.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    finite = np.isfinite(ours)
    np.testing.assert_array_equal(cast.bf16_bits(ours)[finite], EVERY_PATTERN[finite])
    assert ours.dtype == np.float32


def test_rounding_around_every_bf16_pattern():
    """Exact values, halves (ties), and the floats next to both."""
    base = EVERY_PATTERN.astype(np.uint32) << 16
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (base | np.uint32(low)).view(np.float32)
        values = values[~np.isnan(values)]
        np.testing.assert_array_equal(cast.bf16_bits(values), torch_bits(values))


@given(arrays(np.float32, st.integers(0, 64), elements=st.floats(width=32, allow_nan=False)))
def test_rounding_any_float(values):
    np.testing.assert_array_equal(cast.bf16_bits(values), torch_bits(values))
    np.testing.assert_array_equal(cast.round_to(values, "BF16"), cast.widen(torch_bits(values), "BF16"))


@given(arrays(np.float64, st.integers(0, 64), elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_float64_goes_through_float32_as_in_torch(values):
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(cast.narrow(values, "BF16"), torch_bits(values))
        np.testing.assert_array_equal(
            cast.narrow(values, "F32"), torch.from_numpy(values.copy()).float().numpy()
        )


@given(arrays(np.float32, st.integers(0, 64), elements=st.floats(width=32, allow_nan=False)))
def test_float16_as_torch(values):
    theirs = torch.from_numpy(values.copy()).half().numpy()
    np.testing.assert_array_equal(cast.narrow(values, "F16").view(np.uint16), theirs.view(np.uint16))
    np.testing.assert_array_equal(cast.round_to(values, "F16"), theirs.astype(np.float32))


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_widen_and_narrow_are_inverse(code):
    raw = EVERY_PATTERN if code == "BF16" else EVERY_PATTERN.view(np.float16)
    values = cast.widen(raw, code)
    finite = np.isfinite(values)
    back = cast.narrow(values, code).view(np.uint16)
    np.testing.assert_array_equal(back[finite], EVERY_PATTERN[finite])


def test_values_that_were_computed_are_not_widened_again():
    values = np.array([1.5, -0.25], np.float32)
    assert cast.widen(values, "BF16") is values


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_nonfinite(code):
    wide = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e4])
    with np.errstate(invalid="ignore"):
        raw = cast.narrow(wide if code == "F64" else wide.astype(np.float32), code)
    mask = cast.nonfinite(raw, code)
    assert mask is not None and mask.tolist() == [False, False, False, True, True, True, False]
    assert cast.nonfinite(raw[:3], code) is None
    assert cast.nonfinite(raw[:0], code) is None


def test_nonfinite_sees_every_bf16_pattern():
    mask = cast.nonfinite(EVERY_PATTERN, "BF16")
    np.testing.assert_array_equal(mask, ~np.isfinite(cast.widen(EVERY_PATTERN, "BF16")))
