"""REAP with squared norms.

S_i = mean over its tokens of g_i ||f_i(x)||^2        (code of arXiv 2510.13999)
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion, per_token
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return per_token(statistics.gated2, statistics)


CRITERION = Criterion(
    "reap_l2", "REAP with squared norms", "routing", "REAP, arXiv 2510.13999", score, averaged=True
)
