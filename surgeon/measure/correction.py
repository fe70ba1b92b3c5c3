"""Correcting a latency table by models that were built and timed.

The table says that a model whose parts take (A, F, R) for attention, FFN and rest runs

    (a A0 + f F0 + R + c T0) / (a A + f F + R + c T0)        T0 = A0 + F0 + R

times as fast as the whole one with (A0, F0, R), with factors a and f and a share c of the whole
model's time that no plan removes; as measured, a = f = 1 and c = 0. Factors and share minimise the squared
relative errors of the speedups, with a ridge that says how far each usually is from there: speedups leave
the common scale of all parts open, and one or two models leave more. A factor on the rest would do as well
in theory, but where the rest is next to nothing it moves nothing, and the other two, which a plan that
shrinks both alike hardly shows, would take absurd values instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from surgeon.measure.table import LatencyTable
from surgeon.structure.cut import LayerShape

USUAL = (0.1, 0.1, 0.05)
"""How far factors of attention and FFN are from 1, and the share from 0 (standard deviations)."""
NOISE = 0.005
"""Standard deviation of a measured speedup, relative: half-widths of 1 %."""
RANGE = (0.5, 2.0)
"""Factors beyond this are no correction of a table but the sign of a wrong one; they stop there."""
STEPS = 50

History = Sequence[tuple[Sequence[LayerShape], float]]
"""Models that were timed: shapes of their layers, measured speedup."""


def fit_correction(table: LatencyTable, history: History, *, noise: float = NOISE) -> dict[str, float]:
    """Return the correction that explains measured speedups best, by Gauss-Newton steps.

    Args:
        table: its measured times count, earlier corrections do not.
        history: every model timed so far.
        noise: standard deviation of the measured speedups, relative.

    Returns:
        Arguments of `LatencyTable.corrected`.
    """
    plain = table.corrected()
    dense = np.asarray(plain.parts((table.full,) * table.layers))
    scale = float(dense.sum())
    # Columns attention, FFN, and what the share is added to; the rest as it was measured stands beside them.
    whole = np.array([dense[0], dense[1], scale]) / scale
    parts = [plain.parts(shapes) for shapes, _ in history]
    cut = np.array([[a / scale, f / scale, 1.0] for a, f, _ in parts]).reshape(-1, 3)
    rest = float(dense[2]) / scale
    measured = np.log([speedup for _, speedup in history])
    usual, centre = np.asarray(USUAL), np.array([1.0, 1.0, 0.0])
    low = np.array([RANGE[0], RANGE[0], -rest])  # no plan saves more than there is
    high = np.array([RANGE[1], RANGE[1], np.inf])
    found, free = centre.copy(), np.ones(3, dtype=bool)
    for _ in range(STEPS if history else 0):
        before, after = whole @ found + rest, cut @ found + rest
        wrong = np.log(before / after) - measured
        slope = whole / before - cut / after[:, None]
        gradient = slope.T @ wrong / noise**2 + (found - centre) / usual**2
        # A bound holds while the loss falls beyond it.
        free = ~(((found <= low) & (gradient > 0)) | ((found >= high) & (gradient < 0)))
        curve = slope.T @ slope / noise**2 + np.diag(usual**-2.0)
        step = np.zeros(3)
        if free.any():
            step[free] = np.linalg.solve(curve[np.ix_(free, free)], -gradient[free])
        found = np.clip(found + step, low, high)
    return {"attention": float(found[0]), "ffn": float(found[1]), "fixed": float(found[2])}


def aim(table: LatencyTable, history: History, target: float) -> float:
    """Return the speedup to ask of a corrected table, so that a plan like the nearest one timed meets the target.

    What a correction leaves unexplained at the model whose speed came nearest to the target is taken
    to hold for the next plan, too: the last step of a secant search.

    Args:
        table: already corrected.
        history: every model timed so far; without any, the target itself is returned.
    """
    if not history:
        return target
    shapes, measured = min(history, key=lambda one: abs(math.log(one[1] / target)))
    return max(1.0, target * table.speedup(shapes) / measured)
