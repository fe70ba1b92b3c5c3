"""Experts merged into fewer: HC-SMoE by what they put out, M-SMoE by how the router sees them.

The number of experts in the files becomes smaller; nothing is stored twice. Merging is the second choice, and the record
says so (`WEAKNESS`): it mixes fixed weights where the router mixed by input, which costs most when the model generates.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import UsageError
from surgeon.experts import clustering
from surgeon.prune.experts.features import LayerFeatures
from surgeon.prune.experts.merged import (
    ROUTERS,
    Cluster,
    MergedWeights,
    Router,
    check_router,
    cut_of,
    equal_shares,
    with_router,
)
from surgeon.prune.experts.stun import Progress, check, documents, nearest_to_mean, within
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.weights import ExpertWeights, parts, read_expert

WEAKNESS = (
    "merged experts lose the mixing by input that the router did: on generation, merging was measured to lose to pruning "
    "(half of Qwen3-30B-A3B's experts, code: 0.541 pruned with reap, 0.397 m-smoe, 0.364 hc-smoe; arXiv 2510.13999)"
)

BLOCK = 1 << 22
"""Weights of all experts together that are compared at once."""

Result = tuple[ExpertCut, MergedWeights | None, dict[str, Any]]
Protected = Mapping[int, Collection[int]]


def hc_smoe(
    checkpoint: Checkpoint,
    experts: Experts,
    keep: int,
    *,
    features: Mapping[int, LayerFeatures] | None = None,
    router: Router = "representative",
    protected: Protected | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Merge experts with similar outputs (HC-SMoE, arXiv 2410.08589).

    Experts are clustered by the Euclidean distance of their mean outputs, with average linkage, and the weights of a
    cluster averaged by how often its members are used; channels are not aligned. Experts without tokens are dropped
    before any are merged. Without ``features`` the distance is that of all weights, and shares are equal.

    Args:
        keep: experts every layer keeps.
        features: layer -> tokens and sums of outputs, see `surgeon.prune.experts.features`.
        router: the row of a merged expert: its most used member's, or the mean of all.
        protected: layer -> experts that are never merged (super experts).
        progress, stop: as in `surgeon.prune.experts.stun.stun`.

    Returns:
        What stays; the merged tensors (None when there are none); the record: settings, clusters by layer, remarks.

    Raises:
        UsageError: E248. InputError: E442 quantized weights. Interrupted: E130.
    """
    check_router(router, experts.running)
    found: dict[int, list[Cluster]] = {}
    for number, layer in enumerate(experts.running):
        check(stop)
        alone = frozenset((protected or {}).get(layer.index, ()))
        if features is None:
            distances = weight_distances(checkpoint, layer)
            tokens = np.ones(layer.count, dtype=np.int64)
        else:
            distances = clustering.euclidean(features[layer.index].means())
            tokens = features[layer.index].tokens

        def cluster(members: tuple[int, ...], count: int, d=distances, n=tokens) -> Sequence[tuple[int, ...]]:
            used = [member for member in members if n[member]]
            if len(used) <= count:  # fill up by number with experts that no token was given
                idle = [member for member in members if not n[member]]
                return [(member,) for member in (*used, *idle[: count - len(used)])]
            return within(used, d, count, "average")

        joined = clustering.in_groups(
            layer.count, keep, experts.groups, alone, cluster, distances, f"layer {layer.index}"
        )
        made = []
        for members in joined:
            leader = _leader(members, alone, tokens)
            if features is None and len(members) > 1 and leader not in alone:
                leader = nearest_to_mean(checkpoint, layer, members)
            made.append(_averaged(members, leader, alone, tokens, router))
        found[layer.index] = made
        if progress is not None:
            progress(number + 1, len(experts.running))
    features_used = "mean outputs over routed tokens" if features is not None else "weights"
    return _result(checkpoint, experts, found, {"method": "hc-smoe", "features": features_used, "linkage": "average"}, router, features)  # fmt: skip


