"""What the weights alone say about experts, where no text can be run: sizes, likeness, copies.

Every expert is read once, one stretch of all experts of a layer at a time. Quantized experts are compared by their
stored bytes only.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Interrupted
from surgeon.experts import criteria
from surgeon.structure.experts.parts import ExpertLayer, Experts
from surgeon.structure.experts.weights import BIASES, ROUTING, WEIGHTS, parts, refuse_quantized, router_rows

STRETCH = 1 << 22
"""Weights of all experts of a layer held at once."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Likest:
    """Two experts of a layer and how alike they are.

    Attributes:
        first, second: experts.
        value: cosine of router rows, or distance of weights.
    """

    first: int
    second: int
    value: float

    def document(self) -> dict[str, Any]:
        """Return the pair as plain data."""
        return {"experts": [self.first, self.second], "value": self.value}


@dataclass(frozen=True)
class LayerWeights:
    """One layer's experts by their weights.

    Attributes:
        layer: its number.
        router_norms: float64 [E], length of each router row; None where the router is quantized.
        router_cosine: mean cosine of two different rows; None with one expert, or a quantized router.
        router_closest: the two rows with the highest cosine.
        norms: float64 [E], Frobenius norm of gate, up and down together; None where experts are quantized.
        closest: the two experts at the smallest distance, relative to the root mean square of their norms; independent
            random weights are sqrt(2) apart, copies 0.
        duplicates: sets of experts that are stored with the same bytes.
        criteria: name of a weights criterion -> float64 [E], higher is kept; empty where experts are quantized.
    """

    layer: int
    router_norms: np.ndarray | None
    router_cosine: float | None
    router_closest: Likest | None
    norms: np.ndarray | None
    closest: Likest | None
    duplicates: tuple[tuple[int, ...], ...]
    criteria: Mapping[str, np.ndarray]

    def document(self) -> dict[str, Any]:
        """Return the layer as plain data."""
        return {
            "layer": self.layer,
            "router_norms": None if self.router_norms is None else self.router_norms.tolist(),
            "router_cosine": self.router_cosine,
            "router_closest": None if self.router_closest is None else self.router_closest.document(),
            "norms": None if self.norms is None else self.norms.tolist(),
            "closest": None if self.closest is None else self.closest.document(),
            "duplicates": [list(group) for group in self.duplicates],
            "criteria": {name: scores.tolist() for name, scores in self.criteria.items()},
        }


