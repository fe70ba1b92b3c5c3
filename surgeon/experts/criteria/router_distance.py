"""How far an expert's router row is from those of others: STUN's clusters as a score (arXiv 2409.06211, section 3).

Experts whose rows are near each other are called for the same tokens. Rows are joined by agglomerative clustering with
complete linkage; of two clusters that are joined, the representative nearer to the mean of all their rows goes on, and
the other one's score is the distance at which that happened. So keeping the M best of a layer keeps one
representative of each of the M clusters. Unlike `surgeon.prune.experts.stun` it looks at no expert's weights.
"""

from __future__ import annotations

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.experts.clustering import Members, euclidean, merges
from surgeon.experts.criteria import Criterion
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.weights import router_rows


def scores_of(rows: np.ndarray, groups: int = 1) -> np.ndarray:
    """Return the distance at which each row is joined to another representative, float64 [E].

    Args:
        rows: [E, hidden].
        groups: routing groups, clustered one by one. The last of each group has twice its largest distance.
    """
    rows = np.asarray(rows, dtype=np.float64)
    found = np.zeros(len(rows))
    size = len(rows) // groups
    for start in range(0, len(rows), size):
        inside = rows[start : start + size]
        leader: dict[Members, int] = {(i,): i for i in range(size)}
        joined = merges(euclidean(inside), "complete")
        for merge in joined:
            members = tuple(sorted((*merge.first, *merge.second)))
            centre = inside[list(members)].mean(axis=0)
            pair = (leader[merge.first], leader[merge.second])
            stays, goes = sorted(pair, key=lambda e: (float(np.linalg.norm(inside[e] - centre)), e))
            found[start + goes] = merge.distance
            leader[members] = stays
        last = leader[tuple(range(size))]
        found[start + last] = 2 * joined[-1].distance if joined and joined[-1].distance > 0 else 1.0
    return found


def score(checkpoint: Checkpoint, experts: Experts, layer: ExpertLayer) -> np.ndarray:
    """Return the score of every expert of a layer, float64 [E]."""
    return scores_of(router_rows(checkpoint, layer), experts.groups)


CRITERION = Criterion(
    name="router_distance", title="distance of its router row from the others'", needs="weights",
    source="STUN, arXiv 2409.06211", score=score,
)  # fmt: skip
