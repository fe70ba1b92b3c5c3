"""REAN: the sum of what an expert contributes; EASY-EP without the token weight.

S_i = sum over its tokens of g_i ||f_i(x)||
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return statistics.gated.copy()


CRITERION = Criterion(
    "rean",
    "Sum of weighted output norms (EASY-EP without token weight)",
    "routing",
    "EASY-EP, arXiv 2504.06792",
    score,
)
