"""Packed integers that lie the other way round than a plain matrix, inputs along the rows: what GPTQ and AWQ files share.

W[o, i] = (q[i, o] - z[g, o]) * s[g, o]        g the group of input i
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.formats.compressed_integers import unpacked
from surgeon.formats.encoded import BLOCK, groups_of, numbers, strips
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import narrow

LANES = 32
"""Outputs that a read starts and ends at a multiple of, so that no packed word is cut, whatever its width."""

Unpack = Callable[[np.ndarray], np.ndarray]
"""Words, int32 [rows, words] -> codes, uint8."""


@dataclass(frozen=True)
class InputMajor:
    """A matrix [out, in] whose codes are stored input by input.

    Attributes:
        checkpoint, name, shape, dtype: where it lies and what it is.
        parts: packed codes, packed zero points, scales [groups, out]; the inputs' groups where they are stored.
        bits: of a code.
        group: inputs that share a scale, where their groups are not stored.
        down: whether a word of codes holds several inputs of one output, rather than several outputs of one input.
        unpack: of words that hold several outputs, the codes in order.
        zero: from a stored zero point to the one that is subtracted.
        symmetric: whether all zero points are said to be in the middle.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int]
    dtype: str
    parts: tuple[str, ...]
    bits: int
    group: int
    down: bool
    unpack: Unpack
    zero: Callable[[np.ndarray], np.ndarray]
    symmetric: bool = True

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", self.bits, -1 if self.group >= self.shape[1] else self.group, self.symmetric)

    @property
    def words(self) -> str:
        return self.scheme.name

    @cached_property
    def _step(self) -> int:
        """Outputs decoded at once: every read passes over all codes, so not too few."""
        return max(LANES, BLOCK // self.shape[1] // LANES * LANES)

    @property
    def granularity(self) -> int:
        return self._step * self.shape[1]

    @property
    def beside(self) -> int:
        return 2 * self.granularity + (32 << 20)

    def read(self, start: int, stop: int) -> np.ndarray:
        outputs, width = self.shape
        out = np.empty(stop - start, dtype=DTYPES[self.dtype].carrier)
        for row in range(start // (self._step * width) * self._step, -(-stop // width), self._step):
            last = min(row + self._step, outputs)
            low, high = max(start, row * width), min(stop, last * width)
            found = self._rows(row, last).reshape(-1)
            out[low - start : high - start] = found[low - row * width : high - row * width]
        return out

    def _rows(self, first: int, last: int) -> np.ndarray:
        """Return rows of the plain matrix, in the carrier type of ``dtype``; ``first`` is a multiple of LANES."""
        outputs, inputs = self.shape
        _, packed_zeros, scale_name = self.parts[:3]
        groups = self.checkpoint.tensors[scale_name].shape[0]
        group = groups_of(
            self.checkpoint, self.parts[3] if len(self.parts) > 3 else None, inputs, groups, self.group
        )
        scales = np.empty((groups, last - first), np.float32)
        for place, strip in self._floats(scale_name, groups, outputs):
            scales[place : place + len(strip)] = strip[:, first:last]
        zeros = np.empty((groups, last - first), np.float32)
        for place, strip in strips(self.checkpoint, packed_zeros, 0, groups, outputs * self.bits // 32):
            zeros[place : place + len(strip)] = self.zero(self._across(strip, first, last))
        found = np.empty((last - first, inputs), dtype=DTYPES[self.dtype].carrier)
        for place, codes in self._codes(first, last):
            at = group[place : place + len(codes)]
            values = codes.astype(np.float32)
            values -= zeros[at]
            with np.errstate(over="ignore", invalid="ignore"):
                values *= scales[at]
            found[:, place : place + len(codes)] = narrow(values, self.dtype).T
        return found

    def _floats(self, name: str, rows: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
        step = max(1, (1 << 18) // width)
        for row in range(0, rows, step):
            last = min(row + step, rows)
            yield row, numbers(self.checkpoint, name, row * width, last * width).reshape(-1, width)

    def _across(self, words: np.ndarray, first: int, last: int) -> np.ndarray:
        """Return the codes of some outputs from words that hold several outputs each."""
        low, high = first * self.bits // 32, -(-last * self.bits // 32)
        return self.unpack(words[:, low:high])[:, : last - first]

    def _codes(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first input, codes [inputs, last - first]) over all inputs."""
        outputs, inputs = self.shape
        payload = self.parts[0]
        if not self.down:
            for place, strip in strips(self.checkpoint, payload, 0, inputs, outputs * self.bits // 32):
                yield place, self._across(strip, first, last)
            return
        if 32 % self.bits:  # codes reach from one word into the next
            words = inputs * self.bits // 32
            for place, strip in strips(self.checkpoint, payload, 0, words, outputs, self.bits):
                yield place * 32 // self.bits, unpacked(strip[:, first:last].T, self.bits).T
            return
        each = 32 // self.bits
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)[:, None]
        mask = np.uint32((1 << self.bits) - 1)
        for place, strip in strips(self.checkpoint, payload, 0, inputs // each, outputs):
            words = np.ascontiguousarray(strip[:, first:last]).view(np.uint32)
            codes = (words[:, None] >> shifts) & mask
            yield place * each, codes.reshape(-1, last - first).astype(np.uint8)
