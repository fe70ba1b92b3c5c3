"""What a search over cuts works with and what it returns: rankings, true losses, the cut of choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.errors import InputError
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Cut

Rankings = Callable[[int, str, str], Ranking]
"""(layer, "attention" or "ffn", mode) -> the order in which its units go, and what that costs."""

Losses = Callable[[Sequence[Cut]], Sequence[float]]
"""True losses of cuts, in their order, such as `surgeon.prune.true_loss.TrueLoss`."""


@dataclass(frozen=True)
class Tried:
    """A cut whose true loss was computed.

    Attributes:
        cut: what is kept.
        loss: its true loss; infinite when it was not finite.
        prior: summed relative errors of its modules.
        cost: what it costs, in the unit of the goal.
        name: in a few words.
    """

    cut: Cut
    loss: float
    prior: float
    cost: float
    name: str


@dataclass(frozen=True)
class Choice:
    """The cut a search decided on.

    Attributes:
        best: the cut, with loss, prior and cost.
        mode: units of its attentions, "groups" or "heads"; "" when none was to be cut.
        tried: everything that was evaluated, in order, the best included.
        stopped: "converged", "evaluations" or "deadline". After a deadline the result depends on the machine's speed.
        within: whether its cost lies in the wanted band; False when granularity leaves nothing there.
        coefficients: module weights of the coefficient search, None where the cut is not from one.
        beyond: plans that cost less than the band allows, compared but never chosen.
    """

    best: Tried
    mode: str
    tried: tuple[Tried, ...]
    stopped: str
    within: bool
    coefficients: np.ndarray | None = None
    beyond: tuple[Tried, ...] = ()

    @property
    def cut(self) -> Cut:
        return self.best.cut

    @property
    def loss(self) -> float:
        return self.best.loss


def finite_best(tried: Sequence[Tried]) -> Tried:
    """Return what was tried with the least loss; of equals the first.

    Raises:
        InputError: E339 none has a finite loss.
    """
    best = min(tried, key=lambda one: one.loss)
    if not np.isfinite(best.loss):
        raise InputError(
            "E339", f"all {len(tried)} cuts that were tried give values that are not finite",
            help="the precision is too narrow: try float32; or give more calibration text, or a larger --damp",
        )  # fmt: skip
    return best
