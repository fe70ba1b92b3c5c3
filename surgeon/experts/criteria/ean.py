"""EAN: the sum of the norms of an expert's outputs, without its weights.

S_i = sum over its tokens of ||f_i(x)||        (compared in arXiv 2510.13999)
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return statistics.norm.copy()


CRITERION = Criterion("ean", "Sum of output norms", "routing", "arXiv 2510.13999", score)
