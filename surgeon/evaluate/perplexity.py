"""Perplexity, one layer in memory at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError
from surgeon.evaluate.intervals import bootstrap
from surgeon.evaluate.texts import Passage

GROUP_TOKENS = 8192
"""Tokens whose hidden states meet the head together: it is read once for each group."""


class Unwatched:
    """An observer that looks at nothing: only the last hidden states are wanted."""

    def wants(self, module: str) -> bool:
        return False

    def observe(
        self, module: str, inputs: torch.Tensor, outputs: torch.Tensor | None, sample: int | None
    ) -> None:
        raise AssertionError(f"nothing is watched, and {module} was shown")


def walked(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Walk:
    """Return a finished walk over all passages, whose `hidden` gives the last hidden states."""
    walk = Walk(checkpoint, [p.ids for p in passages], settings)
    walk.run(Unwatched(), progress=progress, stop=stop)
    return walk


def predicting(walk: Walk, passages: Sequence[Passage]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (passage, hidden states [counted, H]) of the positions that predict a counted token."""
    for number, hidden in walk.hidden():
        passage = passages[number]
        yield number, hidden[passage.first - 1 : -1]


def token_losses(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> list[np.ndarray]:
    """Return -log p of every counted token, float64, one array [counted] per passage."""
    found: list[np.ndarray] = [np.empty(0)] * len(passages)
    with walked(checkpoint, passages, settings, progress=progress, stop=stop) as walk:
        head = Head(checkpoint, settings, skeleton=walk.skeleton)
        for group in grouped(predicting(walk, passages)):
            hidden = torch.cat([h for _, h in group])
            targets = torch.cat([torch.from_numpy(passages[n].ids[passages[n].first :]) for n, _ in group])
            losses = head.losses(hidden, targets).double().cpu().numpy()
            place = 0
            for number, part in group:
                found[number] = losses[place : place + len(part)]
                place += len(part)
    return found


def grouped(parts: Iterator[tuple[int, torch.Tensor]]) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Gather passages until they have `GROUP_TOKENS` tokens."""
    group: list[tuple[int, torch.Tensor]] = []
    count = 0
    for number, hidden in parts:
        group.append((number, hidden))
        count += len(hidden)
        if count >= GROUP_TOKENS:
            yield group
            group, count = [], 0
    if group:
        yield group


def perplexity(losses: Sequence[np.ndarray], *, seed: int = 0) -> dict[str, Any]:
    """Return exp(mean loss over tokens), with the interval over resampled passages.

    Raises:
        InputError: E394 a loss is not a number.
    """
    sums = np.array([float(part.sum()) for part in losses])
    counts = np.array([len(part) for part in losses], dtype=np.float64)
    if not np.isfinite(sums).all():
        raise InputError("E394", f"the model gives non-finite losses in {int((~np.isfinite(sums)).sum())} of {len(sums)} passages",
                         help="the weights or the type are damaged: surgeon verify MODEL, or --dtype float32")  # fmt: skip
    mean = float(sums.sum() / counts.sum())
    interval = bootstrap(
        len(sums), lambda rows: {"mean": sums[rows].sum(axis=1) / counts[rows].sum(axis=1)}, seed=seed
    )
    low, high = interval["mean"] or (None, None)
    return {
        "value": _exp(mean), "low": None if low is None else _exp(low), "high": None if high is None else _exp(high),
        "n": int(counts.sum()), "loss": mean,
    }  # fmt: skip


def _exp(value: float) -> float | None:
    """A model far enough off has a loss whose exponential is no number any more."""
    return math.exp(value) if value < 700 else None
