"""What stays of a model's experts: the one thing every method for mixtures of experts decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Place = tuple[int, int]
"""(layer, expert), both by their numbers in the source."""


@dataclass(frozen=True)
class ExpertCut:
    """Experts and channels of the source that stay, all by their numbers in the source.

    Attributes:
        kept: layer -> experts that stay, ascending. A layer that is missing keeps all of them.
        channels: (layer, expert) -> channels that stay, ascending; a missing one keeps all.
        width: channels every expert is stored with when it is more than some of them keep (the rest are zeros);
            None stores exactly the channels that stay.
        scales: (layer, expert) -> factor on the expert's contribution (its down projection and down bias).
        without: layers beyond the configured number (multi-token prediction) that are left out altogether.
    """

    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    channels: Mapping[Place, tuple[int, ...]] = field(default_factory=dict)
    width: int | None = None
    scales: Mapping[Place, float] = field(default_factory=dict)
    without: tuple[int, ...] = ()

    def experts(self, layer: int, count: int) -> tuple[int, ...]:
        """Return the experts of a layer that stay; ``count`` is how many the source has."""
        return self.kept.get(layer, tuple(range(count)))

    def document(self) -> dict[str, Any]:
        """Return the cut as plain data, for JSON."""
        return {
            "kept": {str(layer): list(ids) for layer, ids in sorted(self.kept.items())},
            "channels": {f"{layer}:{expert}": list(ids) for (layer, expert), ids in sorted(self.channels.items())},
            "width": self.width,
            "scales": {f"{layer}:{expert}": factor for (layer, expert), factor in sorted(self.scales.items())},
            "without": list(self.without),
        }  # fmt: skip

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ExpertCut:
        """Return the cut a document describes.

        Raises:
            KeyError, ValueError, TypeError: it is no such document.
        """
        return cls(
            {int(layer): tuple(map(int, ids)) for layer, ids in document["kept"].items()},
            {_place(name): tuple(map(int, ids)) for name, ids in document["channels"].items()},
            None if document["width"] is None else int(document["width"]),
            {_place(name): float(factor) for name, factor in document["scales"].items()},
            tuple(map(int, document["without"])),
        )

    def identity(self) -> str:
        """Return a digest; equal cuts have equal ones."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


def _place(name: str) -> Place:
    layer, _, expert = name.partition(":")
    return int(layer), int(expert)
