"""Writing eight-bit floats as compressed-tensors' "float-quantized": W8A8, activations quantized while the model runs.

    W[o, i] = e4m3(code[o, i]) * scale[o]        scale[o] = max |W[o]| / 448

``weight`` holds the codes (F8_E4M3), ``weight_scale`` [out, 1] a scale a row in the model's type. Activations get a scale
a token from their largest magnitude at run time, so that nothing has to be calibrated. Format: Micikevicius et al. 2022,
2209.05433, section 3; layout: the compressed-tensors library, 0.20, preset FP8_DYNAMIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from surgeon.errors import InputError
from surgeon.formats.compressed_groups import quantization_config
from surgeon.formats.compressed_runtimes import refusals, storable
from surgeon.formats.encoded import CHUNK
from surgeon.formats.fp8_block import eight_bit_floats
from surgeon.formats.pack_quantized import check, stored_scales
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import round_to

__all__ = [
    "FLOAT8",
    "Float8",
    "e4m3_codes",
    "layout",
    "pack",
    "quantization_config",
    "quantize",
    "refusals",
    "storable",
]

FLOAT8 = Scheme("float8", 8, -1)
LARGEST = 448.0
"""Of E4M3."""

LEAST = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}
"""Smallest normal number by type: a scale below it would be too coarse. Codes are floats and lose nothing by a larger one."""


@dataclass
class Float8:
    """A matrix of eight-bit floats before it is stored: value = e4m3(code) * scale.

    Attributes:
        codes: uint8 [out, in], bytes of E4M3, none of them NaN.
        scales: float32 [out, 1], already rounded to the type they are stored in.
    """

    codes: np.ndarray
    scales: np.ndarray

    def values(self) -> np.ndarray:
        """Return what the codes stand for, float32 [out, in]."""
        return np.take(eight_bit_floats("F8_E4M3"), self.codes) * self.scales


def quantize(weight: np.ndarray, dtype: str = "BF16") -> Float8:
    """Return a matrix [out, in] rounded to eight-bit floats, a scale a row.

    Args:
        weight: float32.
        dtype: the scales are stored in.

    Raises:
        InputError: E457 a value that is not finite.
    """
    largest = largest_of(weight)[:, None]
    if not np.isfinite(largest).all():
        raise InputError("E457", "a matrix that is to be quantized holds NaN or infinity",
                         help="find it with: surgeon inspect MODEL --stats")  # fmt: skip
    scales = np.maximum(round_to((largest / LARGEST).astype(np.float32), dtype), np.float32(LEAST[dtype]))
    codes = np.empty(weight.shape, dtype=np.uint8)
    step = max(1, CHUNK // max(1, weight.shape[1]))
    for row in range(0, len(weight), step):
        codes[row : row + step] = e4m3_codes(weight[row : row + step] / scales[row : row + step])
    return Float8(codes, scales)


def largest_of(values: np.ndarray) -> np.ndarray:
    """Return the largest magnitudes along the last axis, 0 where it is empty; NaN where there is one."""
    # The sign of a zero would become that of a scale.
    return np.abs(np.maximum(values.max(axis=-1, initial=0.0), -values.min(axis=-1, initial=0.0)))


def e4m3_codes(values: np.ndarray) -> np.ndarray:
    """Return the bytes of the nearest E4M3 numbers, ties to even; beyond 448 the largest. float32 in, uint8 out."""
    return nearest(values, _e4m3_table())


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return a table's entries for float32 values, by their upper 16 bits, the last set where a lower one is.

    Rounded to odd like this with two bits to spare, a number is rounded again to what it would be rounded to itself
    (Boldo and Melquiond 2008, IEEE Transactions on Computers 57): the table only has to be right for 65,536 numbers.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    key = (bits >> np.uint32(16)).astype(np.uint16)
    key |= (bits & np.uint32(0xFFFF)) != 0
    return np.take(table, key)


def numbers_of_keys() -> np.ndarray:
    """Return the finite number of every key of `nearest`, float64 [65536]; those without one get the largest."""
    keys = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    values = keys.view(np.float32)
    with np.errstate(invalid="ignore"):  # keys of NaN
        finite = np.where(np.isfinite(values), values, np.copysign(np.finfo(np.float32).max, values))
    return finite.astype(np.float64)


@cache
def _e4m3_table() -> np.ndarray:
    values = numbers_of_keys()
    positive = eight_bit_floats("F8_E4M3")[:127].astype(np.float64)
    table = halfway_to_even(np.abs(values), positive) | np.signbit(values).astype(np.uint8) << np.uint8(7)
    table.flags.writeable = False
    return table


def halfway_to_even(magnitudes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the place of the nearest of some rising levels, of two equally near ones the even place. uint8."""
    middles = (levels[1:] + levels[:-1]) / 2
    below = np.searchsorted(middles, magnitudes, side="left")
    above = np.searchsorted(middles, magnitudes, side="right")
    return np.where(below % 2 == 0, below, above).astype(np.uint8)


def layout(
    name: str, shape: tuple[int, ...], scheme: Scheme = FLOAT8, dtype: str = "BF16"
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (stored name, storage type, shape) of what a matrix becomes; arguments as in `pack_quantized.layout`.

    Raises:
        InputError: E454 not a scheme of this format; E455 not a matrix.
    """
    check(name, shape, scheme, ("float8",), dtype)
    return [(name, "F8_E4M3", tuple(shape)), (f"{name}_scale", dtype, (shape[0], 1))]


def pack(matrix: Float8, dtype: str = "BF16") -> dict[str, np.ndarray]:
    """Return what is stored of a matrix: {"" (the codes), "_scale"}, appended to the plain name.

    Raises:
        InputError: E455 parts that do not fit each other; E457 scales that ``dtype`` does not hold, or codes of NaN.
    """
    (_, _, shape), (_, _, scales) = layout("weight", matrix.codes.shape, FLOAT8, dtype)
    if matrix.scales.shape != scales:
        raise InputError("E455", f"float8 of a matrix {list(shape)} has scales {list(scales)}, not {list(matrix.scales.shape)}",
                         help="this is a bug of the quantizer")  # fmt: skip
    if np.any((matrix.codes & 0x7F) == 0x7F):
        raise InputError("E457", "a code of eight-bit floats is NaN", help="this is a bug of the quantizer")
    return {"": matrix.codes, "_scale": stored_scales(matrix.scales, dtype)}
