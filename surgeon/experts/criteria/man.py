"""MAN: the norm of an expert's output for a token routed to it, on average, without its weight.

    S_i = mean over its tokens of ||f_i(x)||        (arXiv 2606.15716)

Free of the router: for calibration text that stands for no task in particular.
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion, per_token
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return per_token(statistics.norm, statistics)


CRITERION = Criterion(
    "man",
    "Mean output norm of routed tokens (no task in particular)",
    "routing",
    "arXiv 2606.15716",
    score,
    averaged=True,
)
