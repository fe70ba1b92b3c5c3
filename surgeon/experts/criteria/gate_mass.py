"""Gate mass (soft activation): the routing weight an expert was given altogether.

S_i = sum over its tokens of g_i        (SEER-MoE, arXiv 2404.05089)
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return statistics.gate.copy()


CRITERION = Criterion("gate_mass", "Sum of routing weights", "routing", "SEER-MoE, arXiv 2404.05089", score)
