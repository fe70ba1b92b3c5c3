"""Eight-bit floats times scales: one scale a block of rows and columns, a row, or a whole matrix.

    W[i, j] = q[i, j] * s[i // m, j // n]

DeepSeek-V3 stores ``weight`` (F8_E4M3) with ``weight_scale_inv`` for blocks of 128 x 128, the last ones cut off where
128 does not divide the matrix; the suffix notwithstanding, it multiplies (DeepSeek-AI 2024, 2412.19437, section 3.3).
compressed-tensors' "float-quantized", fbgemm and ModelOpt store ``weight_scale`` for blocks, rows or the matrix.
Products are taken in float32 and rounded once, as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import TensorInfo
from surgeon.formats.encoded import (
    CHUNK,
    Config,
    Encoded,
    Format,
    misfit,
    missing,
    numbers,
    plain_dtype,
    row_chunks,
    unreadable,
)
from surgeon.formats.scheme import Scheme

SCALES = ("_scale_inv", "_scale")
SCALE_TYPES = frozenset({"F32", "F16", "BF16", "U8", "F8_E8M0"})
MANTISSA = {"F8_E4M3": 3, "F8_E5M2": 2}


@cache
def eight_bit_floats(code: str) -> np.ndarray:
    """Return the values of all 256 bytes, float32.

    E4M3: exponent bias 7, no infinities, NaN only where all bits but the sign are set. E5M2: bias 15, as IEEE 754
    (Micikevicius et al. 2022, 2209.05433).
    """
    bits = MANTISSA[code]
    bias = (1 << (6 - bits)) - 1
    byte = np.arange(256)
    exponent, fraction = (byte >> bits) & ((1 << (7 - bits)) - 1), byte & ((1 << bits) - 1)
    magnitude = np.where(
        exponent == 0,
        np.ldexp(fraction, 1 - bias - bits),
        np.ldexp((1 << bits) + fraction, exponent - bias - bits),
    )
    if code == "F8_E4M3":
        magnitude[(byte & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == 31
        magnitude[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    table = np.where(byte < 128, magnitude, -magnitude).astype(np.float32)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Scaled:
    """A matrix, or a stack of them, of bytes that are multiplied by scales.

    Attributes:
        checkpoint, name, scales, shape, dtype, parts: where it lies and what it is.
        block: (rows, columns) that share a scale.
        grid: (rows, columns) of scales of one matrix.
    """

    checkpoint: Checkpoint
    name: str
    scales: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[str, ...]
    block: tuple[int, int]
    grid: tuple[int, int]

    @property
    def scheme(self) -> Scheme:
        return Scheme("float8", 8, -1)

    @property
    def words(self) -> str:
        if self.block == self.shape[-2:]:
            return "float8, a scale a matrix"
        if self.block == (1, self.shape[-1]):
            return "float8, a scale a row"
        return f"float8, blocks of {self.block[0]} x {self.block[1]}"

    @property
    def granularity(self) -> int:
        return self.shape[-1]

    @property
    def beside(self) -> int:
        return 16 * max(CHUNK, self.shape[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        return row_chunks(self.shape, self.dtype, start, stop, self._rows)

    def _rows(self, first: int, last: int) -> np.ndarray:
        rows, width = self.shape[-2:]
        down, across = self.grid
        table = eight_bit_floats(self.checkpoint.tensors[self.name].dtype)
        raw = self.checkpoint.read(self.name, first * width, last * width)
        values = np.take(table, raw).reshape(-1, width)
        # Rows of scales, counted through the whole stack: a matrix may end inside a block.
        row = np.arange(first, last)
        at = row // rows * down + row % rows // self.block[0]
        scales = numbers(self.checkpoint, self.scales, int(at[0]) * across, (int(at[-1]) + 1) * across)
        scales = scales.reshape(-1, across)[at - at[0]]
        if across > 1:
            scales = np.repeat(scales, self.block[1], axis=1)[:, :width]
        with np.errstate(over="ignore", invalid="ignore"):  # as its readers: overflow is infinity
            values *= scales
        return values


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    for name, info in checkpoint.tensors.items():
        if info.dtype not in MANTISSA or name.endswith(SCALES):
            continue
        scales = next((name + suffix for suffix in SCALES if name + suffix in checkpoint.tensors), None)
        if scales is None:
            missing(checkpoint, name, name + SCALES[0])
        if f"{name}_zero_point" in checkpoint.tensors:
            raise unreadable(checkpoint, name, "eight-bit floats with zero points")
        if checkpoint.tensors[scales].dtype not in SCALE_TYPES or len(info.shape) < 2 or not info.elements:
            misfit(checkpoint, name, scales)
        block, grid = _blocks(checkpoint, info, checkpoint.tensors[scales], _block_size(config))
        yield Scaled(
            checkpoint, name, scales, info.shape, plain_dtype(checkpoint, scales), (name, scales), block, grid
        )


def _block_size(config: Config) -> tuple[int, int] | None:
    """Return the block config.json speaks of, in transformers' words or in those of compressed-tensors."""
    groups = config.get("config_groups")
    entries = [config.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        entries.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for entry in entries:
        if (
            isinstance(entry, (list, tuple))
            and len(entry) == 2
            and all(isinstance(n, int) and n > 0 for n in entry)
        ):
            return entry[0], entry[1]
    return None


def _blocks(
    checkpoint: Checkpoint, info: TensorInfo, scales: TensorInfo, size: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (rows, columns) of a block and of the grid of scales, from the shapes of both tensors."""
    *stack, rows, columns = info.shape
    count = math.prod(stack)
    if scales.elements == 1 and count == 1:
        return (rows, columns), (1, 1)
    if list(scales.shape) in (stack, [*stack, 1]) and stack:
        return (rows, columns), (1, 1)
    if scales.shape == (rows,) and not stack:
        return (1, columns), (rows, 1)
    if list(scales.shape[:-2]) != stack or len(scales.shape) != len(info.shape):
        misfit(checkpoint, info.name, scales.name)
    down, across = scales.shape[-2:]
    if size is not None and (down, across) == (-(-rows // size[0]), -(-columns // size[1])):
        return size, (down, across)
    if down in (1, rows) and across in (1, columns):
        return (rows // down, columns // across), (down, across)
    if size is not None or not down or not across or rows % down or columns % across:
        misfit(checkpoint, info.name, scales.name)
    return (rows // down, columns // across), (down, across)


FORMAT = Format("fp8", frozenset({"fp8", "compressed-tensors", "fbgemm_fp8", "modelopt"}), _find)
