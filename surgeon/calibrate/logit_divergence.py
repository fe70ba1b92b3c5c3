"""How far several models' predictions lie from one model's, when all share that model's output embedding.

    KL(p || q) = sum_v p_v (a_v - b_v) - lse(a) + lse(b)        a: reference logits, b: the other's, p = softmax(a)

The head is read once, block by block over the vocabulary, for all models; the sums are kept running,
so neither the head nor the logits are ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.calibrate.head import Head

PLACES = 1024
"""Positions whose logits of one block are held at once."""

SHARE = 4
"""A block is this much smaller than the head's own: logits of two models, their shares and products are held."""


@torch.no_grad()
def divergences(head: Head, reference: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return KL(reference || other) in nats at every position, float64 [others, n], on the CPU.

    Positions may be given in several calls: with a multiple of `PLACES` in each but the last the bits are the same.

    Args:
        head: the output embedding of all of them.
        reference: last hidden states [n, hidden].
        others: those of the other models at the same positions.
    """
    count = len(reference)
    dense = head.entering(reference)
    entering = [head.entering(other) for other in others]
    places = [slice(start, start + PLACES) for start in range(0, count, PLACES)]
    device = dense.device
    own = [_LogSum(len(dense[place]), device) for place in places]
    sums = [[_LogSum(len(dense[place]), device) for place in places] for _ in others]
    moved = torch.zeros(len(others), count, dtype=torch.float64, device=device)
    for _, _, weight, bias in head.blocks(max(1, head.rows_per_block(PLACES) // SHARE)):
        for number, place in enumerate(places):
            a = head.block_logits(dense[place], weight, bias)
            shares, scale = own[number].add(a)
            for other, states in enumerate(entering):
                b = head.block_logits(states[place], weight, bias)
                sums[other][number].add(b)
                moved[other, place] = moved[other, place] * scale + (shares * (a - b)).sum(1)
    found = torch.empty_like(moved)
    for other, running in enumerate(sums):
        for number, place in enumerate(places):
            mean = moved[other, place] / own[number].mass
            found[other, place] = mean - own[number].value() + running[number].value()
    return found.cpu()


class _LogSum:
    """log sum exp over the vocabulary seen so far at each position; shares in float32, sums in float64."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._peak = torch.full((count,), -torch.inf, device=device)
        self.mass = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block's logits [n, rows]; return exp(logits - peak) and what earlier sums are to be multiplied by."""
        peak = torch.maximum(self._peak, logits.amax(1))
        scale = torch.exp((self._peak - peak).double())
        shares = torch.exp(logits - peak[:, None])
        self.mass = self.mass * scale + shares.sum(1, dtype=torch.float64)
        self._peak = peak
        return shares, scale

    def value(self) -> Tensor:
        return self._peak.double() + self.mass.log()
