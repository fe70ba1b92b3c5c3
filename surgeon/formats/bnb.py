"""Weights as bitsandbytes stores them: four bits from a table of levels (NF4, FP4), or eight bits a row (LLM.int8()).

    four bits:   value = level[code] * absmax         a block of 64 values, row by row, shares an absmax
    eight bits:  value = code * SCB / 127             a row shares an SCB

``weight`` uint8 [values / 2, 1] holds two codes a byte, the first in the upper half; ``weight.absmax`` float32 [blocks];
``weight.quant_map`` the 16 levels; ``weight.quant_state.bitsandbytes__nf4`` a piece of JSON as bytes. With double
quantization ``weight.absmax`` holds bytes, which stand for levels of an eight-bit table times a scale every 256 blocks,
plus an offset. Eight bits: ``weight`` int8 [out, in], ``SCB`` float32 [out], ``weight_format`` uint8, 0 for rows.
Every tensor is made from its own matrix; no model is loaded. Dettmers et al., 2305.14314 (NF4, double quantization),
2208.07339 (LLM.int8()), 2110.02861 (the eight-bit table); layout: bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from surgeon.checkpoint.dtypes import CONFIG_NAMES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.formats.compressed_runtimes import STOCK, Choice, Reader, Shape
from surgeon.formats.encoded import CHUNK
from surgeon.formats.scheme import Scheme
from surgeon.formats.told_once import told_once
from surgeon.traits import part_of

VERSION = "0.50.2"
"""The bitsandbytes whose bytes these are."""

BLOCK = 64
"""Values that share an absmax."""

ROWS = 32
"""Rows that bitsandbytes takes together on processors with AVX512-BF16; it fails on a rest of them."""

NESTED = 256
"""Blocks whose absmax share a scale under double quantization."""

OFFSET_WIDTH = 24
"""Characters kept for the one number in the JSON that depends on data, so that sizes are known beforehand."""

NF4 = Scheme("nf4", 4, 0)
FP4 = Scheme("fp4", 4, 0)
INT8 = Scheme("int8", 8, 0)

# Quantiles of the normal distribution, as the paper's table gives them: readers know these values, not the rule.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@cache
def levels(kind: str) -> np.ndarray:
    """Return the 16 levels of "nf4" or "fp4" in the order of their codes, float32, at most 1."""
    table = np.array(_NF4 if kind == "nf4" else (*_FP4, *(-v for v in _FP4)), np.float32)
    table = table / np.abs(table).max() + np.float32(0)  # no negative zero, as in the library's table
    table.flags.writeable = False
    return table


@cache
def dynamic_levels() -> np.ndarray:
    """Return the 256 levels that stand for absmax under double quantization, in ascending order, float32.

    A sign, a unary exponent of base ten, and what bits are left as a fraction: dynamic tree quantization (2110.02861).
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        count = (1 << exponent) + 1
        edges = _spaced(count)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * middles
        found += [*scaled.tolist(), *(-scaled).tolist()]
    table = np.sort(np.array(found, np.float32))
    table.flags.writeable = False
    return table


