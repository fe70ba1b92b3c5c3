"""How many experts a token would use if it took them until their probability reached p.

Dynamic top-p routing (arXiv 2403.07652, there trained with p = 0.4) needs code in the runtime and cannot be put into a
checkpoint. On a model trained with a fixed number it can be simulated from the router's logits, which shows whether
a smaller fixed number would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MASSES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def probabilities(logits: np.ndarray, score: str) -> np.ndarray:
    """Return shares that sum to 1 over the experts, float64 [tokens, E].

    Args:
        logits: [tokens, E].
        score: how the family scores experts; sigmoid scores are divided by their sum.
    """
    logits = logits.astype(np.float64)
    if score == "sigmoid":
        values = 1 / (1 + np.exp(-logits))
    elif score == "sqrtsoftplus":
        values = np.sqrt(np.logaddexp(0.0, logits))
    else:
        values = np.exp(logits - logits.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


def experts_needed(shares: np.ndarray, mass: float) -> np.ndarray:
    """Return the length of the shortest prefix of the sorted shares that reaches ``mass``, int64 [tokens]."""
    running = np.cumsum(-np.sort(-shares, axis=1), axis=1)
    reached = running >= mass * (1 - 1e-12)
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, shares.shape[1])


class TopP:
    """Means over the tokens of one layer, gathered batch by batch."""

    def __init__(self, top_k: int, masses: Sequence[float] = MASSES) -> None:
        self.masses = tuple(masses)
        self._top_k = top_k
        self._needed = np.zeros(len(self.masses), dtype=np.int64)
        self._held = 0.0
        self._tokens = 0

    def add(self, logits: np.ndarray, score: str) -> None:
        """Count a batch of logits [tokens, E]."""
        shares = probabilities(logits, score)
        self._needed += [int(experts_needed(shares, mass).sum()) for mass in self.masses]
        self._held += float(np.partition(shares, -self._top_k, axis=1)[:, -self._top_k :].sum())
        self._tokens += len(shares)

    def document(self) -> dict[str, Any]:
        """Return mean experts per token for every p, and the mass that the fixed number holds."""
        tokens = max(1, self._tokens)
        return {
            "experts": {f"{mass:g}": float(n / tokens) for mass, n in zip(self.masses, self._needed, strict=True)},
            "held_by_top_k": self._held / tokens,
        }  # fmt: skip
