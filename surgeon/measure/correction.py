"""Correcting a latency table by models that were built and timed.

A model of the table's parts P (attention, ffn, rest) that ran s times as fast as the whole one with
parts P0 says: s * (k . P) = k . P0, with one factor k for each kind of part. Factors solve all such
equations by least squares, drawn to 1 by a ridge, since speedups leave their common scale open and
few models leave more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.measure.table import LatencyTable
from surgeon.structure.cut import LayerShape

RIDGE = 1e-4
"""Weight of (k - 1)^2 against the squared relative error of a time: a deviation of all factors by 10 % weighs as
much as an error of 0.2 %, below what a measurement can tell."""
RANGE = (0.25, 4.0)
"""Factors beyond this are no correction of a table but the sign of a wrong one; they stop there."""

History = Sequence[tuple[Sequence[LayerShape], float]]
"""Models that were timed: shapes of their layers, measured speedup."""


def fit_correction(table: LatencyTable, history: History, *, ridge: float = RIDGE) -> dict[str, float]:
    """Return the factors of attention, ffn and rest that explain measured speedups best.

    Args:
        table: its measured times count, earlier corrections do not.
        history: every model timed so far.

    Returns:
        Arguments of `LatencyTable.corrected`.
    """
    plain = table.corrected()
    whole = np.asarray(plain.parts((table.full,) * table.layers))
    rows = [speedup * np.asarray(plain.parts(shapes)) - whole for shapes, speedup in history]
    factors = np.ones(3)
    if rows:
        # Solved for k - 1: the ridge draws to 1, not to 0.
        matrix = np.stack(rows) / whole.sum()
        gram = matrix.T @ matrix + ridge * np.eye(3)
        factors = 1 + np.linalg.solve(gram, -matrix.T @ matrix.sum(axis=1))
    attention, ffn, rest = (float(np.clip(k, *RANGE)) for k in factors)
    return {"attention": attention, "ffn": ffn, "rest": rest}