def _spaced(count: int) -> np.ndarray:
    """Return ``count`` float32 numbers from 0.1 to 1 at equal distances, counted from the nearer end as torch does."""
    first, last = np.float32(0.1), np.float32(1)
    step = (last - first) / np.float32(count - 1)
    place = np.arange(count)
    up = np.float64(first) + np.float64(step) * place  # the sum is rounded once, as by a fused multiply-add
    down = np.float64(last) - np.float64(step) * (count - 1 - place)
    return np.where(place < count // 2, up, down).astype(np.float32)


def layout(
    name: str, shape: tuple[int, ...], scheme: Scheme, dtype: str = "BF16", double: bool = False
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (stored name, dtype code, shape) of the tensors that hold one matrix; sizes come from here alone.

    Args:
        name: of the plain matrix, ending in ".weight".
        shape: (out, in).
        dtype: of the plain matrix, which readers decode to.
        double: double quantization, of four bits.
    """
    outputs, inputs = shape
    if scheme.kind == "int8":
        stem = name.removesuffix("weight")
        return [
            (name, "I8", (outputs, inputs)),
            (f"{stem}SCB", "F32", (outputs,)),
            (f"{stem}weight_format", "U8", ()),
        ]
    count = outputs * inputs
    blocks = -(-count // BLOCK)
    parts = [(name, "U8", (-(-count // 2), 1)), (f"{name}.absmax", "U8" if double else "F32", (blocks,)),
             (f"{name}.quant_map", "F32", (16,))]  # fmt: skip
    if double:
        parts += [
            (f"{name}.nested_absmax", "F32", (-(-blocks // NESTED),)),
            (f"{name}.nested_quant_map", "F32", (256,)),
        ]
    state = _state(scheme, shape, dtype, 0.0 if double else None)
    return [*parts, (f"{name}.quant_state.bitsandbytes__{scheme.kind}", "U8", (len(state),))]


def pack(
    weight: np.ndarray, scheme: Scheme, dtype: str = "BF16", double: bool = False
) -> dict[str, np.ndarray]:
    """Quantize a matrix to the nearest levels and return its tensors by what is put for "weight" in its name.

    Args:
        weight: float32 [out, in], finite.
        scheme: `NF4`, `FP4` or `INT8`.
        dtype: storage type ``weight`` had.
        double: double quantization, of four bits.

    Raises:
        InputError: E461 values that the format cannot hold.
    """
    if scheme.kind == "int8":
        codes, scales = rows_of_int8(weight)
        return {"weight": codes, "SCB": scales, "weight_format": np.zeros((), np.uint8)}
    packed, absmax = blocks_of_four_bits(weight, scheme.kind)
    if not np.isfinite(absmax).all():
        raise _too_large("infinite or not a number")
    parts = {"weight": packed[:, None], "weight.quant_map": levels(scheme.kind)}
    offset = None
    if double:
        # In float64: the sum in float32 depends on its order, and so on the number of threads.
        offset = float(np.float32(absmax.mean(dtype=np.float64)))
        nested, scales = nested_absmax(absmax - np.float32(offset))
        parts |= {
            "weight.absmax": nested,
            "weight.nested_absmax": scales,
            "weight.nested_quant_map": dynamic_levels(),
        }
    else:
        parts["weight.absmax"] = absmax
    state = _state(scheme, weight.shape, dtype, offset)
    parts[f"weight.quant_state.bitsandbytes__{scheme.kind}"] = np.frombuffer(state, np.uint8)
    return parts


def _state(scheme: Scheme, shape: tuple[int, ...], dtype: str, offset: float | None) -> bytes:
    """Return the JSON beside a matrix; blanks at its end make room for the longest offset."""
    state: dict[str, Any] = {
        "quant_type": scheme.kind,
        "blocksize": BLOCK,
        "dtype": CONFIG_NAMES[dtype],
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).ljust(len(json.dumps(state | {"nested_offset": 0})) - 1 + OFFSET_WIDTH).encode()


def blocks_of_four_bits(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (bytes of two codes each, absmax of every block) of values taken row by row: uint8 [n / 2], float32 [n / 64].

    A value half way between two levels goes to the lower one.
    """
    flat = np.ascontiguousarray(weight, np.float32).reshape(-1)
    table = levels(kind)
    order = np.argsort(table, kind="stable").astype(np.uint8)
    middles = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    codes = np.zeros(-(-flat.size // 2) * 2, np.uint8)
    absmax = np.empty(-(-flat.size // BLOCK), np.float32)
    for start in range(0, flat.size, CHUNK):
        scaled, absmax[start // BLOCK : -(-(start + CHUNK) // BLOCK)] = _scaled(
            flat[start : start + CHUNK], BLOCK
        )
        codes[start : start + scaled.size] = order[np.searchsorted(middles, scaled)]
    if flat.size % 2:  # the code that fills the last byte stands for zero
        codes[-1] = order[np.searchsorted(middles, np.float32(0))]
    return codes[0::2] << np.uint8(4) | codes[1::2], absmax


def nested_absmax(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes, scales of every 256) of absmax less their mean: uint8 [blocks], float32 [blocks / 256].

    The nearest level is taken, as on devices; the library's loop for CPUs misses it for one value in 600, close to the
    middle between two levels.
    """
    scaled, scales = _scaled(np.ascontiguousarray(centred, np.float32), NESTED)
    table = dynamic_levels()
    middles = (table[:-1] + table[1:]) / np.float32(2)
    return np.searchsorted(middles, scaled).astype(np.uint8), scales


def _scaled(flat: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (values by the largest of their block, the largest of every block)."""
    full = flat.size // block * block
    blocks = flat[:full].reshape(-1, block)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scaled = blocks * (np.float32(1) / np.maximum(largest, np.float32(1e-38)))[:, None]
        if full == flat.size:
            return np.clip(scaled.reshape(-1), -1, 1), largest
        rest = np.maximum(
            np.abs(flat[full:]).max(), np.float32(1e-38)
        )  # divided by, not multiplied, in the library
        scaled = np.concatenate([scaled.reshape(-1), flat[full:] / rest])
    return np.clip(scaled, -1, 1), np.append(largest, rest)


def rows_of_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes -127 to 127, largest of every row) of a matrix that is first rounded to float16, as readers do.

    Raises:
        InputError: E461 values beyond float16.
    """
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    codes = np.empty(half.shape, np.int8)
    scales = np.empty(len(half), np.float32)
    step = max(1, CHUNK // max(1, half.shape[1]))
    for row in range(0, len(half), step):
        values = half[row : row + step].astype(np.float32)
        largest = np.abs(values).max(axis=1)
        if not np.isfinite(largest).all():
            raise _too_large("beyond 65504, the largest of float16, or not a number")
        with np.errstate(divide="ignore", invalid="ignore"):
            # the reciprocal first: torch divides a number by a tensor so, and the last bit decides at halves
            found = np.rint(values * (np.float32(1) / largest * np.float32(127))[:, None])
        codes[row : row + step] = np.where(largest[:, None] > 0, found, 0).astype(np.int8)
        scales[row : row + step] = largest
    return codes, scales


def _too_large(what: str) -> InputError:
    return InputError("E461", f"a matrix holds values that are {what}; bitsandbytes cannot store it",
                      help="keep it in 16 bits, or look for the damage with: surgeon inspect MODEL --stats")  # fmt: skip


def quantization_config(
    modules: Mapping[str, Scheme | None], double: bool = False, dtype: str = "BF16"
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json.

    Args:
        modules: every linear module of the model (names without ".weight") -> its scheme, None in 16 bits.
        double: double quantization, of four bits.
        dtype: four-bit matrices are multiplied in.

    Raises:
        InputError: E460 no module is quantized, or in more than one way; a name of one that is kept stands for one that
            is quantized, too.
    """
    kinds = {scheme.kind for scheme in modules.values() if scheme is not None}
    if len(kinds) != 1:
        said = " and ".join(sorted(kinds)) or "no module at all"
        raise InputError("E460", f"bitsandbytes stores one kind of numbers in a model, here {said}",
                         help="quantize all modules alike and keep the others in 16 bits")  # fmt: skip
    kind = kinds.pop()
    kept = [name for name, scheme in modules.items() if scheme is None]
    if "lm_head" not in modules:  # tied to the embedding: readers would take it for quantized
        kept.append("lm_head")
    caught = skipped((name for name, scheme in modules.items() if scheme is not None), kept)
    if caught:
        raise InputError(
            "E460", f"the list of modules that stay in 16 bits would take {printable(caught[0])} in, which is quantized",
            where=Where(tensor=printable(caught[0])), help="keep both or none of the two in 16 bits",
        )  # fmt: skip
    four = kind != "int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": kind if four else "fp4",
        "bnb_4bit_compute_dtype": CONFIG_NAMES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": double and four,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
    }


def skipped(names: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Return the names that readers leave in 16 bits by the list of those that are kept.

    transformers takes an entry for a pattern from the beginning up to a dot, and for an ending.
    """
    kept = tuple(kept)
    if not kept:
        return []
    beginnings = re.compile("|".join(rf"(?:{re.escape(name)})(?=\.|$)" for name in kept))
    return [name for name in names if name.endswith(kept) or beginnings.match(name)]


def storable(name: str, shape: Shape, scheme: Scheme, reader: Reader = STOCK) -> str | None:
    """Return why a matrix cannot be stored this way, None when it can.

    Args:
        name: of the plain matrix, ending in ".weight".
        shape: (out, in).
        reader: what reads the model; whether its head is the embedding matters.
    """
    part = part_of(name)
    if part == "expert":
        return ("transformers keeps the experts of a layer in one tensor, which bitsandbytes leaves in 16 bits "
                "without saying so")  # fmt: skip
    if part in ("embedding", "router", "norm"):
        return f"bitsandbytes replaces linear modules only, and this is {'an' if part[0] in 'aeiou' else 'a'} {part}"
    if part == "head" and reader.tied:
        return "it is the embedding, which stays in 16 bits"
    if len(shape) != 2:
        return f"it has {len(shape)} axes; linear modules have 2"
    if scheme not in (NF4, FP4, INT8):
        return f"{scheme.name} is not one of nf4, fp4 and int8, whose groups and zero points are fixed"
    if scheme.kind != "int8" and (shape[1] % BLOCK or shape[0] % ROWS):
        return (
            f"its {shape[0]} x {shape[1]} values do not fill blocks: on processors readers take rows of a multiple of "
            f"{BLOCK} values, else they are wrong or fail, and a multiple of {ROWS} rows"
        )
    return None


def refusals(
    matrices: Mapping[str, tuple[Shape, Scheme | None]], reader: Reader = STOCK, dense_only: bool = False
) -> list[SurgeonError]:
    """Return everything that speaks against a whole model, E461.

    Args:
        matrices: name of every plain matrix of a linear module, those of experts included -> (shape, its scheme, None in
            16 bits).
        dense_only: take a mixture of experts whose experts stay in 16 bits.
    """
    experts = [name for name in matrices if part_of(name) == "expert"]
    if experts and not dense_only:
        values = {name: math.prod(shape) for name, (shape, _) in matrices.items()}
        share = sum(values[name] for name in experts) / sum(values.values())
        return [InputError(
            "E461", f"bitsandbytes cannot store a mixture of experts: its readers leave the experts, {share:.0%} of the "
            "matrices here, in 16 bits without saying so",
            where=Where(tensor=printable(experts[0])), help="store it in the auto-round format, which takes every expert by itself",
        )]  # fmt: skip
    found: list[SurgeonError] = []
    single = (
        (name, reason)
        for name, (shape, scheme) in matrices.items()
        if scheme and (reason := storable(name, shape, scheme, reader))
    )
    for name, more, reason in told_once(single):
        found.append(InputError("E461", f"{printable(name)}{more and f' and {more}'} cannot be stored by bitsandbytes: {reason}",
                                where=Where(tensor=printable(name)), help="keep it in 16 bits"))  # fmt: skip
    kinds = sorted({scheme.name for _, scheme in matrices.values() if scheme is not None})
    if len(kinds) > 1:
        found.append(InputError("E461", f"bitsandbytes stores one kind of numbers in a model, here {' and '.join(kinds)}",
                                help="quantize all modules alike and keep the others in 16 bits"))  # fmt: skip
    return found


def choices(
    shapes: Mapping[str, Shape], menu: Sequence[Scheme | None], reader: Reader = STOCK
) -> list[list[Choice]]:
    """Return what an allocator may choose from: an alternative for each kind of numbers, with every matrix.

    Args:
        shapes: name of every plain matrix of a linear module -> shape.
        menu: schemes to choose from, and None. Where a matrix cannot be stored and None is not among them, it has no choice.
    """
    kinds = [scheme for scheme in (NF4, FP4, INT8) if scheme in menu]
    kept = (None,) if None in menu else ()
    return [
        [
            Choice((name,), ((kind,) if storable(name, shape, kind, reader) is None else ()) + kept)
            for name, shape in shapes.items()
        ]
        for kind in kinds
    ]