def weights_of(
    checkpoint: Checkpoint, experts: Experts, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> list[LayerWeights]:  # fmt: skip
    """Return what the weights say about every layer, those that do not run included.

    Raises:
        Interrupted: E130 ``stop`` was set.
    """
    found = []
    for number, layer in enumerate(experts.layers):
        if stop is not None and stop.is_set():
            raise Interrupted("E130", "stopped while reading experts", help="run again; nothing was written")
        found.append(layer_weights(checkpoint, experts, layer))
        if progress is not None:
            progress(number + 1, len(experts.layers))
    return found


def layer_weights(checkpoint: Checkpoint, experts: Experts, layer: ExpertLayer) -> LayerWeights:
    """Return what the weights say about the experts of one layer."""
    rows = _readable(lambda: router_rows(checkpoint, layer))
    plain = _readable(lambda: refuse_quantized(checkpoint, layer) or True) is not None
    norms, closest, scores = None, None, {}
    if plain:
        products, duplicates = _products(checkpoint, layer)
        norms = np.sqrt(products.diagonal())
        closest = _closest(checkpoint, layer, products, duplicates)
        for name in criteria.known():
            criterion = criteria.get(name)
            if criterion.needs == "weights":
                scores[name] = criterion.score(checkpoint, experts, layer)
    else:
        duplicates = _stored_alike(checkpoint, layer)
    if rows is None:
        return LayerWeights(layer.index, None, None, None, norms, closest, duplicates, scores)
    lengths = np.sqrt(np.square(rows.astype(np.float64)).sum(axis=1))
    cosine, alike = _cosines(rows.astype(np.float64), lengths)
    return LayerWeights(layer.index, lengths, cosine, alike, norms, closest, duplicates, scores)


def _readable(read: Callable[[], Any]) -> Any:
    """Return what is read, None where its values are coded."""
    try:
        return read()
    except InputError as error:
        if error.code != "E442":
            raise
        return None


def _cosines(rows: np.ndarray, lengths: np.ndarray) -> tuple[float | None, Likest | None]:
    if len(rows) < 2:
        return None, None
    unit = np.divide(rows, lengths[:, None], out=np.zeros_like(rows), where=lengths[:, None] > 0)
    first, second = np.triu_indices(len(rows), 1)
    values = np.clip((unit @ unit.T)[first, second], -1.0, 1.0)
    best = int(values.argmax())
    return float(values.mean()), Likest(int(first[best]), int(second[best]), float(values[best]))


def _products(checkpoint: Checkpoint, layer: ExpertLayer) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    """Return inner products [E, E] of all experts' matrices, float64, and which experts are the same."""
    each = [parts(checkpoint, layer, expert, *WEIGHTS, *BIASES) for expert in range(layer.count)]
    digests = [hashlib.sha256() for _ in each]
    products = np.zeros((layer.count, layer.count))
    step = max(1, STRETCH // layer.count)
    for role in each[0]:
        for start in range(0, each[0][role].elements, step):
            stop = min(start + step, each[0][role].elements)
            values = np.stack(
                [found[role].read(checkpoint, start, stop).astype(np.float32, copy=False) for found in each]
            )
            for digest, row in zip(digests, values, strict=True):
                digest.update(row.tobytes())
            if role in WEIGHTS:
                products += values @ values.T
    return products, _same([digest.digest() for digest in digests])


def _closest(
    checkpoint: Checkpoint, layer: ExpertLayer, products: np.ndarray, duplicates: tuple[tuple[int, ...], ...]
) -> Likest | None:  # fmt: skip
    """Return the two experts that are nearest by their inner products, with the distance from the weights themselves."""
    if duplicates:
        return Likest(duplicates[0][0], duplicates[0][1], 0.0)
    squares = products.diagonal()
    if len(squares) < 2:
        return None
    first, second = np.triu_indices(len(squares), 1)
    scale = (squares[first] + squares[second]) / 2
    apart = np.maximum(2 * scale - 2 * products[first, second], 0.0)
    best = int(np.divide(apart, scale, out=np.zeros_like(apart), where=scale > 0).argmin())
    pair = int(first[best]), int(second[best])
    distance = _distance(checkpoint, layer, *pair)
    return Likest(*pair, distance / float(np.sqrt(scale[best])) if scale[best] > 0 else 0.0)


def _distance(checkpoint: Checkpoint, layer: ExpertLayer, first: int, second: int) -> float:
    """Return the distance of two experts' matrices; inner products lose the digits of near copies."""
    ours, theirs = (parts(checkpoint, layer, expert, *WEIGHTS) for expert in (first, second))
    total = 0.0
    for role, part in ours.items():
        for start in range(0, part.elements, STRETCH):
            stop = min(start + STRETCH, part.elements)
            apart = part.read(checkpoint, start, stop).astype(np.float64) - theirs[role].read(
                checkpoint, start, stop
            )
            total += float(apart @ apart)
    return float(np.sqrt(total))


def _stored_alike(checkpoint: Checkpoint, layer: ExpertLayer) -> tuple[tuple[int, ...], ...]:
    """Return which experts have the same stored bytes, scales and packed values included."""
    digests = []
    for expert in range(layer.count):
        digest = hashlib.sha256()
        for tensor in sorted(layer.tensors, key=lambda t: (t.role, t.name if t.expert is None else t.name.rpartition(".")[2])):  # fmt: skip
            if tensor.role in ROUTING or tensor.expert not in (None, expert):
                continue
            size = checkpoint.tensors[tensor.name].nbytes
            start = 0
            if tensor.expert_axis is not None:
                assert tensor.expert_axis == 0, tensor
                size //= layer.count
                start = expert * size
            digest.update(f"{tensor.role} {size} ".encode())
            for place in range(start, start + size, STRETCH):
                stop = min(place + STRETCH, start + size)
                digest.update(checkpoint.read_bytes(tensor.name, place, stop).tobytes())
        digests.append(digest.digest())
    return _same(digests)


def _same(digests: list[bytes]) -> tuple[tuple[int, ...], ...]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for expert, digest in enumerate(digests):
        groups[digest].append(expert)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
