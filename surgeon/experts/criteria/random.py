"""Random choice, the baseline that every other criterion has to beat."""

from __future__ import annotations

import numpy as np

from surgeon.experts.criteria import Criterion
from surgeon.seeds import stream_key, uniform


def score(layer: int, count: int, seed: int) -> np.ndarray:
    """Return numbers in [0, 1), float64 [count], that depend on the seed and the layer alone."""
    return uniform(stream_key(seed, 0, f"experts of layer {layer}"), 0, count)


CRITERION = Criterion(
    name="random", title="drawn from the seed", needs="nothing", source="baseline", score=score
)
