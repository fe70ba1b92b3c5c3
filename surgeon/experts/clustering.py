"""Clusters of similar experts: agglomerative, with equally many in every routing group.

Any symmetric table of distances will do: router rows, mean outputs, weights. Only the order of the merges counts, so a
constant may be added to all distances.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from surgeon.errors import UsageError

Linkage = Literal["complete", "average"]
Members = tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """Two clusters that become one, at the distance the linkage gives them; members ascending."""

    first: Members
    second: Members
    distance: float


def euclidean(features: np.ndarray) -> np.ndarray:
    """Return the distances between rows, float64 [n, n]; equal rows have exactly 0."""
    values = np.asarray(features, dtype=np.float64)
    return np.stack([np.sqrt(np.square(values - row).sum(axis=1)) for row in values])


def merges(distances: np.ndarray, linkage: Linkage) -> list[Merge]:
    """Return all n - 1 merges of agglomerative clustering, nearest first.

    Args:
        distances: [n, n], symmetric; the diagonal is not looked at. Values may be negative (similarities turned
            round): complete and average linkage do not care about an added constant.
        linkage: distance of two clusters: the largest, or the mean, of the distances between their members.
    """
    count = len(distances)
    if count < 2:
        return []
    table = np.array(distances, dtype=np.float64)
    np.fill_diagonal(table, 0.0)
    condensed = squareform(table, checks=False)
    shift = min(0.0, float(condensed.min()))
    members: list[Members] = [(i,) for i in range(count)]
    found = []
    for first, second, distance, _ in hierarchy.linkage(condensed - shift, linkage):
        pair = sorted((members[int(first)], members[int(second)]))
        found.append(Merge(pair[0], pair[1], float(distance) + shift))
        members.append(tuple(sorted((*pair[0], *pair[1]))))
    return found


def clusters(distances: np.ndarray, count: int, linkage: Linkage) -> list[Members]:
    """Return exactly ``count`` clusters of n things, by their first members.

    The first n - count merges are made. (Cutting at a height gives fewer clusters where distances tie.)
    """
    found: set[Members] = {(i,) for i in range(len(distances))}
    for merge in merges(distances, linkage)[: len(distances) - count]:
        found -= {merge.first, merge.second}
        found.add(tuple(sorted((*merge.first, *merge.second))))
    return sorted(found)


def in_groups(
    experts: int, keep: int, groups: int, protected: Collection[int], cluster: Callable[[Members, int], Sequence[Members]],
    distances: np.ndarray, where: str = "",
) -> list[Members]:  # fmt: skip
    """Return ``keep`` clusters of the experts of one layer, equally many in each routing group.

    A protected expert is a cluster of its own. Where a group has no place left beside its protected ones, the
    others join the nearest of them, whose weights stay as they are.

    Args:
        cluster: makes so many clusters of these experts (global numbers).
        distances: [experts, experts], for the case without place.
        where: the layer in words, for messages.

    Raises:
        UsageError: E248 the number does not go with the groups, or more are protected than may stay.
    """
    if not 1 <= keep <= experts or keep % groups or experts % groups:
        raise UsageError("E248", f"{experts} experts in {groups} routing groups do not make {keep} clusters of equal number",
                         help=f"keep a multiple of {groups} up to {experts}")  # fmt: skip
    each, size = keep // groups, experts // groups
    found: list[Members] = []
    for group in range(groups):
        everyone = range(group * size, (group + 1) * size)
        alone = [e for e in everyone if e in protected]
        others = tuple(e for e in everyone if e not in protected)
        free = each - len(alone)
        if free < 0:
            raise UsageError("E248", f"{len(alone)} experts{where and ' of ' + where} are protected ({', '.join(map(str, alone))}), but only "
                             f"{each} may stay", help="keep more experts, protect fewer, or --no-protect")  # fmt: skip
        if free or not others:
            found += [(e,) for e in alone]
            # fewer others than places: every one of them stays, and there are as many places as experts
            found += list(cluster(others, min(free, len(others)))) if others else []
            continue
        joined: dict[int, list[int]] = {e: [e] for e in alone}
        for other in others:
            joined[min(alone, key=lambda e: (distances[e, other], e))].append(other)
        found += [tuple(sorted(members)) for members in joined.values()]
    return sorted(found)
