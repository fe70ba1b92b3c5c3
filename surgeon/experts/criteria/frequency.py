"""Frequency: how many tokens are routed to an expert.

    S_i = n_i

The usual baseline, strong where text and task agree; published results for large models fall to nothing on code.
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return n, float64 [E]."""
    return statistics.tokens.astype(np.float64)


CRITERION = Criterion("frequency", "Number of routed tokens", "routing", "baseline", score)
