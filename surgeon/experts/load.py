"""How evenly a router spreads its tokens over the experts of one layer.

Everything here is arithmetic on counts; a layer without tokens has no figures (None), never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RARE = 0.1
"""An expert with less than this share of the average number of tokens is called rare."""
COVERED = (0.5, 0.8, 0.95)
RELIABLE = 32
"""Tokens an expert needs on average before statistics over it mean something."""


@dataclass(frozen=True)
class Load:
    """The load of one layer's experts.

    Attributes:
        tokens: tokens that entered the layer, N.
        selections: choices made, sum of ``counts`` (N * top-k unless slots stayed empty).
        counts: int64 [E], tokens of each expert.
        cv: population standard deviation of the counts over their mean.
        cv_expected: what the coefficient of variation would be about if all experts were equally likely and the
            choices independent: sqrt((E - 1) / selections). Imbalance on few tokens is mostly this.
        cv_ratio: cv / cv_expected; near 1 says that there is no imbalance to be seen. None with one expert.
        max_over_mean: load of the busiest expert over the average.
        gini: Gini coefficient of the counts, 0 even, (E-1)/E all on one.
        entropy: of the shares, over ln E: 1 even, 0 all on one.
        effective: exp(entropy in nats): how many equally loaded experts would have that entropy.
        dead: experts without a token.
        rare: experts with some, but less than a tenth of the average.
        covering: share -> how few experts make up that share of the selections.
        covering_output: the same for the mass of gate * norm, None where it is not known.
        gate_share: float64 [E], share of the summed weights; None where they are not known.
        mean_gate: float64 [E], mean weight when selected, 0 for dead experts; None where weights are not known.
    """

    tokens: int
    selections: int
    counts: np.ndarray
    cv: float | None
    cv_expected: float | None
    cv_ratio: float | None
    max_over_mean: float | None
    gini: float | None
    entropy: float | None
    effective: float | None
    dead: tuple[int, ...]
    rare: tuple[int, ...]
    covering: dict[float, int] | None
    covering_output: dict[float, int] | None
    gate_share: np.ndarray | None
    mean_gate: np.ndarray | None

    @property
    def reliable(self) -> bool:
        """Say whether experts have enough tokens on average for figures about single ones."""
        return self.selections >= RELIABLE * len(self.counts)

    def document(self) -> dict[str, Any]:
        """Return the load as plain data."""
        shares = None if self.selections == 0 else (self.counts / self.selections).tolist()
        named = {f"{share:g}": None for share in COVERED}
        return {
            "tokens": self.tokens,
            "selections": self.selections,
            "counts": [int(n) for n in self.counts],
            "shares": shares,
            "cv": self.cv,
            "cv_expected": self.cv_expected,
            "cv_ratio": self.cv_ratio,
            "max_share": None if shares is None else max(shares),
            "max_over_mean": self.max_over_mean,
            "gini": self.gini,
            "entropy": self.entropy,
            "effective": self.effective,
            "dead": list(self.dead),
            "rare": list(self.rare),
            "covering": named if self.covering is None else {f"{k:g}": v for k, v in self.covering.items()},
            "covering_output": None
            if self.covering_output is None
            else {f"{k:g}": v for k, v in self.covering_output.items()},
            "gate_share": None if self.gate_share is None else self.gate_share.tolist(),
            "mean_gate": None if self.mean_gate is None else self.mean_gate.tolist(),
            "reliable": self.reliable,
        }


def load_of(
    counts: np.ndarray, tokens: int, *, gate: np.ndarray | None = None, gated: np.ndarray | None = None
) -> Load:
    """Return the load of one layer.

    Args:
        counts: [E], tokens routed to each expert; whole numbers of any type.
        tokens: tokens that entered the layer.
        gate: [E], sum of the weights the layer gave each expert.
        gated: [E], sum of weight * norm of the expert's output.
    """
    counts = np.asarray(counts).astype(np.int64)
    experts, selections = len(counts), int(counts.sum())
    dead = tuple(int(e) for e in np.flatnonzero(counts == 0))
    if selections == 0:
        return Load(
            tokens, 0, counts, None, None, None, None, None, None, None, dead, (), None, None, None, None
        )
    average = selections / experts
    cv = float(counts.std() / average)
    expected = math.sqrt((experts - 1) / selections)
    entropy = entropy_of(counts)
    mean_gate = None
    if gate is not None:
        mean_gate = np.divide(gate, counts, out=np.zeros(experts), where=counts > 0)
    return Load(
        tokens=tokens,
        selections=selections,
        counts=counts,
        cv=cv,
        cv_expected=expected,
        cv_ratio=cv / expected if expected else None,
        max_over_mean=float(counts.max() / average),
        gini=gini(counts),
        entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        effective=math.exp(entropy),
        dead=dead,
        rare=tuple(int(e) for e in np.flatnonzero((counts > 0) & (counts < RARE * average))),
        covering=covering(counts),
        covering_output=None if gated is None else covering(gated),
        gate_share=_shares(gate),
        mean_gate=mean_gate,
    )


def gini(values: np.ndarray) -> float | None:
    """Return the Gini coefficient sum_i (2i - E - 1) v_(i) / (E sum v), v ascending, i from 1; None when all are 0."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    total = ordered.sum()
    if total == 0:
        return None
    count = len(ordered)
    return float(((2 * np.arange(1, count + 1) - count - 1) * ordered).sum() / (count * total))


def entropy_of(counts: np.ndarray) -> float:
    """Return the entropy in nats of non-negative numbers taken as shares of their sum, which is not 0."""
    shares = np.asarray(counts, dtype=np.float64)
    shares = shares[shares > 0] / shares.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def covering(mass: np.ndarray, shares: Sequence[float] = COVERED) -> dict[float, int] | None:
    """Return share -> the fewest experts that hold that share of the mass together; None when there is none."""
    running = np.cumsum(np.sort(np.asarray(mass, dtype=np.float64))[::-1])
    if running[-1] <= 0:
        return None
    # a share that is reached exactly counts as reached, whatever the last bit of the sum says
    wanted = [share * running[-1] * (1 - 1e-12) for share in shares]
    return {
        share: int(np.searchsorted(running, need) + 1) for share, need in zip(shares, wanted, strict=True)
    }


def _shares(mass: np.ndarray | None) -> np.ndarray | None:
    total = 0.0 if mass is None else float(mass.sum())
    return None if mass is None or total <= 0 else mass / total
