"""The innermost loop of GPTQ: columns of one block, one after the other, each making up for those before it.

Whether compiled code does it is decided here and cannot be seen in the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from surgeon.quantize.grids import nearest

WORTH = 1 << 19
"""Weights, of one matrix or of many small ones together, from which loading numba (0.5 s, once) pays."""

_broken = False
_forced: bool | None = None
_seen = 0
"""Weights of matrices that were asked about so far: experts are small, but there are thousands of them."""


def enable(on: bool | None) -> None:
    """Force compiled code on or off; None returns to deciding by size."""
    global _forced
    _forced = on


@functools.cache
def _compiled() -> Callable[..., None]:
    from surgeon.quantize import compiled_columns

    return compiled_columns.sweep


def runner(weight: Tensor) -> Callable[..., None]:
    """Return the function that does what `sweep` does for blocks of a matrix such as ``weight``."""
    global _seen
    _seen = min(WORTH, _seen + weight.numel())
    wanted = _seen >= WORTH if _forced is None else _forced
    if not wanted or _broken or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return sweep
    return _guarded


def _guarded(*block: Any) -> None:
    """Do a block with compiled code; without numba, or where it cannot keep its cache, with torch."""
    global _broken
    if not _broken:
        try:
            kernel = _compiled()
            _spread(kernel, block)
            return
        except MemoryError:
            raise
        except Exception:  # from loading or compiling: the kernel itself raises nothing, and has not begun
            _broken = True
    sweep(*block)


def _spread(kernel: Callable[..., None], block: tuple[Any, ...]) -> None:
    """Share the outputs of a block among torch's threads; rows are independent, so this changes no bit."""
    work, original, factor, scales, zeros, groups, bits, codes, change = block
    arrays = (
        work.numpy(), original.numpy(), factor.numpy(), scales.numpy(), zeros.numpy(), groups.numpy(),
        _top(bits), codes.numpy(), change.numpy(),
    )  # fmt: skip
    outputs = work.shape[1]
    threads = min(torch.get_num_threads(), max(1, outputs // 256))
    if threads == 1:
        kernel(*arrays, 0, outputs)
        return
    step = -(-outputs // threads // 64) * 64
    with ThreadPoolExecutor(threads) as pool:
        for done in [
            pool.submit(kernel, *arrays, start, min(outputs, start + step))
            for start in range(0, outputs, step)
        ]:
            done.result()


@functools.cache
def _top(bits: int) -> Any:
    import numpy as np

    return np.float32(2**bits - 1)


def stacked_sweep(blocks: Sequence[tuple[Any, ...]]) -> None:
    """Do what `sweep` does for blocks of one shape of several matrices, a column of all of them at a time."""
    bits = blocks[0][6]
    work, original, factor = (torch.stack([block[part] for block in blocks]) for part in range(3))
    scales, zeros = (torch.stack([block[part][block[5]] for block in blocks]) for part in (3, 4))
    codes, change = (torch.stack([torch.empty_like(block[part]) for block in blocks]) for part in (7, 8))
    for c in range(work.shape[1] - 1, -1, -1):
        code = nearest(work[:, c], scales[:, c], zeros[:, c], bits)
        codes[:, c] = code.to(torch.uint8)
        found = code.sub_(zeros[:, c]).mul_(scales[:, c])
        change[:, c] = found - original[:, c]
        work[:, :c] -= factor[:, c, :c, None] * change[:, c, None]
        work[:, c] = found - work[:, c]
    for place, block in enumerate(blocks):
        for part, made in ((0, work), (7, codes), (8, change)):
            block[part].copy_(made[place])


def sweep(
    work: Tensor, original: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, bits: int,
    codes: Tensor, change: Tensor,
) -> None:  # fmt: skip
    """Quantize the columns of a block from the last to the first.

    Args:
        work: [columns, out], the weights as the blocks before left them; becomes rounded minus rounded-from,
            that is the residuals.
        original: [columns, out], the weights to approximate.
        factor: [columns, columns], lower triangular with ones on the diagonal: an error d in column j is made up
            for by taking factor[j, c] * d from every column c < j.
        scales, zeros: [groups, out], the grid, both as floats.
        groups: int64 [columns], the group of each column.
        bits: of a code.
        codes: uint8 [columns, out], filled.
        change: [columns, out], filled with rounded minus original.
    """
    for c in range(len(work) - 1, -1, -1):
        scale, zero = scales[groups[c]], zeros[groups[c]]
        code = nearest(work[c], scale, zero, bits)
        codes[c] = code.to(torch.uint8)
        rounded = code.sub_(zero).mul_(scale)
        torch.sub(rounded, original[c], out=change[c])
        work[:c] -= factor[c, :c, None] * change[c]
        torch.sub(rounded, work[c], out=work[c])
