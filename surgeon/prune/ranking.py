"""The order in which the units of one attention or FFN go, and what each removal costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.structure.cut import Kept

MODES = {"attention": ("groups", "heads"), "ffn": ("channels",)}


@dataclass(frozen=True)
class Ranking:
    """The units of one module, first to go first.

    Attributes:
        layer: number of the layer.
        kind: "attention" or "ffn".
        mode: what a unit is: "channels" (an FFN channel), "groups" (a key/value head with its query
            heads), "heads" (one query head of every key/value head).
        order: int32 [units] numbers of units; in mode "heads" int32 [units, groups] numbers of query
            heads, row i being the heads that go i-th, one of each group.
        errors: float64 [units + 1], relative error p after i removals: 0 for none, 1 for all.
        size: query heads of a unit in mode "groups"; 1 otherwise.
        about: plain data on how it was found.
    """

    layer: int
    kind: str
    mode: str
    order: np.ndarray
    errors: np.ndarray
    size: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """How many units there are; in mode "heads" the query heads of one group."""
        return len(self.order)

    def kept(self, count: int) -> Kept:
        """Return what stays, ascending, when ``count`` units stay.

        Channels for an FFN, query heads for attention, whatever the mode: what a
        `surgeon.structure.cut.LayerCut` takes. In mode "heads" ``count`` heads of every group stay.
        """
        if not 0 <= count <= self.units:
            raise ValueError(f"{count} of {self.units} units cannot stay")
        stay = np.sort(self.order[self.units - count :].reshape(-1).astype(np.int64))
        if self.size > 1:
            stay = (stay[:, None] * self.size + np.arange(self.size)).reshape(-1)
        return tuple(int(unit) for unit in stay)

    def error(self, count: int) -> float:
        """Return the relative error when ``count`` units stay."""
        return float(self.errors[self.units - count])
