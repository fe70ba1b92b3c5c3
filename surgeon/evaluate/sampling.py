"""Choosing the next token: greedy, or inverse-CDF sampling from counter-based uniform numbers.

The uniform number of a token is a function of (seed, question, sample number, position), so a
reply does not depend on what else is in the batch, on the batch size or on resumption, up to
rounding: where two candidates' probabilities meet within rounding, a differently shaped batch may
choose the other one. The cumulative sum runs in the order of token ids, not of probabilities, so
that two tokens swapping ranks by rounding does not change the choice.
"""

from __future__ import annotations

import numpy as np
import torch

from surgeon.seeds import stream_key, uniform

BLOCK = 512
_NUCLEUS = 1024


class Draws:
    """The uniform numbers of one reply, by position."""

    def __init__(self, seed: int, question: str, sample: int) -> None:
        self._key = stream_key(seed, sample, question)
        self._start = 0
        self._block = np.empty(0)

    def at(self, position: int) -> float:
        """Return the number in [0, 1) for token ``position`` of the reply."""
        if not self._start <= position < self._start + len(self._block):
            self._start = position - position % BLOCK
            self._block = uniform(self._key, self._start, self._start + BLOCK)
        return float(self._block[position - self._start])


def choose(
    logits: torch.Tensor, draws: torch.Tensor | None, temperature: float, top_p: float, top_k: int
) -> torch.Tensor:
    """Return one token id per row [rows].

    Args:
        logits: [rows, vocabulary], any float type.
        draws: [rows] float64 in [0, 1); None = greedy.
        temperature: above 0 with draws.
        top_p: keep the most probable tokens up to and including the one that reaches this mass; 1 = all.
        top_k: keep this many; 0, or the vocabulary's size and more, = all.
    """
    if draws is None:
        return logits.argmax(dim=-1)
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        values, ids = scaled.topk(top_k, dim=-1)
        shares = values.double().softmax(dim=-1)
    elif top_p < 1.0:
        shares, ids = _nucleus(scaled, top_p)
    else:
        return _pick(scaled.softmax(dim=-1), draws)
    if top_p < 1.0:
        before = shares.cumsum(dim=-1) - shares
        shares = shares.masked_fill(before >= top_p, 0.0)
    ids, order = ids.sort(dim=-1)
    picked = _pick(shares.gather(-1, order), draws)
    return ids.gather(-1, picked[:, None])[:, 0]


def _nucleus(scaled: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and ids in descending order, as many as hold ``top_p`` in every row."""
    total = scaled.double().logsumexp(dim=-1, keepdim=True)
    count = min(_NUCLEUS, scaled.shape[-1])
    while True:
        values, ids = scaled.topk(count, dim=-1)
        shares = (values.double() - total).exp()
        if count == scaled.shape[-1] or bool((shares.sum(dim=-1) >= top_p).all()):
            return shares, ids
        count = min(8 * count, scaled.shape[-1])


def _pick(shares: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return per row the first index whose cumulative share exceeds draw * total; never one of share 0."""
    cumulative = shares.double().cumsum(dim=-1)
    target = draws.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # draw * total may round up to total: then the last token with any probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)[:, 0]
    return torch.minimum(index, last)
