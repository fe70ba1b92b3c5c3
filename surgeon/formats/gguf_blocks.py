"""Rows of matrices as ggml stores them: blocks of a few codes with their scale in front, byte after byte.

    Q4_0    W = (code - 8) * d           d float16; 16 bytes: code j in the lower half of byte j, code j + 16 in the upper
    Q4_1    W = code * d + m             d, m float16; codes as Q4_0
    Q5_0    W = (code - 16) * d          d float16; 4 bytes with the fifth bits, code 0 lowest; lower four bits as Q4_0
    Q5_1    W = code * d + m             d, m float16; codes as Q5_0
    Q8_0    W = (code - 128) * d         d float16; 32 signed bytes
    MXFP4   W = e2m1(code) * 2**(s - 127)    s one byte; codes as Q4_0

Codes with a float16 scale are stored exactly, asymmetric ones when -zero * scale is a number of float16: grids for these
files choose it so (`surgeon.quantize.grids`), and need no whole zero point. Of a whole one -zero * scale is rounded to
float16, which moves all values of a group by at most (2**bits - 1) / 2**11 of a step.

Types that ggml alone can make (Q4_K and others) are rounded by its own function, in the library that xllamacpp brings.
Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.formats.float4 import Float4
from surgeon.formats.scheme import Codes, Scheme

GROUP = 32
"""Inputs that share a scale in every type our own codes are stored in."""


@dataclass(frozen=True)
class BlockType:
    """A type of ggml.

    Attributes:
        number: in ``ggml_type``.
        values: a block holds; rows are whole blocks.
        bytes: of a block.
        file_type: what ``general.file_type`` says of a file that is mostly of this type.
        library: only ggml itself rounds to it.
    """

    number: int
    values: int
    bytes: int
    file_type: int
    library: bool = False


TYPES = {
    "F32": BlockType(0, 1, 4, 0),
    "F16": BlockType(1, 1, 2, 1),
    "BF16": BlockType(30, 1, 2, 32),
    "Q4_0": BlockType(2, 32, 18, 2),
    "Q4_1": BlockType(3, 32, 20, 3),
    "Q5_0": BlockType(6, 32, 22, 8),
    "Q5_1": BlockType(7, 32, 24, 9),
    "Q8_0": BlockType(8, 32, 34, 7),
    "MXFP4": BlockType(39, 32, 17, 38),
    "Q2_K": BlockType(10, 256, 84, 10, True),
    "Q3_K": BlockType(11, 256, 110, 11, True),
    "Q4_K": BlockType(12, 256, 144, 14, True),
    "Q5_K": BlockType(13, 256, 176, 16, True),
    "Q6_K": BlockType(14, 256, 210, 18, True),
    "IQ4_NL": BlockType(20, 32, 18, 25, True),
    "IQ4_XS": BlockType(23, 256, 136, 30, True),
}
PLAIN = ("F32", "F16", "BF16")
QUANTIZED = tuple(name for name in TYPES if name not in PLAIN)
QUANTIZATION_VERSION = 2
"""Of the block layouts; ``general.quantization_version``."""

_OF_SCHEME = {
    (4, True): "Q4_0",
    (4, False): "Q4_1",
    (5, True): "Q5_0",
    (5, False): "Q5_1",
    (8, True): "Q8_0",
}


# ---- which type, how many bytes ---------------------------------------------------------------------


def type_of(scheme: Scheme) -> str | None:
    """Return the type that stores a scheme, None where none does."""
    if scheme.kind == "mxfp4" and scheme.bits == 4:
        return "MXFP4"
    if scheme.kind != "int" or scheme.group != GROUP:
        return None
    return _OF_SCHEME.get((scheme.bits, scheme.symmetric))


def unstorable(shape: tuple[int, ...], scheme: Scheme) -> str | None:
    """Return why a matrix is not stored by a scheme, None when it is."""
    if type_of(scheme) is None:
        if scheme.kind == "int" and scheme.bits in (4, 5, 8) and scheme.group != GROUP:
            return f"its blocks have one scale for {GROUP} inputs"
        if scheme.kind == "int" and scheme.bits == 8:
            return "it has no zero points in 8 bits"
        return "it stores integers of 4, 5 and 8 bits and mxfp4"
    return misfit(shape, type_of(scheme) or "")


def misfit(shape: tuple[int, ...], kind: str) -> str | None:
    """Return why a matrix [out, in] is not stored in a type, None when it is."""
    if len(shape) != 2 or not all(shape):
        return f"its shape is {list(shape)}; a matrix [out, in] is needed"
    if shape[1] % TYPES[kind].values:
        return f"blocks of {TYPES[kind].values} do not divide its {shape[1]} inputs"
    return None


def row_bytes(kind: str, columns: int) -> int:
    """Return the bytes of a row.

    Raises:
        InputError: E466 it is not made of whole blocks.
    """
    reason = misfit((1, columns), kind)
    if reason is not None:
        raise InputError(
            "E466",
            f"a row cannot be stored as {kind}: {reason}",
            help="choose another type for it, or leave it as it is",
        )
    return columns // TYPES[kind].values * TYPES[kind].bytes


def stored_name(name: str, kind: str) -> str:
    """Return under which name blocks lie in a file of their own: the matrix's, then the type."""
    return f"{name}.{kind}"


