"""GPTQ files: packed integers, input by input, as AutoGPTQ and GPTQModel write them.

``qweight`` int32 [in * bits / 32, out]: a word holds consecutive inputs of one output, the lowest bits first.
``qzeros`` int32 [groups, out * bits / 32]: zero points, packed along the outputs; files of the first version ("gptq")
store them less one, those of the second ("gptq_v2") as they are. ``scales`` [groups, out]. ``g_idx`` [in] says which group
an input belongs to. Symmetric quantization has the zero point in the middle. Frantar et al. 2022, 2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.formats.compressed_integers import unpacked
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

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Five, six and seven since auto-round 0.16; the same stream of bits as the others."""
VERSIONS = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1}
"""checkpoint_format, or packing_format of auto-round -> what is added to a stored zero point."""


def _find(checkpoint: Checkpoint, config: Config) -> Iterator[Encoded]:
    for payload, info in checkpoint.tensors.items():
        stem = payload.removesuffix("qweight")
        if stem == payload or info.dtype != "I32" or len(info.shape) != 2:
            continue
        zeros, scales, order = f"{stem}qzeros", f"{stem}scales", f"{stem}g_idx"
        for part in (scales, zeros):
            if part not in checkpoint.tensors:
                missing(checkpoint, payload, part)
        held, packed = checkpoint.tensors[scales], checkpoint.tensors[zeros]
        if len(held.shape) == 2 and held.shape[1] != info.shape[1]:
            continue  # several outputs a word: AWQ
        added = _added(checkpoint, config)
        outputs, groups = info.shape[1], held.shape[0]
        if held.dtype not in ("F16", "BF16", "F32") or len(held.shape) != 2 or not groups or not outputs:
            misfit(checkpoint, payload, scales)
        bits, rest = divmod(32 * packed.shape[-1], outputs)
        if packed.dtype != "I32" or packed.shape[:-1] != (groups,) or rest:
            misfit(checkpoint, scales, zeros)
        if bits not in BITS:
            raise unreadable(
                checkpoint, payload, f"codes of {bits} bits; {', '.join(map(str, BITS))} can be read"
            )
        inputs, rest = divmod(info.shape[0] * 32, bits)
        if rest or (32 % bits and (inputs % 32 or outputs % 32)):
            misfit(checkpoint, scales, payload)
        parts = [payload, zeros, scales]
        if order in checkpoint.tensors:
            if checkpoint.tensors[order].shape != (inputs,):
                misfit(checkpoint, payload, order)
            parts.append(order)
        own = (config.get("extra_config") or {}).get(stem.removesuffix("."))  # auto-round: of this module
        group = group_sizes({**config, **own} if isinstance(own, dict) else config, inputs, groups)
        if not group:
            misfit(checkpoint, payload, scales)
        yield InputMajor(
            checkpoint, f"{stem}weight", (outputs, inputs), plain_dtype(checkpoint, scales), tuple(parts), bits, group,
            True, partial(unpacked, bits=bits), partial(_zero, added=added, bits=bits),
            config.get("sym") is not False,
        )  # fmt: skip


def _added(checkpoint: Checkpoint, config: Config) -> int:
    """Return what is added to a stored zero point, by the version of the file."""
    version = str(config.get("checkpoint_format") or config.get("packing_format") or "gptq")
    if version not in VERSIONS:
        raise unreadable(checkpoint, None, f"GPTQ files packed as {version[:40]!r}")
    return VERSIONS[version]


def _zero(codes: np.ndarray, added: int, bits: int) -> np.ndarray:
    return (codes + np.uint8(added)) & np.uint8((1 << bits) - 1)


FORMAT = Format("gptq", frozenset({"gptq", "auto-round"}), _find)
