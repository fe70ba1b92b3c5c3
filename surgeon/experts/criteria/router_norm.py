"""Length of the router's row: a guess, from weights alone, at how loudly the router calls an expert.

The weights-only relative of the summed gate (SEER-MoE, arXiv 2404.05089).
"""

from __future__ import annotations

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.experts.criteria import Criterion
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.weights import router_rows


def score(checkpoint: Checkpoint, experts: Experts, layer: ExpertLayer) -> np.ndarray:
    """Return ||R_i||_2 of every expert, float64 [E]."""
    rows = router_rows(checkpoint, layer).astype(np.float64)
    return np.sqrt(np.square(rows).sum(axis=1))


CRITERION = Criterion(
    name="router_norm", title="norm of its router row", needs="weights",
    source="weights-only form of SEER-MoE, arXiv 2404.05089", score=score,
)  # fmt: skip
