"""Storage types to arithmetic types and back, over 1-D blocks.

bfloat16 has no NumPy type: its bits travel as uint16. Widening to float32 is exact; narrowing
rounds to nearest, ties to even, like torch.
"""

from __future__ import annotations

import numpy as np


def widen(raw: np.ndarray, code: str) -> np.ndarray:
    """Return raw values of storage type ``code`` as float32 (float64 for F64).

    A float32/float64 array is returned as it is, whatever the code: views that compute
    (adapters, averaged rows) hand over values that were never rounded to the storage type.
    """
    if raw.dtype == np.uint16 and code == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if raw.dtype == np.float16:
        return raw.astype(np.float32)
    return raw


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 values to bfloat16 and return the bits as uint16 (nearest, ties to even)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = bits >> np.uint32(16)
    rounding &= np.uint32(1)
    rounding += np.uint32(0x7FFF)
    rounding += bits
    rounding >>= np.uint32(16)
    return rounding.astype(np.uint16)


def narrow(values: np.ndarray, code: str) -> np.ndarray:
    """Return values rounded to storage type ``code`` in its carrier type.

    float64 values go to 16 bits in two roundings only when they were computed in float64;
    nothing in this program does that for 16-bit outputs except on explicit request.
    """
    if code == "BF16":
        return bf16_bits(values)
    if code == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    if code == "F32":
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)
    return values.astype(np.float64, copy=False)


def round_to(values: np.ndarray, code: str) -> np.ndarray:
    """Return values rounded to the precision of ``code`` but still in their arithmetic type."""
    if code == "BF16":
        return widen(bf16_bits(values), "BF16")
    if code == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if code == "F32":
        return values.astype(np.float32, copy=False)
    return values.astype(np.float64, copy=False)


def nonfinite(raw: np.ndarray, code: str) -> np.ndarray | None:
    """Return a mask of NaN and Inf entries, or None when there are none."""
    if code == "BF16" and raw.dtype == np.uint16:
        mask = (raw & np.uint16(0x7F80)) == np.uint16(0x7F80)
    else:
        mask = ~np.isfinite(raw)
    return mask if mask.any() else None
