"""STUN's first half: experts whose router rows are alike become one (arXiv 2409.06211).

    b_ij = - row_weight ||R_i - R_j||_2 + coactivation_weight a_ij

R is the router, a_ij the share of the layer's co-activations that fall on the pair. Clusters are joined where the
smallest b between their members is largest (complete linkage). The paper lets the number of clusters differ between
layers; stock readers take one number, so every layer, and every routing group, is cut at the same number here.

A cluster is kept as the member nearest to the mean of all (a first-order argument: no expert has to be tried out). Where
few clusters are left in a layer, their members' means are kept instead, weights and router rows.

The second half, unstructured sparsity, is a run of its own on the result: `surgeon.prune.sparse`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import Interrupted, UsageError
from surgeon.experts import clustering
from surgeon.experts.coactivation import CoActivation
from surgeon.prune.experts.merged import (
    Cluster,
    MergedWeights,
    Router,
    check_router,
    cut_of,
    equal_shares,
    with_router,
)
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.weights import parts, router_rows

AVERAGED = 3
"""Layers with at most so many clusters keep means of members (kappa of the paper)."""

BLOCK = 1 << 22
"""Weights of all members together that are compared at once."""

SECOND_HALF = (
    "second half of STUN: surgeon prune RESULT --method wanda --owl --sparsity S, with RESULT this model"
)

Progress = Callable[[int, int], None]


def stun(
    checkpoint: Checkpoint,
    experts: Experts,
    keep: int,
    *,
    row_weight: float = 1.0,
    coactivation_weight: float = 0.0,
    coactivation: Mapping[int, CoActivation] | None = None,
    averaged: int = AVERAGED,
    router: Router = "average",
    protected: Mapping[int, Collection[int]] | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[ExpertCut, MergedWeights | None, dict[str, Any]]:
    """Cluster the experts of every layer and keep one for each cluster.

    Args:
        keep: experts every layer keeps.
        row_weight, coactivation_weight: lambda_1 and lambda_2 of the paper.
        coactivation: layer -> counts of pairs, from a pass; needed where their weight is not 0.
        averaged: kappa: layers with at most so many clusters keep means; 0 never.
        router: the row of a cluster that is averaged; the others keep their representative's.
        protected: layer -> experts that are never merged (super experts).
        progress: called with (layers done, layers).
        stop: set it to stop after the layer in progress.

    Returns:
        What stays; the tensors that are averaged (None when none are); the record: settings, clusters by layer, remarks.

    Raises:
        UsageError: E248 numbers that do not go together. InputError: E442 quantized weights. Interrupted: E130.
    """
    if coactivation_weight and coactivation is None:
        raise UsageError("E248", f"co-activation has the weight {coactivation_weight:g}, but no counts were given",
                         help="collect routing statistics first, or leave the weight at 0")  # fmt: skip
    if averaged and keep <= averaged:
        check_router(router, experts.running)
    found: dict[int, list[Cluster]] = {}
    for number, layer in enumerate(experts.running):
        check(stop)
        rows = router_rows(checkpoint, layer)
        distances = row_weight * clustering.euclidean(rows)
        counts = np.zeros(layer.count, dtype=np.int64)
        if coactivation is not None:
            distances = distances - coactivation_weight * coactivation[layer.index].of_total()
            counts = coactivation[layer.index].counts
        alone = frozenset((protected or {}).get(layer.index, ()))
        joined = clustering.in_groups(
            layer.count, keep, experts.groups, alone,
            lambda members, count, d=distances: within(members, d, count, "complete"), distances, f"layer {layer.index}",
        )  # fmt: skip
        kind: Router | None = router if keep <= averaged else None
        found[layer.index] = [_cluster(checkpoint, layer, members, alone, counts, kind) for members in joined]
        if progress is not None:
            progress(number + 1, len(experts.running))
    merged = MergedWeights(checkpoint, experts, found)
    record = {
        "method": "stun", "row_weight": row_weight, "coactivation_weight": coactivation_weight, "linkage": "complete",
        "averaged": averaged, "router": router if keep <= averaged else "representative", "remarks": _remarks(keep, averaged),
        "layers": documents(found),
    }  # fmt: skip
    return cut_of(experts, found), merged if merged.tensors else None, record


def within(
    members: Sequence[int], distances: np.ndarray, count: int, linkage: clustering.Linkage
) -> list[tuple[int, ...]]:
    """Return clusters of some experts, by their own numbers."""
    chosen = np.asarray(members)
    joined = clustering.clusters(distances[np.ix_(chosen, chosen)], count, linkage)
    return [tuple(int(chosen[i]) for i in cluster) for cluster in joined]


def _cluster(
    checkpoint: Checkpoint, layer: ExpertLayer, members: tuple[int, ...], protected: Collection[int], counts: np.ndarray,
    router: Router | None,
) -> Cluster:  # fmt: skip
    """Return a cluster with its representative; averaged where ``router`` says how."""
    fixed = [member for member in members if member in protected]
    if fixed:  # others may have joined it for want of place, its weights stay
        return Cluster(members, fixed[0])
    if len(members) == 1:
        return Cluster(members, members[0])
    cluster = Cluster(members, nearest_to_mean(checkpoint, layer, members, counts))
    if router is None:
        return cluster
    shares = equal_shares(members)
    return with_router(Cluster(members, cluster.representative, shares), router, shares)


def nearest_to_mean(
    checkpoint: Checkpoint, layer: ExpertLayer, members: Sequence[int], counts: np.ndarray | None = None
) -> int:
    """Return the member whose weights, flattened, are nearest (L2) to the mean of all members' weights.

    Of members at equal distance (two always are) the one with more tokens is taken, then the lower number. Blocks of all
    members are in memory at once, never a whole expert.
    """
    tables = [parts(checkpoint, layer, member) for member in members]
    squares = np.zeros(len(members))
    for role, part in tables[0].items():
        block = max(1, BLOCK // len(members))
        for start in range(0, part.elements, block):
            end = min(start + block, part.elements)
            values = np.stack([table[role].read(checkpoint, start, end) for table in tables]).astype(
                np.float64
            )
            values -= values.mean(axis=0)
            squares += np.square(values).sum(axis=1)
    least = squares.min() * (1 + 1e-9)
    near = [member for member, square in zip(members, squares, strict=True) if square <= least]
    return min(near, key=lambda e: (0 if counts is None else -int(counts[e]), e))


def documents(clusters: Mapping[int, Sequence[Cluster]]) -> dict[str, Any]:
    """Return the clusters of every layer as plain data."""
    return {str(layer): [cluster.document() for cluster in listed] for layer, listed in clusters.items()}


def check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("E130", "interrupted while experts are clustered")


def _remarks(keep: int, averaged: int) -> list[str]:
    if keep <= averaged:
        kept = f"with {keep} clusters a layer, each is kept as the mean of its members"
    else:
        kept = "each cluster is kept as the member nearest to its mean"
    return [kept, SECOND_HALF]
