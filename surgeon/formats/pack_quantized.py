"""Writing integers of 2 to 8 bits times scales as compressed-tensors' "pack-quantized".

    W[o, i] = (code[o, i] - 2**(b - 1)) * scale[o, g]        g the group of input i

``weight_packed`` int32 [out, ceil(in * b / 32)] holds a row's codes one after the other from the lowest bit on, without
gaps between words; bits after the last code are zero. ``weight_scale`` [out, groups] has the model's type,
``weight_shape`` int64 [2] says the plain shape. Zero points are not written: the stock reader refuses them, see
`surgeon.formats.compressed_runtimes`. Layout: the compressed-tensors library, 0.20.
"""

from __future__ import annotations

import numpy as np

from surgeon.errors import InputError, Where
from surgeon.formats.compressed_groups import quantization_config
from surgeon.formats.compressed_runtimes import misfit, refusals, storable, unstorable
from surgeon.formats.scheme import Codes, Scheme
from surgeon.kernels.cast import narrow, round_to

__all__ = ["layout", "pack", "packed", "quantization_config", "refusals", "storable"]

SCALE_TYPES = ("BF16", "F16", "F32")
ROWS = 1 << 22
"""Codes packed at once: packing needs as many bytes again."""


def layout(
    name: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16"
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (stored name, storage type, shape) of what a matrix becomes.

    Args:
        name: of the plain tensor, "....weight".
        shape: [out, in].
        scheme: of kind "int", symmetric.
        dtype: of the scales: that of the model's plain tensors, BF16, F16 or F32.

    Raises:
        InputError: E454 not a scheme of this format; E455 it does not fit the shape.
    """
    check(name, shape, scheme, ("int",), dtype)
    rows, columns = shape
    groups = columns // scheme.group if scheme.group > 0 else 1
    return [
        (f"{name}_packed", "I32", (rows, -(-columns * scheme.bits // 32))),
        (f"{name}_scale", dtype, (rows, groups)),
        (f"{name}_shape", "I64", (2,)),
    ]


def pack(codes: Codes, dtype: str = "BF16") -> dict[str, np.ndarray]:
    """Return what is stored of a quantized matrix: {"_packed", "_scale", "_shape"}, appended to the plain name.

    Arrays have the carrier type of what `layout` says; the reader's values are ``codes.values()`` rounded to ``dtype``.

    Raises:
        InputError: E454, E455 as `layout`, and zero points off the middle; E457 scales that ``dtype`` does not hold.
    """
    scheme, shape = codes.scheme, (codes.codes.shape[0], codes.codes.shape[1])
    stored = {part.removeprefix("weight"): size for part, _, size in layout("weight", shape, scheme, dtype)}
    if codes.scales.shape != stored["_scale"] or codes.zeros.shape != stored["_scale"]:
        raise InputError(
            "E455", f"{scheme.name} of a matrix {list(shape)} has scales {list(stored['_scale'])}, "
            f"not {list(codes.scales.shape)} with zero points {list(codes.zeros.shape)}",
            help="this is a bug of the quantizer",
        )  # fmt: skip
    if np.any(codes.zeros != 1 << (scheme.bits - 1)):
        raise InputError("E454", f"{scheme.name} with zero points off the middle cannot be stored symmetric",
                         help="quantize symmetrically")  # fmt: skip
    return {
        "_packed": packed(codes.codes, scheme.bits),
        "_scale": stored_scales(codes.scales, dtype),
        "_shape": np.array(shape, dtype=np.int64),
    }


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of codes as a bit stream of little-endian words, the first code in the lowest bits.

    Args:
        codes: uint8 [rows, n], each below 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [rows, ceil(n * bits / 32)].
    """
    rows, length = codes.shape
    out = np.zeros((rows, 4 * (-(-length * bits // 32))), dtype=np.uint8)
    step = max(1, ROWS // max(1, length))
    for first in range(0, rows, step):
        part = _bytes(codes[first : first + step], bits)[:, : out.shape[1]]
        out[first : first + step, : part.shape[1]] = part
    return out.view("<i4").astype(np.int32, copy=False)


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of codes as bytes [rows, ceil(n / 8) * bits]: eight codes fill exactly ``bits`` bytes."""
    if bits == 8:
        return codes
    if codes.size and int(codes.max()) >> bits:
        raise InputError("E454", f"codes reach {int(codes.max())}, beyond {bits} bits", help="this is a bug of the quantizer")  # fmt: skip
    rows, length = codes.shape
    eights = np.zeros((rows, -(-length // 8), 8), dtype=np.uint8)
    eights.reshape(rows, -1)[:, :length] = codes
    words = np.zeros(eights.shape[:2], dtype="<u8")
    for place in range(8):
        words |= eights[:, :, place].astype(np.uint64) << np.uint64(place * bits)
    return words.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)


def stored_scales(scales: np.ndarray, dtype: str) -> np.ndarray:
    """Return scales in the carrier of their storage type, which has to hold them as they are.

    Raises:
        InputError: E457.
    """
    kept = round_to(scales.astype(np.float32, copy=False), dtype)
    wrong = ~np.isfinite(kept) | (kept != scales)
    if wrong.any():
        place = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise InputError(
            "E457", f"scale {float(scales[place])!r} (row {place[0]}) is not a finite number of type {dtype}",
            help="round scales to the type they are stored in before codes are chosen",
        )  # fmt: skip
    return narrow(kept, dtype)


def check(name: str, shape: tuple[int, ...], scheme: Scheme, kinds: tuple[str, ...], dtype: str) -> None:
    """Refuse a matrix that cannot be stored in a format, whatever reads it.

    Raises:
        InputError: E454 the scheme is not of the format; E455 it does not fit the shape.
    """
    if scheme.kind not in kinds or dtype not in SCALE_TYPES:
        raise InputError(
            "E454", f"this format stores {' and '.join(kinds)} with scales of type {', '.join(SCALE_TYPES)}, "
            f"not {scheme.name} with {dtype}",
            where=Where(tensor=name), help="another format stores it",
        )  # fmt: skip
    for code, reason in (("E454", unstorable(scheme)), ("E455", misfit(shape, scheme))):
        if reason is not None:
            raise InputError(code, f"{scheme.name} cannot be stored of a tensor {list(shape)}: {reason}",
                             where=Where(tensor=name), help="choose another scheme for it, or leave it as it is")  # fmt: skip
