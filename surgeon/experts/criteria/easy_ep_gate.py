"""EASY-EP without the norms: gate weights, counted where the layer changes the stream.

S_i = sum over tokens of g_i * (1 - cos(h, h + r))        (ablation in arXiv 2504.06792, section 4.4)
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return statistics.easy_plain.copy()


CRITERION = Criterion(
    "easy_ep_gate",
    "EASY-EP without the norm of outputs (an ablation)",
    "routing",
    "EASY-EP, arXiv 2504.06792",
    score,
)
