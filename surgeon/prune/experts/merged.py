"""Experts that stand for several: what a cluster becomes, as a Checkpoint of the tensors that change.

Nothing is computed beforehand. Every read takes the same stretch of all members from the source and returns their mean,
so a model of any size is merged in the memory of one block, and a killed run loses nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo
from surgeon.errors import UsageError
from surgeon.kernels.cast import narrow
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.parts import ExpertLayer, Experts, Role
from surgeon.structure.experts.weights import Part, channel_rows, parts, routing_parts

Router = Literal["representative", "average", "mass"]
"""The router row of a cluster: its representative's, the weighted mean of all, or the mean with all the members' mass."""

ROUTERS: dict[Router, str] = {
    "representative": "each cluster is called by its representative's router row alone",
    "average": "each merged expert is called by the mean of its members' router rows",
    "mass": "each merged expert is called by the mean of its members' router rows, its bias raised by ln(members)",
}


@dataclass(frozen=True)
class Cluster:
    """Experts of one layer that one expert stands for, by their numbers in the source.

    Attributes:
        members: ascending.
        representative: whose place the result takes, and whose weights stay where nothing is averaged.
        shares: share of every member in the merged weights, summing to 1; None keeps the representative's.
        channels: member -> its channel for each channel of the result; a missing one is taken in its own order.
        router: share of every member in the router row and its biases; None keeps the representative's.
        gain: added to the router's bias.
    """

    members: tuple[int, ...]
    representative: int
    shares: tuple[float, ...] | None = None
    channels: Mapping[int, np.ndarray] = field(default_factory=dict)
    router: tuple[float, ...] | None = None
    gain: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return the cluster as plain data; permutations by digest."""
        found: dict[str, Any] = {"expert": self.representative, "members": list(self.members)}
        if self.shares is not None:
            found["shares"] = [float(f"{share:.9g}") for share in self.shares]
        if self.router is not None:
            found["router"] = [float(f"{share:.9g}") for share in self.router]
        if self.gain:
            found["gain"] = self.gain
        if self.channels:
            digest = hashlib.sha256()
            for member, order in sorted(self.channels.items()):
                digest.update(f"{member}\0".encode() + np.ascontiguousarray(order, np.int64).tobytes())
            found["channels"] = digest.hexdigest()
        return found


def equal_shares(members: Sequence[int]) -> tuple[float, ...]:
    return (1.0 / len(members),) * len(members)


def with_router(cluster: Cluster, router: Router, shares: tuple[float, ...]) -> Cluster:
    """Return a cluster of several members with a router row of this kind."""
    if router == "representative" or len(cluster.members) == 1:
        return cluster
    gain = float(np.log(len(cluster.members))) if router == "mass" else 0.0
    return replace(cluster, router=shares, gain=gain)


def check_router(router: str, layers: Sequence[ExpertLayer]) -> None:
    """Refuse a router that the family cannot have.

    Raises:
        UsageError: E248.
    """
    if router not in ROUTERS:
        raise UsageError(
            "E248", f'"{router}" is no way to make a router row', help="one of " + ", ".join(ROUTERS)
        )
    if router == "mass" and any(not tuple(layer.of("router_bias")) for layer in layers):
        raise UsageError("E248", "this family's router has no bias, so one row cannot call a merged expert with the mass of all its members",
                         help="--router representative, or average")  # fmt: skip


def cut_of(experts: Experts, clusters: Mapping[int, Sequence[Cluster]]) -> ExpertCut:
    """Return the cut that keeps the representatives; layers that no pass runs copy the last one that runs."""
    kept = {layer: tuple(sorted(c.representative for c in listed)) for layer, listed in clusters.items()}
    last = kept[experts.running[-1].index]
    return ExpertCut(kept | {layer.index: last for layer in experts.layers if not layer.runs})


_Term = tuple[float, Part, np.ndarray | None]
"""A share, a part, and where its rows or columns come from; None in their own order."""


@dataclass(frozen=True)
class _Mean:
    """A weighted mean of parts."""

    terms: tuple[_Term, ...]
    code: str
    gain: float = 0.0


