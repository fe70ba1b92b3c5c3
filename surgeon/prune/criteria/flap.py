"""FLAP: channels whose contribution hardly fluctuates go first, and a bias stands in for their mean.

    S_j = Var(x_j) * ||W[:, j]||^2         (arXiv 2312.11983, section 3)

over tokens, at the inputs of the output matrices. What the removed channels P contribute on average
stays: ``b += W[:, P] mean(x_P)``, so a channel that never changes is removed without a trace. Where a
family's class has no bias there, the score can still be used, and weights solved for instead.

`allocate` shares a removal out over the whole model: scores are standardised in each module, averaged
over a head's channels, and one threshold is put through all of them, where each unit counts its
parameters. Differences from the published code: key/value groups are cut as a whole (its mask on queries, keys and
values breaks grouped queries), parameters are counted from the tensors, scores of attention and FFN are squared
equally often, and moments are those of all tokens, merged in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.prune.criteria import Context
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept
from surgeon.structure.parts import Attention, Section


class Flap:
    """Ranks by fluctuation, and folds the mean of what goes into the output bias."""

    name = "flap"
    version = 1
    needs = frozenset({"moments"})
    solves = False

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module."""
        return context.ranking(context.by_unit(fluctuations(context)))

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        """Return the mean contribution of what does not stay, float32 [out]; None when all of it stays."""
        assert context.moments is not None, "it needs moments"
        size = context.part.head_dim if isinstance(context.part, Attention) else 1
        gone = np.ones(len(context.moments.mean), dtype=bool)
        gone.reshape(-1, size)[list(kept)] = False
        if not gone.any():
            return None
        mean = torch.from_numpy(np.where(gone, context.moments.mean, 0.0)).to(context.device)
        return (context.weight.double() @ mean).float().cpu()


def fluctuations(context: Context) -> np.ndarray:
    """Return S_j of each input channel of the output matrix, float64 [in]."""
    assert context.moments is not None, "it needs moments"
    return context.moments.variance * context.weight.double().square().sum(0).cpu().numpy()


def standardised(context: Context) -> np.ndarray:
    """Return (S - mean) / deviation of a module's channels, averaged over each unit's, float64 [units].

    All zero where no channel differs from another.
    """
    scores = fluctuations(context)
    deviation = scores.std()
    if not deviation > 0:
        return np.zeros(context.units)
    return context.by_unit((scores - scores.mean()) / deviation) / context.columns


def unit_parameters(context: Context) -> int:
    """Return the parameters that leave with one removal of a ranking.

    One channel, one group with its query heads, or (mode "heads") one query head of every group, whose
    keys and values stay.
    """
    part, tensors = context.part, context.checkpoint.tensors
    if isinstance(part, Attention):
        heads = part.heads // (part.groups if context.mode == "groups" else part.per_group)
        columns = heads * part.head_dim
        made = sum(_elements(tensors, section) * heads // section.units for section in part.queries)
        if context.mode == "groups":
            made += sum(_elements(tensors, section) // section.units for section in part.key_values)
    else:
        columns = 1
        made = sum(_elements(tensors, section) // section.units for section in part.inputs)
    info = tensors[part.output.weight]
    return made + columns * info.elements // info.shape[part.output.input_axis]


def _elements(tensors, section: Section) -> int:
    info = tensors[section.tensor]
    return info.elements // info.shape[section.axis] * section.length


def allocate(contexts: Sequence[Context], fraction: float, *, least: int = 1) -> dict[tuple[int, str], int]:
    """Return how many units each module keeps when one threshold goes through all of them.

    Args:
        contexts: every module that may be cut, each once, with moments.
        fraction: share of their parameters to remove, in [0, 1).
        least: units that every module keeps.

    Returns:
        (layer, kind) -> units to keep, for `surgeon.prune.ranking.Ranking.kept`. The parameters removed
        are the fewest that reach ``fraction``, or all that may go.

    Raises:
        UsageError: E276 the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(
            "E276", f"{fraction} is no share of parameters to remove", help="give a number from 0 to below 1"
        )
    counts, menu, total = {}, [], 0
    for context in contexts:
        key = (context.layer, context.kind)
        if key in counts:
            raise ValueError(f"layer {context.layer} has its {context.kind} twice")
        ranking, scores, cost = CRITERION.rank(context), standardised(context), unit_parameters(context)
        counts[key] = ranking.units
        total += cost * ranking.units
        steps = scores[ranking.order].reshape(ranking.units, -1).mean(1)
        # A module's units go in its own order, whatever rounding does to equal scores.
        steps = np.maximum.accumulate(steps)
        menu += [(steps[place], key, place, cost) for place in range(max(0, ranking.units - least))]
    removed, wanted = 0, math.ceil(fraction * total - 1e-9)
    for _, key, _, cost in sorted(menu):
        if removed >= wanted:
            break
        counts[key] -= 1
        removed += cost
    return counts


CRITERION = Flap()
