"""EASY-EP: what an expert contributes, counted where the layer changes the stream.

    I_i = sum over tokens of g_i ||f_i(x)|| * (1 - cos(h, h + r))        (arXiv 2504.06792, section 3.2)

A sum over tokens and demonstrations, as the paper and its code have it: long demonstrations weigh more
(`easy_ep_per_demo` changes that). The published code takes norms in bfloat16 and clamps the cosine; here both are float32
and the token weight is half a squared distance, which cannot be negative.
"""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.experts.statistics import LayerStatistics


def score(statistics: LayerStatistics) -> np.ndarray:
    """Return I, float64 [E]."""
    return statistics.easy.copy()


CRITERION = Criterion(
    "easy_ep",
    "Contribution where the layer turns the stream (few demonstrations of a domain)",
    "routing",
    "EASY-EP, arXiv 2504.06792",
    score,
)
