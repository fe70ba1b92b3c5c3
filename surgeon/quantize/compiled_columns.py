"""The loop over the columns of a block as machine code (numba), bit for bit what `surgeon.quantize.columns` computes.

Rows of the weight matrix do not meet each other, so they are worked on `LANES` at a time: all columns of a block for
these rows stay in the first-level cache. Nothing may be contracted or reassociated (``fastmath`` stays off).
Importing this module imports numba; only `surgeon.quantize.columns` does.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 64
MAGIC = np.float32(12582912.0)
"""1.5 * 2^23: what is added to it and taken away again is rounded to whole numbers, ties to even."""


@njit(nogil=True, cache=True, boundscheck=False, fastmath=False, error_model="numpy")
def sweep(work, original, factor, scales, zeros, groups, top, codes, change, first, last):
    """As `surgeon.quantize.columns.sweep` for the outputs ``first`` to ``last``."""
    columns = len(work)
    held = np.empty((columns, LANES), np.float32)
    value = np.empty(LANES, np.float32)
    for start in range(first, last, LANES):
        count = min(LANES, last - start)
        for back in range(columns):
            c = columns - 1 - back
            row = work[c, start : start + count]
            for lane in range(count):
                value[lane] = row[lane]
            for j in range(columns - 1, c, -1):
                t = factor[j, c]
                taken = held[j]
                for lane in range(count):
                    value[lane] -= t * taken[lane]
            scale = scales[groups[c], start : start + count]
            zero = zeros[groups[c], start : start + count]
            before = original[c, start : start + count]
            code = codes[c, start : start + count]
            moved = change[c, start : start + count]
            mine = held[c]
            for lane in range(count):
                level = value[lane] / scale[lane]
                low = -zero[lane]
                high = top - zero[lane]
                level = low if level < low else level
                level = high if level > high else level
                level = (level + MAGIC) - MAGIC
                found = level * scale[lane]
                code[lane] = np.uint8(np.int32(level + zero[lane]))
                difference = found - before[lane]
                mine[lane] = difference
                moved[lane] = difference
                row[lane] = found - value[lane]
