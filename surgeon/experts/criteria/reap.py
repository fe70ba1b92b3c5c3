"""REAP: what an expert contributes to a token that is routed to it, on average.

    S_i = mean over its tokens of g_i ||f_i(x)||        (arXiv 2510.13999, equation 9)

The published code scores softmax(logits) and its own top-k, also for routers that choose otherwise, and runs all experts on
all tokens; here weights and choices are those of the model.
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion, per_token
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return S, float64 [E]."""
    return per_token(statistics.gated, statistics)


CRITERION = Criterion(
    "reap",
    "Mean weighted output norm of routed tokens (general purpose)",
    "routing",
    "REAP, arXiv 2510.13999",
    score,
    averaged=True,
)
