"""AIMER: how flat an expert's weights are, from the weights alone (arXiv 2603.18492).

The ratio mean |w| / rms(w) over gate, up and down together is 1 when all weights have one size, 0.798 when they are
Gaussian, and small when few weights carry everything. Experts with the largest ratio go first.
"""

from __future__ import annotations

import math

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.experts.criteria import Criterion
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.weights import WEIGHTS, parts

BLOCK = 1 << 22
"""Weights read at once."""

NOTHING = -2.0
"""Score of an expert whose weights are all zero: below -1, the worst that others can have, because it adds nothing."""


def ratio(checkpoint: Checkpoint, layer: ExpertLayer, expert: int) -> float | None:
    """Return mean |w| / rms(w) of one expert, between 0 and 1; None when all weights are zero.

    Sums are float64; one block of weights is in memory.
    """
    count, absolute, squares = 0, 0.0, 0.0
    for part in parts(checkpoint, layer, expert, *WEIGHTS).values():
        for start in range(0, part.elements, BLOCK):
            block = part.read(checkpoint, start, min(start + BLOCK, part.elements)).astype(np.float64)
            absolute += float(np.abs(block).sum())
            squares += float(np.dot(block, block))
        count += part.elements
    return absolute / math.sqrt(count * squares) if squares else None


def score(checkpoint: Checkpoint, experts: Experts, layer: ExpertLayer) -> np.ndarray:
    """Return minus the ratio of every expert, float64 [E]; an expert of zeros has `NOTHING`."""
    found = [ratio(checkpoint, layer, expert) for expert in range(layer.count)]
    return np.array([NOTHING if value is None else -value for value in found])


CRITERION = Criterion(
    name="aimer", title="minus mean|w|/rms(w) of all its weights", needs="weights",
    source="AIMER, arXiv 2603.18492", score=score,
)  # fmt: skip
