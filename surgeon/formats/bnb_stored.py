"""Four and eight bits of bitsandbytes, read as plain numbers; `surgeon.formats.bnb` tells how they are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import CODES, DTYPES
from surgeon.formats.bnb import FP4, INT8, NF4, levels
from surgeon.formats.encoded import (
    CHUNK,
    Config,
    Encoded,
    Format,
    misfit,
    missing,
    numbers,
    row_chunks,
    unreadable,
)
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import narrow

BYTE = np.float32(7.874015718698502e-3)
"""1 / 127, the step of a row of int8 whose largest value is 1, as the library rounds it."""


@dataclass(frozen=True)
class Nested:
    """How the absmax of blocks are stored that are quantized themselves.

    Attributes:
        scales: name of the scales, one for ``block`` of them.
        table: name of the 256 levels.
        block: absmax that share a scale.
        offset: added to all of them.
    """

    scales: str
    table: str
    block: int
    offset: np.float32


@dataclass(frozen=True)
class FourBits:
    """A tensor whose values are levels of a table times the absmax of their block.

    Attributes:
        checkpoint, name, shape, dtype, parts: where it lies and what it is; payload and absmax first.
        kind: "nf4" or "fp4".
        block: values, row by row, that share an absmax; even.
        nested: how the absmax are stored, None as they are.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[str, ...]
    kind: str
    block: int
    nested: Nested | None

    @property
    def scheme(self) -> Scheme:
        return NF4 if self.kind == "nf4" else FP4

    @property
    def words(self) -> str:
        return self.kind if self.nested is None else f"{self.kind}, scales quantized too"

    @property
    def granularity(self) -> int:
        return self.shape[-1]

    @property
    def beside(self) -> int:
        return 16 * (CHUNK + self.block)

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, dtype=DTYPES[self.dtype].carrier)
        step = max(1, CHUNK // self.block) * self.block
        for first in range(start // self.block * self.block, stop, step):
            last = min(first + step, stop)
            values = narrow(self._values(first, last), self.dtype)
            low = max(start, first)
            out[low - start : last - start] = values[low - first :]
        return out

    def _values(self, first: int, last: int) -> np.ndarray:
        """Return values [first, last), float32; ``first`` is where a block begins."""
        table = levels(self.kind)
        low, high = first // 2, -(-last // 2)
        packed = self._bytes(low, high)
        values = np.empty(2 * (high - low), np.float32)
        values[0::2], values[1::2] = table[packed >> np.uint8(4)], table[packed & np.uint8(15)]
        absmax = self._absmax(first // self.block, -(-last // self.block))
        values = values[: last - first]
        with np.errstate(over="ignore", invalid="ignore"):
            values *= np.repeat(absmax, self.block)[: last - first]
        return values

    def _bytes(self, low: int, high: int) -> np.ndarray:
        """Return packed bytes [low, high), whatever the type they are stored under."""
        size = DTYPES[self.checkpoint.tensors[self.parts[0]].dtype].bits // 8
        raw = self.checkpoint.read(self.parts[0], low // size, -(-high // size))
        return np.ascontiguousarray(raw).view(np.uint8)[low % size : low % size + high - low]

    def _absmax(self, low: int, high: int) -> np.ndarray:
        """Return the absmax of blocks [low, high), float32."""
        if self.nested is None:
            return numbers(self.checkpoint, self.parts[1], low, high)
        size = self.nested.block
        codes = self.checkpoint.read(self.parts[1], low, high)
        first = low // size
        scales = np.repeat(numbers(self.checkpoint, self.nested.scales, first, -(-high // size)), size)
        table = numbers(self.checkpoint, self.nested.table, 0, 256)
        return table[codes] * scales[low - first * size : high - first * size] + self.nested.offset


@dataclass(frozen=True)
class EightBits:
    """A matrix of int8 whose rows are multiplied by a number each.

    Attributes:
        checkpoint, name, shape, parts: where it lies and what it is; payload and numbers first.
        dtype: float16, which readers multiply in.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    dtype: str = "F16"

    @property
    def scheme(self) -> Scheme:
        return INT8

    @property
    def words(self) -> str:
        return "int8, rows of bitsandbytes"

    @property
    def granularity(self) -> int:
        return self.shape[1]

    @property
    def beside(self) -> int:
        return 16 * max(CHUNK, self.shape[1])

    def read(self, start: int, stop: int) -> np.ndarray:
        return row_chunks(self.shape, self.dtype, start, stop, self._rows)

    def _rows(self, first: int, last: int) -> np.ndarray:
        width = self.shape[1]
        codes = self.checkpoint.read(self.parts[0], first * width, last * width).reshape(-1, width)
        scales = numbers(self.checkpoint, self.parts[1], first, last)
        return codes.astype(np.float32) * scales[:, None] * BYTE


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    for name, info in checkpoint.tensors.items():
        for kind in ("nf4", "fp4"):
            if f"{name}.quant_state.bitsandbytes__{kind}" in checkpoint.tensors:
                yield _four_bits(checkpoint, name, kind)
        stem = name.removesuffix("weight")
        if info.dtype == "I8" and stem != name and len(info.shape) == 2:
            yield _eight_bits(checkpoint, name, stem)


def _four_bits(checkpoint: Checkpoint, name: str, kind: str) -> FourBits:
    packed = f"{name}.quant_state.bitsandbytes__{kind}"
    state = _state(checkpoint, packed)
    try:
        shape, dtype = tuple(int(n) for n in state["shape"]), CODES[state["dtype"]]
        block = int(state["blocksize"])
        nested = None if "nested_offset" not in state else Nested(
            f"{name}.nested_absmax", f"{name}.nested_quant_map", int(state["nested_blocksize"]),
            np.float32(state["nested_offset"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise unreadable(checkpoint, name, "a quant_state without shape, dtype and blocksize") from None
    parts = [name, f"{name}.absmax", f"{name}.quant_map", packed]
    parts += [nested.scales, nested.table] if nested else []
    for part in parts:
        if part not in checkpoint.tensors:
            missing(checkpoint, name, part)
    count = math.prod(shape)
    if not shape or min(shape) < 1 or block < 2 or block % 2 or (nested and nested.block < 1):
        misfit(checkpoint, name, packed)
    blocks = -(-count // block)
    sizes = {f"{name}.absmax": blocks}
    sizes |= {nested.scales: -(-blocks // nested.block), nested.table: 256} if nested else {}
    for part, size in sizes.items():
        wanted = "U8" if nested and part.endswith(".absmax") else "F32"
        if checkpoint.tensors[part].elements != size or checkpoint.tensors[part].dtype != wanted:
            misfit(checkpoint, name, part)
    payload = checkpoint.tensors[name]
    size = DTYPES[payload.dtype].bits // 8
    if not 0 <= payload.elements * size - -(-count // 2) < size:
        misfit(checkpoint, packed, name)
    return FourBits(checkpoint, name, shape, dtype, tuple(parts), kind, block, nested)


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return what is stored as JSON beside a tensor."""
    raw = checkpoint.read(name, 0, checkpoint.tensors[name].elements)
    try:
        state = json.loads(bytes(raw))
    except ValueError:
        state = None
    if raw.dtype != np.uint8 or not isinstance(state, dict):
        raise unreadable(checkpoint, name, "a quant_state that is no JSON object")
    return state


def _eight_bits(checkpoint: Checkpoint, name: str, stem: str) -> EightBits:
    info, scales, form = checkpoint.tensors[name], f"{stem}SCB", f"{stem}weight_format"
    if scales not in checkpoint.tensors:
        missing(checkpoint, name, scales)
    held = checkpoint.tensors[scales]
    if held.dtype != "F32" or held.shape != info.shape[:1]:
        misfit(checkpoint, name, scales)
    parts = [name, scales]
    if form in checkpoint.tensors:
        if checkpoint.tensors[form].elements != 1 or int(checkpoint.read(form, 0, 1)[0]):
            raise unreadable(checkpoint, name, "int8 values in an order made for one kind of device")
        parts.append(form)
    return EightBits(checkpoint, name, (info.shape[0], info.shape[1]), tuple(parts))


FORMAT = Format("bitsandbytes", frozenset({"bitsandbytes"}), _find)
