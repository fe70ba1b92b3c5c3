"""Sums in one fixed order, whatever the processor, the thread or the implementation.

A sum runs in LANES separate float64 accumulators: entry k goes to lane k mod LANES, each lane adds in
order, and the lanes are added up one after the other. NumPy's own reductions choose their order
by array layout, buffer size and instruction set; this one can be repeated bit by bit elsewhere.
"""

from __future__ import annotations

import numpy as np

LANES = 64


def lane_sums(values: np.ndarray) -> np.ndarray:
    """Return the LANES partial sums of a 1-D float64 array."""
    whole = len(values) // LANES * LANES
    # Reducing the slow axis adds row after row; the accumulator starts from 0 as the compiled one does.
    sums = np.add.reduce(values[:whole].reshape(-1, LANES), axis=0, initial=0.0)
    sums[: len(values) - whole] += values[whole:]
    return sums


def collapse(sums: np.ndarray) -> np.ndarray:
    """Add up the lanes, the last axis, in order."""
    return np.add.accumulate(sums, axis=-1)[..., -1]


def total(values: np.ndarray) -> float:
    """Return the sum of a 1-D float64 array in lane order."""
    return float(collapse(lane_sums(values)))
