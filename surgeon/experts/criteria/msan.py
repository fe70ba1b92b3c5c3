"""MSAN: MAN with squared norms.

S_i = mean over its tokens of ||f_i(x)||^2        (arXiv 2606.15716)
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion, per_token
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return per_token(statistics.norm2, statistics)


CRITERION = Criterion(
    "msan", "Mean squared output norm of routed tokens", "routing", "arXiv 2606.15716", score, averaged=True
)
