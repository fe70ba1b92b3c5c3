"""Four-bit floats as compressed-tensors stores them, read as plain numbers: NVFP4 and MXFP4.

    NVFP4    W[o, i] = e2m1(code[o, i]) * (e4m3(scale[o, g]) / shared)    16 inputs a group
    MXFP4    W[o, i] = e2m1(code[o, i]) * 2**(scale[o, g] - 127)          32 inputs a group

`surgeon.formats.float4` tells how they are stored. Readers unpack both to bfloat16: products are taken in float32 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.formats.encoded import (
    CHUNK,
    Config,
    Encoded,
    Format,
    exponents,
    misfit,
    missing,
    numbers,
    row_chunks,
    unreadable,
)
from surgeon.formats.float4 import GROUP, MXFP4, NVFP4
from surgeon.formats.fp8_block import eight_bit_floats
from surgeon.formats.mxfp4 import E2M1
from surgeon.formats.scheme import Scheme

VALUES = np.array([*E2M1, *(-v for v in E2M1)], dtype=np.float32)


@dataclass(frozen=True)
class FourBitFloats:
    """A matrix [out, in] of four-bit floats.

    Attributes:
        checkpoint, name, shape, parts: where it lies and what it is; payload, scales and, for NVFP4, the shared scale.
        scheme: NVFP4 or MXFP4.
        dtype: which readers unpack to.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    scheme: Scheme
    dtype: str = "BF16"

    @property
    def words(self) -> str:
        return self.scheme.name

    @property
    def granularity(self) -> int:
        return self.shape[1]

    @property
    def beside(self) -> int:
        return 16 * max(CHUNK, self.shape[1])

    def read(self, start: int, stop: int) -> np.ndarray:
        return row_chunks(self.shape, self.dtype, start, stop, self._rows)

    def _rows(self, first: int, last: int) -> np.ndarray:
        width, size = self.shape[1], GROUP[self.scheme.kind]
        packed = self.checkpoint.read(self.parts[0], first * width // 2, last * width // 2)
        codes = np.empty((last - first, width), np.uint8)
        packed = packed.reshape(last - first, -1)
        codes[:, ::2], codes[:, 1::2] = packed & np.uint8(15), packed >> np.uint8(4)
        groups = width // size
        raw = self.checkpoint.read(self.parts[1], first * groups, last * groups).reshape(-1, groups)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if self.scheme == NVFP4:
                scales = np.take(eight_bit_floats("F8_E4M3"), raw) / numbers(
                    self.checkpoint, self.parts[2], 0, 1
                )
            else:
                scales = exponents(raw)
            return np.take(VALUES, codes) * np.repeat(scales, size, axis=1)


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    for payload, info in checkpoint.tensors.items():
        if not payload.endswith(".weight_packed") or info.dtype != "U8":
            continue
        name = payload.removesuffix("_packed")
        scales, shared = f"{name}_scale", f"{name}_global_scale"
        if scales not in checkpoint.tensors:
            missing(checkpoint, payload, scales)
        held = checkpoint.tensors[scales]
        if len(info.shape) != 2 or not info.elements:
            misfit(checkpoint, payload, scales)
        rows, columns = info.shape[0], 2 * info.shape[1]
        scheme = NVFP4 if held.dtype == "F8_E4M3" else MXFP4
        if scheme == MXFP4 and held.dtype not in ("U8", "F8_E8M0"):
            misfit(checkpoint, payload, scales)
        if f"{name}_zero_point" in checkpoint.tensors:
            raise unreadable(checkpoint, payload, "four-bit floats with zero points")
        if (
            scheme == MXFP4
            and held.shape == (rows, info.shape[1] * 8 // 6 // 32)
            and columns != 32 * held.shape[1]
        ):
            raise unreadable(checkpoint, payload, "floats of six bits")
        if held.shape != (rows, columns // GROUP[scheme.kind]) or columns % GROUP[scheme.kind]:
            misfit(checkpoint, payload, scales)
        parts = [payload, scales]
        if scheme == NVFP4:
            if shared not in checkpoint.tensors:
                missing(checkpoint, payload, shared)
            if checkpoint.tensors[shared].elements != 1 or checkpoint.tensors[shared].dtype != "F32":
                misfit(checkpoint, payload, shared)
            parts.append(shared)
        yield FourBitFloats(checkpoint, name, (rows, columns), tuple(parts), scheme)


FORMAT = Format("compressed-tensors four-bit floats", frozenset({"compressed-tensors"}), _find)