def parse_name(stored: str) -> tuple[str, str] | None:
    """Return (name, type) of a `stored_name`, None where it is none."""
    name, _, kind = stored.rpartition(".")
    return (name, kind) if name and kind in QUANTIZED else None


def layout(
    name: str, shape: tuple[int, ...], scheme: Scheme
) -> list[tuple[str, str, tuple[int, ...]]]:  # fmt: skip
    """Return (stored name, storage code, shape) of what a matrix becomes.

    Raises:
        InputError: E466 GGUF does not store it.
    """
    reason = unstorable(shape, scheme)
    if reason is not None:
        raise refusal(name, scheme.name, reason)
    kind = type_of(scheme) or ""
    return [(stored_name(name, kind), "U8", (shape[0], row_bytes(kind, shape[1])))]


def refusal(name: str, what: str, reason: str, help: str | None = None, alike: str = "") -> InputError:
    """Return E466: a matrix that GGUF does not store as it was to be; ``alike``: words about others of its kind."""
    return InputError(
        "E466", f"{printable(name)}{alike and f' and {alike}'} cannot be stored as {what} in GGUF: {reason}", where=Where(tensor=printable(name)),
        help=help or "choose another scheme for it, or leave it as it is",
    )  # fmt: skip


# ---- codes to blocks --------------------------------------------------------------------------------


