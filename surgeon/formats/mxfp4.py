"""Four-bit floats in blocks of 32 with a shared exponent, as gpt-oss stores its stacked experts.

    W[e, j, i] = q[e, i, j] * 2**(s[e, i, j // 32] - 127)

``NAME_blocks`` [experts, outputs, blocks, 16] holds two values a byte, the lower half first; ``NAME_scales`` [experts,
outputs, blocks] the exponents. Values are those of E2M1 in the OCP microscaling formats 1.0. The plain model keeps such a
stack the other way round, ``NAME`` [experts, inputs, outputs]. Every product is exact in bfloat16 but for exponents of
models that do not exist; those round and overflow as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.formats.encoded import BIAS, BLOCK, Config, Encoded, Format, misfit, missing, strips
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import bf16_bits

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = 32
"""Values of a block."""


@cache
def pairs() -> np.ndarray:
    """Return the two bfloat16 values of every (exponent, byte), as bits: uint32 [65536], the first value in the lower half."""
    values = np.array([*E2M1, *(-v for v in E2M1)])
    with np.errstate(over="ignore"):
        scaled = np.ldexp(values, np.arange(256)[:, None] - BIAS).astype(np.float32)
    bits = bf16_bits(scaled).reshape(256, 1, 16).astype(np.uint32)
    byte = np.arange(256)
    table = (bits[:, 0, byte & 15] | bits[:, 0, byte >> 4] << np.uint32(16)).reshape(-1)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Packed:
    """A stack of matrices in blocks of four-bit floats.

    Attributes:
        checkpoint, name, parts: where it lies; the payload and its exponents.
        shape: [experts, inputs, outputs], of the plain model.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int, int]
    parts: tuple[str, str]
    dtype: str = "BF16"

    @property
    def scheme(self) -> Scheme:
        return Scheme("mxfp4", 4, 0)

    @property
    def words(self) -> str:
        return "mxfp4"

    @property
    def _columns(self) -> int:
        """Inputs decoded at once: whole blocks, as many as divide the matrix evenly."""
        _, inputs, outputs = self.shape
        blocks = inputs // VALUES
        most = max(1, BLOCK // (VALUES * outputs))
        return VALUES * max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= most)

    @property
    def granularity(self) -> int:
        return self._columns * self.shape[2]

    @property
    def beside(self) -> int:
        return 2 * self.granularity + (16 << 20)

    def read(self, start: int, stop: int) -> np.ndarray:
        _, inputs, outputs = self.shape
        step = self._columns
        out = np.empty(stop - start, dtype=np.uint16)
        row = start // (step * outputs) * step  # rows of the plain stack, counted through all experts
        while row * outputs < stop:
            low, high = max(start, row * outputs), min(stop, (row + step) * outputs)
            values = self._rows(row // inputs, row % inputs, step)
            out[low - start : high - start] = values.reshape(-1)[low - row * outputs : high - row * outputs]
            row += step
        return out

    def _rows(self, expert: int, first: int, count: int) -> np.ndarray:
        """Return rows [first, first + count) of one expert's plain matrix: uint16 [count, outputs]."""
        _, inputs, outputs = self.shape
        blocks = inputs // VALUES
        low, high = first // VALUES, (first + count) // VALUES
        payload, exponents = self.parts
        whole = expert * outputs * blocks
        found = np.empty((count, outputs), dtype=np.uint16)
        for place, strip in strips(self.checkpoint, payload, 16 * whole, outputs, 16 * blocks):
            last = place + len(strip)
            scales = self.checkpoint.read(exponents, whole + place * blocks, whole + last * blocks)
            codes = scales.reshape(-1, blocks)[:, low:high, None].astype(np.uint16) << np.uint16(8)
            codes = codes | strip[:, 16 * low : 16 * high].reshape(-1, high - low, 16)
            values = np.take(pairs(), codes.reshape(len(strip), -1)).view(np.uint16)
            found[:, place:last] = values.T
        return found


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    for payload, info in checkpoint.tensors.items():
        if not payload.endswith("_blocks") or info.dtype != "U8":
            continue
        name = payload.removesuffix("_blocks")
        exponents = f"{name}_scales"
        if exponents not in checkpoint.tensors:
            missing(checkpoint, payload, exponents)
        scales = checkpoint.tensors[exponents]
        fits = len(info.shape) == 4 and info.shape[3] == VALUES // 2 and info.shape[:3] == scales.shape
        if not fits or scales.dtype != "U8" or not info.elements:
            misfit(checkpoint, payload, exponents)
        experts, outputs, blocks, _ = info.shape
        yield Packed(checkpoint, name, (experts, blocks * VALUES, outputs), (payload, exponents))


FORMAT = Format("mxfp4", frozenset({"mxfp4"}), _find)
