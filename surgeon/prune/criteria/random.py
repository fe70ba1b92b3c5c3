"""Random order: the floor every other criterion is measured against."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from surgeon import seeds
from surgeon.prune.criteria import Context
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept


class Random:
    """Draws an order for each module from (seed, name of its output matrix); its error counts units that are gone."""

    name = "random"
    version = 1
    needs: frozenset[str] = frozenset()
    solves = False

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module; the same seed gives the same order whatever else is ranked."""
        key = seeds.stream_key(context.seed, 0, f"{context.module} {context.mode}")
        drawn = context.ranking(seeds.uniform(key, 0, context.units))
        return context.ranked(drawn.order, np.linspace(0.0, 1.0, drawn.units + 1))

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        return None


CRITERION = Random()
