"""Writing four-bit floats as compressed-tensors stores them: NVFP4 and MXFP4, weights only.

    NVFP4    W[o, i] = e2m1(code[o, i]) * (e4m3(scale[o, g]) / shared)    16 inputs a group
    MXFP4    W[o, i] = e2m1(code[o, i]) * 2**(scale[o, g] - 127)          32 inputs a group

``weight_packed`` uint8 [out, in / 2] holds two codes a byte, the earlier in the lower half; ``weight_scale`` [out, groups]
is F8_E4M3 or U8; ``weight_global_scale`` [1], NVFP4 alone, is what scales were multiplied by before they were rounded, so
readers divide by it. Scales are chosen as the library does: the largest of a group becomes 6, the largest scale of a
matrix 448; for MXFP4 the power of two below, one more where the largest would end beyond 7. Formats: NVIDIA 2025,
2509.25149, appendix A; OCP microscaling formats 1.0; layout: the compressed-tensors library, 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from surgeon.errors import InputError
from surgeon.formats.compressed_groups import quantization_config
from surgeon.formats.compressed_runtimes import refusals, storable
from surgeon.formats.encoded import BIAS, CHUNK, exponents
from surgeon.formats.float8_dynamic import e4m3_codes, halfway_to_even, largest_of, nearest, numbers_of_keys
from surgeon.formats.fp8_block import eight_bit_floats
from surgeon.formats.mxfp4 import E2M1
from surgeon.formats.pack_quantized import check
from surgeon.formats.scheme import Scheme

__all__ = [
    "MXFP4",
    "NVFP4",
    "Float4",
    "layout",
    "pack",
    "quantization_config",
    "quantize",
    "refusals",
    "shared_scale",
    "storable",
]

NVFP4 = Scheme("nvfp4", 4, 0)
MXFP4 = Scheme("mxfp4", 4, 0)
GROUP = {"nvfp4": 16, "mxfp4": 32}
LARGEST = 6.0
LARGEST_SCALE = 448.0
LEAST_SCALE = 0x20
"""Byte of 0.125, which the library stores for a group of zeros."""


@dataclass
class Float4:
    """A matrix of four-bit floats before it is stored.

    Attributes:
        scheme: NVFP4 or MXFP4.
        codes: uint8 [out, in], 0 to 15; bit 3 is the sign.
        scales: uint8 [out, groups]: bytes of E4M3, or exponents plus 127.
        shared: what the scales of the matrix are divided by; 1 for MXFP4.
    """

    scheme: Scheme
    codes: np.ndarray
    scales: np.ndarray
    shared: np.float32

    def values(self) -> np.ndarray:
        """Return what the codes stand for, float32 [out, in]."""
        size = GROUP[self.scheme.kind]
        if self.scheme.kind == "nvfp4":
            scales = np.take(eight_bit_floats("F8_E4M3"), self.scales) / self.shared
        else:
            scales = exponents(self.scales)
        table = np.array([*E2M1, *(-v for v in E2M1)], dtype=np.float32)
        return np.take(table, self.codes) * np.repeat(scales, size, axis=1)


def shared_scale(weights: Iterable[np.ndarray]) -> np.float32:
    """Return what NVFP4 scales of some matrices are multiplied by: 448 * 6 / max |W|.

    Matrices that a runtime loads as one (`compressed_runtimes.fused`) need one number: vLLM takes the largest of theirs
    for all and says so in a warning only. Matrices of zeros give 1.

    Raises:
        InputError: E457 a value that is not finite.
    """
    # Not Python's max, which may pass over NaN.
    largest = float(np.max([0.0, *(float(largest_of(weight.reshape(-1))) for weight in weights)]))
    if not np.isfinite(largest):
        raise InputError("E457", "a matrix that is to be quantized holds NaN or infinity",
                         help="find it with: surgeon inspect MODEL --stats")  # fmt: skip
    with np.errstate(over="ignore"):
        shared = np.float32(LARGEST_SCALE * LARGEST) / np.float32(largest) if largest else np.float32(1)
    return np.float32(min(shared, np.finfo(np.float32).max))


def quantize(weight: np.ndarray, scheme: Scheme, shared: np.float32 | None = None) -> Float4:
    """Return a matrix rounded to four-bit floats.

    Args:
        weight: float32 [out, in].
        scheme: NVFP4 or MXFP4.
        shared: of NVFP4, from `shared_scale`; of this matrix alone when None.

    Raises:
        InputError: E455 the groups do not divide the inputs; E457 a value that is not finite.
    """
    check("weight", weight.shape, scheme, tuple(GROUP), "BF16")
    found = shared_scale([weight])
    groups = weight.reshape(weight.shape[0], -1, GROUP[scheme.kind])
    largest = largest_of(groups)
    if scheme.kind == "mxfp4":
        shared, scales = np.float32(1), _exponents(largest)
        steps = exponents(scales)
    else:
        shared = found if shared is None else shared
        scales = e4m3_codes(largest / np.float32(LARGEST) * shared)
        scales[scales == 0] = LEAST_SCALE
        steps = np.take(eight_bit_floats("F8_E4M3"), scales) / shared
    codes = np.empty(groups.shape, dtype=np.uint8)
    step = max(1, CHUNK // weight.shape[1])
    for row in range(0, len(weight), step):
        codes[row : row + step] = nearest(
            groups[row : row + step] / steps[row : row + step, :, None], _e2m1_table()
        )
    return Float4(scheme, codes.reshape(weight.shape), scales, shared)


def _exponents(largest: np.ndarray) -> np.ndarray:
    """Return the exponents plus 127 of groups with these largest magnitudes: uint8, 1 to 254.

    6 is 1.5 * 2**2: the exponent is that of the magnitude less 2, one more from 1.75 on, which would end beyond 7.
    """
    fraction, exponent = np.frexp(
        largest.astype(np.float64)
    )  # magnitude = fraction * 2**exponent, fraction in [.5, 1)
    power = exponent - 1 + (fraction >= 0.875) - 2
    return np.where(largest > 0, np.clip(power + BIAS, 1, 254), BIAS).astype(np.uint8)


@cache
def _e2m1_table() -> np.ndarray:
    values = numbers_of_keys()
    table = halfway_to_even(np.abs(values), np.array(E2M1)) | np.signbit(values).astype(np.uint8) << np.uint8(
        3
    )
    table.flags.writeable = False
    return table


def layout(
    name: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16"
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (stored name, storage type, shape) of what a matrix becomes; arguments as in `pack_quantized.layout`.

    Raises:
        InputError: E454 not a scheme of this format; E455 it does not fit the shape.
    """
    check(name, shape, scheme, tuple(GROUP), dtype)
    rows, columns = shape
    parts = [
        (f"{name}_packed", "U8", (rows, columns // 2)),
        (
            f"{name}_scale",
            "F8_E4M3" if scheme.kind == "nvfp4" else "U8",
            (rows, columns // GROUP[scheme.kind]),
        ),
    ]
    return [*parts, (f"{name}_global_scale", "F32", (1,))] if scheme.kind == "nvfp4" else parts


def pack(matrix: Float4) -> dict[str, np.ndarray]:
    """Return what is stored of a matrix: {"_packed", "_scale"} and "_global_scale" of NVFP4, appended to the plain name.

    Raises:
        InputError: E454, E455 as `layout`, and parts that do not fit each other.
    """
    stored = layout("weight", matrix.codes.shape, matrix.scheme)
    if matrix.scales.shape != stored[1][2]:
        raise InputError(
            "E455", f"{matrix.scheme.name} of a matrix {list(matrix.codes.shape)} has scales {list(stored[1][2])}, "
            f"not {list(matrix.scales.shape)}", help="this is a bug of the quantizer",
        )  # fmt: skip
    parts = {"_packed": matrix.codes[:, ::2] | matrix.codes[:, 1::2] << np.uint8(4), "_scale": matrix.scales}
    if matrix.scheme.kind == "nvfp4":
        parts["_global_scale"] = np.array([matrix.shared], dtype=np.float32)
    return parts
