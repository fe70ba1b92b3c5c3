"""Structured Wanda: weights times the size of what they are applied to (Wanda, arXiv 2306.11695, summed as Wanda-sp does).

``S_j = sum_i |W_ij| * ||x_j||_2`` for a column of the output matrix; a head or group adds up its columns.
"""

from __future__ import annotations

from torch import Tensor

from surgeon.prune.criteria import Context
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept


class Wanda:
    """Ranks by weights times activations; the weights that stay do not change."""

    name = "wanda"
    version = 1
    needs = frozenset({"moments"})
    solves = False

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module."""
        assert context.moments is not None, "it needs moments"
        size = context.weight.abs().double().sum(0).cpu().numpy()
        return context.ranking(context.by_unit(size * context.moments.norm))

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        return None


CRITERION = Wanda()
