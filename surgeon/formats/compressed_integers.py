"""Integers times scales as compressed-tensors stores them: "pack-quantized" and "int-quantized".

    W[o, i] = (q[o, i] - z[o, g]) * s[o, g]        g the group of input i

``weight_packed`` int32 [out, ceil(in * bits / 32)] holds a row's codes one after the other from the lowest bit on, as
q + 2**(bits - 1); ``weight_shape`` [2] the plain shape; ``weight_scale`` [out, groups]; ``weight_zero_point``, where there
is one, is packed the same way along the outputs, or stored as int8. ``weight_g_idx`` gives the groups of inputs that were
reordered. "int-quantized" stores ``weight`` itself as int8. Layout: the compressed-tensors library, 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.formats.declared_groups import CompressedTensors
from surgeon.formats.encoded import (
    CHUNK,
    Config,
    Encoded,
    Format,
    group_sizes,
    groups_of,
    misfit,
    missing,
    numbers,
    plain_dtype,
    row_chunks,
    unreadable,
)
from surgeon.formats.scheme import Scheme
from surgeon.formats.storage import Storage

BITS = (2, 4, 8)
"""Widths that divide a byte, which the library packed the same way in all its versions; 3, 5, 6 and 7 bits since 0.20."""


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in little-endian int32 words [..., n]: uint8 [..., n * 32 // bits], the lowest bits first."""
    if 8 % bits:
        return _streamed(words, bits)
    packed = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _streamed(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack codes that may reach from one word into the next: 32 of them fill ``bits`` words."""
    count = words.shape[-1]
    padded = np.zeros((*words.shape[:-1], -(-count // bits) * bits), np.uint32)
    padded[..., :count] = np.ascontiguousarray(words, dtype="<i4").view(np.uint32)
    padded = padded.reshape(*words.shape[:-1], -1, bits)
    codes = np.empty((*padded.shape[:-1], 32), np.uint8)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        code = padded[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | padded[..., word + 1] << np.uint32(32 - shift)
        codes[..., lane] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., : count * 32 // bits]


@dataclass(frozen=True)
class Integers:
    """A matrix [out, in] of integers that are multiplied by scales.

    Attributes:
        checkpoint, name, shape, dtype, parts: where it lies and what it is.
        bits: of a packed code; 0 where every value is an int8.
        scales: name of the scales, [out, groups].
        zeros: name of the zero points, None without.
        order: name of the inputs' groups, None where inputs of a group lie side by side.
        group: inputs that share a scale.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int]
    dtype: str
    parts: tuple[str, ...]
    bits: int
    scales: str
    zeros: str | None
    order: str | None
    group: int

    @property
    def scheme(self) -> Scheme:
        return Scheme("int", self.bits or 8, -1 if self._groups == 1 else self.group, self.zeros is None)

    @property
    def words(self) -> str:
        return f"{self.scheme.name}, a scale a matrix" if self._whole else self.scheme.name

    @property
    def granularity(self) -> int:
        return self.shape[1]

    @property
    def beside(self) -> int:
        return 24 * max(CHUNK, self.shape[1])

    def read(self, start: int, stop: int) -> np.ndarray:
        group = groups_of(self.checkpoint, self.order, self.shape[1], self._groups, self.group)
        return row_chunks(
            self.shape, self.dtype, start, stop, lambda first, last: self._rows(first, last, group)
        )

    @property
    def _groups(self) -> int:
        return max(1, self.checkpoint.tensors[self.scales].elements // self.shape[0])

    @property
    def _whole(self) -> bool:
        """Whether there is one scale for the matrix."""
        return self.checkpoint.tensors[self.scales].elements == 1

    def _rows(self, first: int, last: int, group: np.ndarray) -> np.ndarray:
        groups = self._groups
        values = self._codes(first, last).astype(np.float32)
        if self.zeros is not None:
            values -= self._zero_points(self.zeros, first, last)[:, group]
        if self._whole:
            return values * numbers(self.checkpoint, self.scales, 0, 1)
        scales = numbers(self.checkpoint, self.scales, first * groups, last * groups).reshape(-1, groups)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= scales if groups == 1 else scales[:, group]
        return values

    def _codes(self, first: int, last: int) -> np.ndarray:
        """Return rows of codes, as signed numbers: int8 or int16 [last - first, in]."""
        payload = self.parts[0]
        width = self.checkpoint.tensors[payload].shape[1]
        raw = self.checkpoint.read(payload, first * width, last * width).reshape(-1, width)
        if not self.bits:
            return raw
        return unpacked(raw, self.bits)[:, : self.shape[1]].astype(np.int16) - (1 << (self.bits - 1))

    def _zero_points(self, zeros: str, first: int, last: int) -> np.ndarray:
        """Return the zero points of some rows: float32 [last - first, groups]."""
        groups = self._groups
        if self._whole:
            return self.checkpoint.read(zeros, 0, 1).astype(np.float32).reshape(1, 1)
        if self.checkpoint.tensors[zeros].dtype == "I8":
            raw = self.checkpoint.read(zeros, first * groups, last * groups)
            return raw.reshape(-1, groups).astype(np.float32)
        each = 32 // self.bits
        low, high = first // each, -(-last // each)
        words = self.checkpoint.read(zeros, low * groups, high * groups).reshape(-1, groups)
        codes = unpacked(words.T, self.bits).T[first - low * each : last - low * each]
        return codes.astype(np.float32) - (1 << (self.bits - 1))


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    declared = CompressedTensors(config) if isinstance(config.get("config_groups"), dict) else None
    for payload, info in checkpoint.tensors.items():
        packed = payload.endswith(".weight_packed") and info.dtype == "I32"
        whole = payload.endswith(".weight") and info.dtype == "I8"
        if (not packed and not whole) or len(info.shape) != 2:
            continue
        name = payload.removesuffix("_packed")
        scales, zeros, order = f"{name}_scale", f"{name}_zero_point", f"{name}_g_idx"
        if scales not in checkpoint.tensors:
            missing(checkpoint, payload, scales)
        shape = _shape(checkpoint, payload, f"{name}_shape") if packed else (info.shape[0], info.shape[1])
        said = declared.of(name.removesuffix(".weight")).storage if declared else None
        bits = _bits(checkpoint, payload, shape, said, declared) if packed else 0
        held = checkpoint.tensors[scales]
        groups = max(1, held.elements // max(1, shape[0]))
        whole = held.elements == 1 and (said is None or said.group == 0)
        if held.dtype not in ("F32", "F16", "BF16") or not (
            whole or held.shape in ((shape[0], groups), (shape[0],))
        ):
            misfit(checkpoint, payload, scales)
        parts = [payload, scales]
        if packed:
            parts.append(f"{name}_shape")
        if zeros in checkpoint.tensors:
            _check_zeros(checkpoint, scales, zeros, shape[0], groups, bits, whole)
            parts.append(zeros)
        if order in checkpoint.tensors:
            if checkpoint.tensors[order].shape != shape[1:]:
                misfit(checkpoint, payload, order)
            parts.append(order)
        group = (
            said.group
            if said and said.group > 0
            else group_sizes({}, shape[1], groups)
            if said
            else group_sizes(config, shape[1], groups)
        )
        if not group or -(-shape[1] // group) != groups:
            misfit(checkpoint, payload, scales)
        yield Integers(
            checkpoint, name, shape, plain_dtype(checkpoint, scales), tuple(parts), bits, scales,
            zeros if zeros in parts else None, order if order in parts else None, group,
        )  # fmt: skip


def _shape(checkpoint: Checkpoint, payload: str, name: str) -> tuple[int, int]:
    """Return the plain shape, which is stored as data."""
    if name not in checkpoint.tensors:
        missing(checkpoint, payload, name)
    info = checkpoint.tensors[name]
    if info.shape != (2,) or info.dtype not in ("I64", "I32"):
        misfit(checkpoint, payload, name)
    rows, columns = (int(n) for n in checkpoint.read(name, 0, 2))
    if rows != checkpoint.tensors[payload].shape[0] or columns < 1:
        misfit(checkpoint, payload, name)
    return rows, columns


def _bits(
    checkpoint: Checkpoint,
    payload: str,
    shape: tuple[int, int],
    said: Storage | None,
    declared: CompressedTensors | None,
) -> int:
    """Return the bits of a code: what config.json says of the module, else what the sizes leave no choice about."""
    words = checkpoint.tensors[payload].shape[1]
    fitting = {bits for bits in range(1, 9) if -(-shape[1] * bits // 32) == words}
    dense = declared is not None and declared.packs_densely
    if said is not None and said.bits not in BITS and not dense:
        raise unreadable(checkpoint, payload, f"codes of {said.bits} bits packed by a version of compressed-tensors before 0.20, "
                         "which left gaps between words")  # fmt: skip
    found = {said.bits} & fitting if said is not None else fitting
    if not found:
        misfit(checkpoint, payload, payload.replace("_packed", "_shape"))
    if len(found) > 1 or not (dense or found <= set(BITS)):
        raise unreadable(
            checkpoint,
            payload,
            f"codes of {' or '.join(map(str, sorted(found)))} bits, of which config.json says nothing definite",
        )
    return found.pop()


def _check_zeros(
    checkpoint: Checkpoint, scales: str, zeros: str, rows: int, groups: int, bits: int, whole: bool
) -> None:
    info = checkpoint.tensors[zeros]
    if whole and info.elements == 1 and info.dtype == "I8":
        return
    words = -(-rows * bits // 32)
    fits = (
        info.shape == (words, groups)
        if info.dtype == "I32" and bits
        else info.shape in ((rows, groups), (rows,))
    )
    if not fits or info.dtype not in ("I32", "I8") or (info.dtype == "I32" and not bits):
        misfit(checkpoint, scales, zeros)


FORMAT = Format("compressed-tensors integers", frozenset({"compressed-tensors"}), _find)
