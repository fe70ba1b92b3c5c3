"""Which structures of a model are kept: the one thing every pruning method decides.

A `Cut` names kept units by their number in the source model. Everything else follows from it and
from the model's `surgeon.structure.parts.Structure`: sliced tensors, the new configuration,
the masked model it must equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Kept = tuple[int, ...]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer: query heads, key/value heads, head size, FFN channels. Zero heads: no attention."""

    heads: int
    groups: int
    head_dim: int
    ffn: int


@dataclass(frozen=True)
class LayerCut:
    """What is kept of one layer.

    Attributes:
        heads: kept query heads of the source, ascending; None keeps all, () removes attention. A key/value
            head stays while one of its query heads does; all that stay keep equally many.
        channels: kept FFN channels of the source, ascending; None keeps all, () removes the FFN.
    """

    heads: Kept | None = None
    channels: Kept | None = None


@dataclass(frozen=True)
class Cut:
    """What is kept of a model.

    Attributes:
        layers: one entry for each layer of the source; None drops the layer.
        hidden: kept channels of the residual stream, ascending; None keeps all.
    """

    layers: tuple[LayerCut | None, ...]
    hidden: Kept | None = None

    @classmethod
    def whole(cls, layers: int) -> Cut:
        """Return the cut that keeps everything."""
        return cls((LayerCut(),) * layers)

    @property
    def kept_layers(self) -> Kept:
        """Numbers of the layers that stay."""
        return tuple(number for number, layer in enumerate(self.layers) if layer is not None)

    def identity(self) -> str:
        """Return a digest of what is kept."""
        return hashlib.sha256(json.dumps(self.document()).encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """Return the cut as plain data; `from_document` reads it."""
        return {
            "layers": [
                None if layer is None else {"heads": _list(layer.heads), "channels": _list(layer.channels)}
                for layer in self.layers
            ],
            "hidden": _list(self.hidden),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Cut:
        """Read what `document` made."""
        layers = tuple(
            None if layer is None else LayerCut(_tuple(layer["heads"]), _tuple(layer["channels"]))
            for layer in document["layers"]
        )
        return cls(layers, _tuple(document["hidden"]))


def compose(first: Cut, then: Cut) -> Cut:
    """Return the one cut of the source that equals cutting it and then cutting what was left.

    Args:
        first: of the source.
        then: of what ``first`` leaves; its layers are the kept ones.
    """
    if len(then.layers) != len(first.kept_layers):
        raise ValueError(f"{len(first.kept_layers)} layers were left, not {len(then.layers)}")
    layers: list[LayerCut | None] = [None] * len(first.layers)
    for number, second in zip(first.kept_layers, then.layers, strict=True):
        own = first.layers[number]
        assert own is not None
        if second is not None:
            layers[number] = LayerCut(_of(own.heads, second.heads), _of(own.channels, second.channels))
    return Cut(tuple(layers), _of(first.hidden, then.hidden))


def _of(first: Kept | None, then: Kept | None) -> Kept | None:
    if first is None or then is None:
        return first if then is None else then
    return tuple(first[unit] for unit in then)


def _list(kept: Kept | None) -> list[int] | None:
    return None if kept is None else [int(unit) for unit in kept]


def _tuple(kept: Sequence[int] | None) -> Kept | None:
    return None if kept is None else tuple(int(unit) for unit in kept)
