"""EASY-EP with every demonstration counted alike: each one's scores are divided by its tokens first.

    I_i = mean over demonstrations d of (1 / T_d) sum over its tokens of g_i ||f_i|| s        (after arXiv 2504.06792)

The published method is the sum over all tokens (`easy_ep`).
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return the mean over demonstrations, float64 [E]."""
    each = statistics.easy_by_sample.astype(np.float64) / np.maximum(statistics.sample_tokens, 1)[:, None]
    return each.sum(0) / max(1, len(each))


CRITERION = Criterion(
    "easy_ep_per_demo",
    "EASY-EP, every demonstration counted alike whatever its length",
    "routing",
    "EASY-EP, arXiv 2504.06792",
    score,
)
