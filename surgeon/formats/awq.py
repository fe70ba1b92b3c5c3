"""AWQ files of the usual kind ("gemm"): packed 4-bit integers, input by input, eight outputs a word in an order of their own.

``qweight`` int32 [in, out / 8] and ``qzeros`` int32 [groups, out / 8]: nibble n of a word, from the lowest on, belongs to
output 0, 2, 4, 6, 1, 3, 5, 7 of its eight. ``scales`` [groups, out]. Lin et al. 2023, 2306.00978; layout: AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.formats.encoded import (
    Config,
    Encoded,
    Format,
    group_sizes,
    misfit,
    missing,
    plain_dtype,
    unreadable,
)
from surgeon.formats.input_major import InputMajor

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output of eight -> the nibble that holds it."""


def unpacked(words: np.ndarray) -> np.ndarray:
    """Return the codes in int32 words [rows, n]: uint8 [rows, 8 n], by output."""
    shifts = np.array(NIBBLES, np.uint32) * np.uint32(4)
    codes = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    return codes.astype(np.uint8).reshape(len(words), -1)


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    for payload, info in checkpoint.tensors.items():
        stem = payload.removesuffix("qweight")
        if stem == payload or info.dtype != "I32" or len(info.shape) != 2:
            continue
        zeros, scales = f"{stem}qzeros", f"{stem}scales"
        for part in (scales, zeros):
            if part not in checkpoint.tensors:
                missing(checkpoint, payload, part)
        held, packed = checkpoint.tensors[scales], checkpoint.tensors[zeros]
        if len(held.shape) == 2 and held.shape[1] == info.shape[1]:
            continue  # several inputs a word: GPTQ
        version = str(config.get("version") or "gemm").lower()
        if version != "gemm":
            raise unreadable(checkpoint, payload, f"AWQ files packed as {version[:40]!r}")
        inputs, outputs = info.shape[0], 8 * info.shape[1]
        groups = held.shape[0] if len(held.shape) == 2 else 0
        if held.dtype not in ("F16", "BF16", "F32") or not groups or held.shape != (groups, outputs):
            misfit(checkpoint, payload, scales)
        if packed.dtype != "I32" or packed.shape != (groups, info.shape[1]):
            misfit(checkpoint, scales, zeros)
        group = group_sizes(config, inputs, groups)
        if not group:
            misfit(checkpoint, payload, scales)
        yield InputMajor(
            checkpoint, f"{stem}weight", (outputs, inputs), plain_dtype(checkpoint, scales), (payload, zeros, scales), 4,
            group, False, unpacked, _zero,
            config.get("zero_point") is False,
        )  # fmt: skip


def _zero(codes: np.ndarray) -> np.ndarray:
    return codes


FORMAT = Format("awq", frozenset({"awq", "auto-round"}), _find)
