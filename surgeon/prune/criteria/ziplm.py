"""ZipLM: what costs least goes, after the rest has made up for it (arXiv 2302.04089, section 3.1).

See `surgeon.prune.obs`. Weights that stay are solved for once the cut is known (`surgeon.prune.resolve`).
"""

from __future__ import annotations

from torch import Tensor

from surgeon.prune.criteria import Context
from surgeon.prune.obs import removal_order
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept
from surgeon.structure.parts import Attention


class ZipLM:
    """Ranks by the exact increase of the output error, with all that stays changed to make up for it."""

    name = "ziplm"
    version = 1
    needs = frozenset({"hessian"})
    solves = True

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module."""
        assert context.hessian is not None, "it needs second moments"
        part = context.part
        groups = part.groups if context.mode == "heads" and isinstance(part, Attention) else None
        found = removal_order(
            context.weight, context.hessian, context.columns, groups=groups, damp=context.damp, module=context.module
        )  # fmt: skip
        about = {
            "damp": found.damp,
            "escalated": found.escalated,
            "precision": found.precision,
            "checks": [list(check) for check in found.checks],
        }
        return context.ranked(found.order, found.errors, about)

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        return None


CRITERION = ZipLM()