def pack(codes: Codes, name: str = "the matrix") -> np.ndarray:
    """Return the blocks of a matrix of integers, uint8 [out, bytes of a row].

    Raises:
        InputError: E466 GGUF does not store the scheme or the shape, or a smallest value leaves the range of float16.
    """
    layout(name, codes.codes.shape, codes.scheme)
    rows, columns = codes.codes.shape
    scales = _float16(codes.scales, name)
    if not np.array_equal(scales.astype(np.float32), codes.scales):
        raise refusal(name, codes.scheme.name, "its scales were not rounded to float16",
                      "this is a bug of the quantizer")  # fmt: skip
    parts = [scales[..., None].view(np.uint8)]
    if not codes.scheme.symmetric:
        smallest = _float16(-codes.scales * codes.zeros.astype(np.float32), name)
        parts.append(smallest[..., None].view(np.uint8))
    elif not (codes.zeros == 1 << (codes.scheme.bits - 1)).all():
        raise refusal(
            name, codes.scheme.name, "its zero points are not in the middle", "this is a bug of the quantizer"
        )
    blocks = codes.codes.reshape(rows, columns // GROUP, GROUP)
    if codes.scheme.bits == 8:
        parts.append(blocks ^ np.uint8(128))  # code - 128 as a signed byte
    else:
        if codes.scheme.bits == 5:
            parts.append(np.packbits(blocks >> np.uint8(4), axis=2, bitorder="little"))
        parts.append(_nibbles(blocks))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def pack_mxfp4(matrix: Float4) -> np.ndarray:
    """Return the blocks of a matrix of MXFP4 numbers, uint8 [out, bytes of a row]."""
    rows, columns = matrix.codes.shape
    blocks = matrix.codes.reshape(rows, columns // GROUP, GROUP)
    return np.concatenate([matrix.scales[..., None], _nibbles(blocks)], axis=2).reshape(rows, -1)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """Return the lower four bits of 32 codes in 16 bytes."""
    low = blocks & np.uint8(15)
    return low[..., : GROUP // 2] | low[..., GROUP // 2 :] << np.uint8(4)


def _float16(values: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=np.float32).astype(np.float16)
    if not np.isfinite(stored).all():
        raise refusal(
            name, "blocks", "a scale or smallest value is beyond the range of float16", "leave it as it is"
        )
    return stored


# ---- plain rounding, and back ------------------------------------------------------------------------


def quantize(values: np.ndarray, kind: str, name: str = "the matrix", threads: int = 1) -> np.ndarray:
    """Return rows rounded to a type by ggml's own algorithm, without data: uint8 [rows, bytes of a row].

    ggml does it where xllamacpp brings it; what it stores of the types above, the gguf package gives to the bit.

    Args:
        values: float32 [rows, columns].
        kind: one of `QUANTIZED`.
        name: for messages.
        threads: that round rows, where ggml does it.

    Raises:
        InputError: E466 rows are not made of whole blocks; E451 a NaN or an infinity.
        EnvironmentFault: E512 gguf, or for types of ggml alone xllamacpp, is not installed.
    """
    reason = misfit(values.shape, kind)
    if reason is not None:
        raise refusal(name, kind, reason)
    if not np.isfinite(values).all():
        raise InputError("E451", f"{printable(name)} holds a NaN or an infinity", where=Where(tensor=printable(name)),
                         help="the checkpoint is damaged: surgeon verify names every such tensor")  # fmt: skip
    values = np.ascontiguousarray(values, dtype=np.float32)
    if TYPES[kind].library or importlib.util.find_spec("xllamacpp") is not None:
        return _rounded_by_ggml(values, TYPES[kind], threads)
    gguf = _gguf()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def dequantize(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Return what rows of blocks stand for, float32 [rows, columns]."""
    gguf = _gguf()
    return gguf.quants.dequantize(np.ascontiguousarray(blocks), gguf.GGMLQuantizationType[kind])


def can_quantize(kind: str) -> bool:
    """Say whether what rounds to a type is installed here."""
    if importlib.util.find_spec("gguf") is None:
        return False
    return not TYPES[kind].library or importlib.util.find_spec("xllamacpp") is not None


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentFault("E512", "gguf is not installed; it knows the blocks of GGUF files",
                               help='pip install "model-surgeon[gguf]"') from error  # fmt: skip
    return gguf


def _rounded_by_ggml(values: np.ndarray, kind: BlockType, threads: int = 1) -> np.ndarray:
    rows, columns = values.shape
    blocks = np.empty((rows, columns // kind.values * kind.bytes), dtype=np.uint8)
    call = _ggml().ggml_quantize_chunk

    def work(first: int) -> int:
        """Round some rows; Python runs on meanwhile."""
        part, into = values[first : first + step], blocks[first : first + step]
        return call(kind.number, part.ctypes.data, into.ctypes.data, 0, len(part), columns, None)

    step = max(1, -(-rows // max(1, threads)))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        written = sum(pool.map(work, range(0, rows, step)))
    if written != blocks.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes of {blocks.nbytes}")
    return blocks


@cache
def _ggml() -> Any:
    """Return the library that xllamacpp brings, which has ggml's public functions in it."""
    spec = importlib.util.find_spec("xllamacpp")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for file in (file for place in places for file in sorted(Path(place).glob("xllamacpp*.so"))):
        library = ctypes.CDLL(str(file))
        function = getattr(library, "ggml_quantize_chunk", None)
        if function is not None:
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]  # fmt: skip
            return library
    raise EnvironmentFault("E512", "only ggml itself rounds to this type, and xllamacpp, which brings it, is not installed",
                           help='pip install "model-surgeon[gguf]", or use q4_0, q4_1, q5_0, q5_1, q8_0')  # fmt: skip