class MergedWeights:
    """A Checkpoint of what clusters change: tensors under the source's names, shapes and types.

    A part of a tensor that holds all experts goes by "NAME#EXPERT" and has the shape of that part; so do router rows.
    Means are computed in float64 and rounded once.

    Args:
        checkpoint: the source.
        experts: of the source.
        clusters: layer -> its clusters.

    Raises:
        InputError: E442 quantized.
    """

    def __init__(
        self, checkpoint: Checkpoint, experts: Experts, clusters: Mapping[int, Sequence[Cluster]]
    ) -> None:
        self.source = checkpoint
        self.clusters = {layer: tuple(listed) for layer, listed in clusters.items()}
        self.label = checkpoint.label
        self.folder: Path | None = None
        self.config: dict[str, Any] | None = None
        self.headers = checkpoint.headers
        self.tensors: dict[str, TensorInfo] = {}
        self._means: dict[str, _Mean] = {}
        for number, listed in self.clusters.items():
            for cluster in listed:
                self._add(experts.layer(number), cluster)

    @cached_property
    def identity(self) -> str:
        """Digest of the clusters and of what they are made from."""
        about = {
            "format": 1, "source": getattr(self.source, "identity", ""), "headers": [h.sha256 for h in self.headers],
            "clusters": {str(layer): [c.document() for c in listed] for layer, listed in sorted(self.clusters.items())},
        }  # fmt: skip
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _add(self, layer: ExpertLayer, cluster: Cluster) -> None:
        if cluster.shares is not None:
            self._merge(layer, cluster, cluster.shares)
        if cluster.router is None:
            return
        tables = {member: routing_parts(self.source, layer, member) for member in cluster.members}
        for role, part in tables[cluster.representative].items():
            terms: list[_Term] = [
                (s, tables[m][role], None) for m, s in zip(cluster.members, cluster.router, strict=True)
            ]
            self._put(part, terms, cluster.gain if role == "router_bias" else 0.0)

    def _merge(self, layer: ExpertLayer, cluster: Cluster, shares: tuple[float, ...]) -> None:
        tables = {member: parts(self.source, layer, member) for member in cluster.members}
        for role, part in tables[cluster.representative].items():
            terms = []
            for member, share in zip(cluster.members, shares, strict=True):
                if share:
                    other = tables[member][role]
                    terms.append((share, other, _order(other, role, cluster.channels.get(member))))
            self._put(part, terms)

    def _put(self, part: Part, terms: list[_Term], gain: float = 0.0) -> None:
        info = self.source.tensors[part.tensor.name]
        nbytes = part.elements * DTYPES[info.dtype].bits // 8
        self.tensors[part.key] = replace(info, name=part.key, shape=part.shape, nbytes=nbytes)
        self._means[part.key] = _Mean(tuple(terms), info.dtype, gain)

    # ---- reading -----------------------------------------------------------------------------------

    def computed(self, name: str) -> bool:
        """Say whether values are computed; they are, but arrive rounded to the stored type, bit by bit."""
        return False

    def granularity(self, name: str) -> int:
        shape = self.tensors[name].shape
        return shape[-1] if len(shape) > 1 else 1

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of a flattened tensor in the source's type."""
        mean = self._means[name]
        total = np.full(stop - start, mean.gain, dtype=np.float64)
        for share, part, order in mean.terms:
            total += share * self._values(part, order, start, stop).astype(np.float64)
        values = total if mean.code == "F64" else total.astype(np.float32)
        return narrow(values, mean.code)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        size = DTYPES[self.tensors[name].dtype].bits // 8
        first, end = start // size, -(-stop // size)
        content = np.ascontiguousarray(self.read(name, first, end)).view(np.uint8)
        return content[start - first * size : stop - first * size]

    def _values(self, part: Part, order: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        if order is None:
            return part.read(self.source, start, stop)
        if len(part.shape) == 1:
            return part.read(self.source)[order[start:stop]]
        width = part.elements // part.shape[0]
        first, end = start // width, -(-stop // width)
        if part.channel_axis == 0:
            rows = part.read_rows(self.source, order[first:end])
        else:
            rows = part.read(self.source, first * width, end * width).reshape(end - first, width)[:, order]
        return rows.reshape(-1)[start - first * width : stop - first * width]


def _order(part: Part, role: Role, channels: np.ndarray | None) -> np.ndarray | None:
    """Return the stored rows or columns of a part, in the order of the result's channels."""
    if channels is None or part.channel_axis is None:
        return None
    lies = channel_rows(part, len(channels))
    order = np.empty(lies.size, dtype=np.int64)
    for row in lies:
        order[row] = row[channels]
    return order
