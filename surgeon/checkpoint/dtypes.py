"""The one table of storage types: safetensors code, width, family, NumPy carrier.

bfloat16 and the float8 types have no NumPy dtype; they travel as unsigned integers of the
same width ("carrier"), and `surgeon.kernels.cast` turns them into float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DType:
    """One storage type.

    Attributes:
        code: the name in a safetensors header.
        bits: width of one element.
        family: "float" (arithmetic allowed), "integer", "bool", "coded" (float8, sub-byte and
            other encodings whose bits are not plain values), "complex".
        carrier: NumPy dtype that holds the raw bits; None for sub-byte types.
    """

    code: str
    bits: int
    family: str
    carrier: np.dtype | None


def _entry(code: str, bits: int, family: str, carrier: str | None) -> tuple[str, DType]:
    return code, DType(code, bits, family, np.dtype(carrier) if carrier else None)


DTYPES: dict[str, DType] = dict(
    [
        _entry("F64", 64, "float", "<f8"),
        _entry("F32", 32, "float", "<f4"),
        _entry("F16", 16, "float", "<f2"),
        _entry("BF16", 16, "float", "<u2"),
        _entry("I64", 64, "integer", "<i8"),
        _entry("I32", 32, "integer", "<i4"),
        _entry("I16", 16, "integer", "<i2"),
        _entry("I8", 8, "integer", "i1"),
        _entry("U64", 64, "integer", "<u8"),
        _entry("U32", 32, "integer", "<u4"),
        _entry("U16", 16, "integer", "<u2"),
        _entry("U8", 8, "integer", "u1"),
        _entry("BOOL", 8, "bool", "u1"),
        _entry("C64", 64, "complex", "<c8"),
        _entry("F8_E4M3", 8, "coded", "u1"),
        _entry("F8_E5M2", 8, "coded", "u1"),
        _entry("F8_E8M0", 8, "coded", "u1"),
        _entry("F8_E4M3FNUZ", 8, "coded", "u1"),
        _entry("F8_E5M2FNUZ", 8, "coded", "u1"),
        _entry("F6_E2M3", 6, "coded", None),
        _entry("F6_E3M2", 6, "coded", None),
        _entry("F4", 4, "coded", None),
    ]
)

CONFIG_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Storage code -> the name config.json and the command line use."""

CODES = {name: code for code, name in CONFIG_NAMES.items()}
"""float32 -> F32 and so on."""


def promote(codes: list[str]) -> str:
    """Return the common float type of several, as torch and NumPy promote them.

    bfloat16 with float16 gives float32; otherwise the wider one. All codes must be floats.
    """
    unique = sorted(set(codes))
    if len(unique) == 1:
        return unique[0]
    if "F64" in unique:
        return "F64"
    return "F32"