def m_smoe(
    checkpoint: Checkpoint,
    experts: Experts,
    keep: int,
    *,
    features: Mapping[int, LayerFeatures],
    router: Router = "representative",
    protected: Protected | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Merge experts into the most used ones that the router sees alike (M-SMoE, arXiv 2310.01334).

    The most used experts of a layer dominate, the same number everywhere. Every other one joins the dominant expert
    whose column of router logits has the largest cosine with its own, has its channels permuted to match, and is
    averaged in by how often it is used. (The low-rank residual of MC-SMoE is left out.)

    Args:
        features: layer -> tokens and products of router logits, see `surgeon.prune.experts.features`.
        others: as in `hc_smoe`.

    Raises:
        As `hc_smoe`.
    """
    check_router(router, experts.running)
    found: dict[int, list[Cluster]] = {}
    for number, layer in enumerate(experts.running):
        check(stop)
        alone = frozenset((protected or {}).get(layer.index, ()))
        tokens, cosines = features[layer.index].tokens, features[layer.index].cosines()

        def group(members: tuple[int, ...], count: int, n=tokens, c=cosines) -> Sequence[tuple[int, ...]]:
            dominant = sorted(sorted(members, key=lambda e: (-int(n[e]), e))[:count])
            joined = {leader: [leader] for leader in dominant}
            for member in members:
                if member not in joined and n[member]:  # one without tokens has nothing to add
                    joined[min(dominant, key=lambda d: (-float(c[d, member]), d))].append(member)
            return [tuple(sorted(listed)) for listed in joined.values()]

        joined = clustering.in_groups(
            layer.count, keep, experts.groups, alone, group, 1 - cosines, f"layer {layer.index}"
        )
        made = []
        for members in joined:
            check(stop)
            leader = _leader(members, alone, tokens)
            one = _averaged(members, leader, alone, tokens, router)
            if one.shares is not None:
                one = _aligned(checkpoint, layer, one)
            made.append(one)
        found[layer.index] = made
        if progress is not None:
            progress(number + 1, len(experts.running))
    return _result(
        checkpoint,
        experts,
        found,
        {"method": "m-smoe", "features": "cosine of router logits"},
        router,
        features,
    )


def _leader(members: Sequence[int], protected: Collection[int], tokens: np.ndarray) -> int:
    """Return the member whose place is kept: a protected one, else the most used."""
    return min(members, key=lambda e: (e not in protected, -int(tokens[e]), e))


def _averaged(
    members: tuple[int, ...], leader: int, protected: Collection[int], tokens: np.ndarray, router: Router
) -> Cluster:
    """Return a cluster averaged by tokens; one around a protected expert keeps that expert's weights."""
    if len(members) == 1 or leader in protected:
        return Cluster(members, leader)
    used = tokens[list(members)].astype(np.float64)
    shares = tuple(float(share) for share in used / used.sum()) if used.sum() else equal_shares(members)
    return with_router(Cluster(members, leader, shares), router, shares)


def _aligned(checkpoint: Checkpoint, layer: ExpertLayer, cluster: Cluster) -> Cluster:
    """Return the cluster with every member's channels in the order that fits its representative's best."""
    leader = read_expert(checkpoint, layer, cluster.representative)
    orders = {}
    for member in cluster.members:
        if member != cluster.representative:
            orders[member] = channel_order(leader, read_expert(checkpoint, layer, member))
    return Cluster(
        cluster.members, cluster.representative, cluster.shares, orders, cluster.router, cluster.gain
    )


def channel_order(leader: ExpertWeights, member: ExpertWeights) -> np.ndarray:
    """Return for each channel of ``leader`` the channel of ``member`` that takes its place, int64 [width].

    The permutation with the largest sum of inner products between the weights of paired channels: gate row, up row,
    down column and their biases. A permutation changes nothing of what an expert computes. Needs width^2 numbers.
    """
    gain = leader.up @ member.up.T + leader.down.T @ member.down
    if leader.gate is not None and member.gate is not None:
        gain += leader.gate @ member.gate.T
    for ours, theirs in ((leader.gate_bias, member.gate_bias), (leader.up_bias, member.up_bias)):
        if ours is not None and theirs is not None:
            gain += np.outer(ours, theirs)
    return np.asarray(linear_sum_assignment(gain, maximize=True)[1], dtype=np.int64)


def weight_distances(checkpoint: Checkpoint, layer: ExpertLayer) -> np.ndarray:
    """Return the Euclidean distances between experts' flattened weights, float64 [E, E]; block by block."""
    tables = [parts(checkpoint, layer, expert) for expert in range(layer.count)]
    squares = np.zeros((layer.count, layer.count))
    block = max(1, BLOCK // layer.count)
    for role, part in tables[0].items():
        for start in range(0, part.elements, block):
            end = min(start + block, part.elements)
            values = np.stack([table[role].read(checkpoint, start, end) for table in tables]).astype(
                np.float64
            )
            products = values @ values.T
            lengths = np.diag(products)
            squares += np.maximum(lengths[:, None] + lengths[None, :] - 2 * products, 0.0)
    np.fill_diagonal(squares, 0.0)
    return np.sqrt((squares + squares.T) / 2)


def _result(
    checkpoint: Checkpoint, experts: Experts, found: Mapping[int, Sequence[Cluster]], about: dict[str, Any], router: Router,
    features: Mapping[int, LayerFeatures] | None,
) -> Result:  # fmt: skip
    if not found:
        raise UsageError(
            "E248", "the model has no layer of experts that a pass runs", help="surgeon inspect MODEL"
        )
    merged = MergedWeights(checkpoint, experts, found)
    remarks = [ROUTERS[router], WEAKNESS]
    idle = 0 if features is None else sum(int((one.tokens == 0).sum()) for one in features.values())
    if idle:
        remarks.append(
            f"{idle} experts were given no token of the text: they were dropped, not merged, as far as places allowed"
        )
    record = {**about, "router": router, "remarks": remarks, "layers": documents(found)}
    return cut_of(experts, found), merged if merged.tensors else None, record
