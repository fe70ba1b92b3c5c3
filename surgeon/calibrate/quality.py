"""Quality of a pruned model against its source on held-out text, both run layer by layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.conditions import threads
from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint

PLACES = 128
"""Positions whose logits are held at once."""


class Nothing:
    """An observer that looks at nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was asked for")


def last_states(
    checkpoint: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, *, stop: threading.Event | None = None
) -> list[Tensor]:  # fmt: skip
    """Return the states behind the final norm [tokens, hidden] of every sample, on the CPU."""
    with Walk(checkpoint, samples, replace(settings, spill=None)) as walk:
        walk.run(Nothing(), stop=stop)
        return [states.clone() for _, states in walk.hidden()]


def compare(
    source: Checkpoint,
    pruned: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    decoder: bool,
    reference: Sequence[Tensor] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Return perplexity of both, KL(source || pruned) and top-1 agreement; of encoders the cosine of mean states.

    Args:
        source, pruned: two checkpoints the library's classes can run: the pruned model or its masked equal.
        samples: token ids; every position that predicts a next token counts.
        decoder: whether next tokens are predicted.
        reference: `last_states` of the source, when known.
        stop: set it to stop.

    Returns:
        {"tokens", "perplexity": [source, pruned], "kl" in nats, "top1"} or {"tokens", "cosine", "nmse"}.
    """
    ours = list(reference) if reference is not None else last_states(source, samples, settings, stop=stop)
    theirs = last_states(pruned, samples, settings, stop=stop)
    if not decoder:
        return _states(ours, theirs)
    with threads(settings.threads), torch.no_grad():
        first, second = Head(source, settings).logits, Head(pruned, settings).logits
        return _tokens(samples, ours, theirs, first, second)


def compare_whole(
    source: Checkpoint, model: Any, samples: Sequence[np.ndarray], settings: Settings, reference: Sequence[Tensor]
) -> dict[str, Any]:  # fmt: skip
    """Return what `compare` does for a decoder that is loaded as a whole: one whose layers differ."""
    with threads(settings.threads), torch.no_grad():
        theirs = [model(torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]).logits[0] for ids in samples]
        return _tokens(samples, reference, theirs, Head(source, settings).logits, lambda logits: logits)


Logits = Callable[[Tensor], Tensor]


def _tokens(
    samples: Sequence[np.ndarray], ours: Sequence[Tensor], theirs: Sequence[Tensor], first: Logits, second: Logits
) -> dict[str, Any]:  # fmt: skip
    totals = np.zeros(4)
    for ids, one, other in zip(samples, ours, theirs, strict=True):
        targets = torch.from_numpy(np.asarray(ids[1:], dtype=np.int64))
        for start in range(0, len(targets), PLACES):
            place = slice(start, min(start + PLACES, len(targets)))
            totals += _compared(first(one[place]), second(other[place]), targets[place])
    count = sum(len(ids) - 1 for ids in samples)
    before, after, divergence, agreed = (totals / max(count, 1)).tolist()
    return {
        "tokens": count, "perplexity": [math.exp(min(before, 700)), math.exp(min(after, 700))],
        "kl": max(0.0, divergence), "top1": agreed,
    }  # fmt: skip


def _compared(one: Tensor, other: Tensor, targets: Tensor) -> np.ndarray:
    """Return sums over positions of both losses, the divergence and agreements."""
    p = torch.log_softmax(one.double(), dim=-1).cpu()
    q = torch.log_softmax(other.double(), dim=-1).cpu()
    own = targets[:, None]
    return np.array(
        [
            float(-p.gather(1, own).sum()),
            float(-q.gather(1, own).sum()),
            float((p.exp() * (p - q)).sum()),
            float((p.argmax(-1) == q.argmax(-1)).sum()),
        ]
    )


def _states(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Any]:
    cosines = []
    error = total = 0.0
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.double(), other.double()
        cosines.append(float(torch.nn.functional.cosine_similarity(a.mean(0), b.mean(0), dim=0)))
        error += float((a - b).square().sum())
        total += float(a.square().sum())
    return {
        "tokens": sum(len(one) for one in ours),
        "cosine": float(np.mean(cosines)),
        "nmse": error / max(total, 1e-300),
    }
