"""How far to steer, and which way: gamma from a budget of divergence, the sign from stored responses.

For small gamma KL(p_gamma || p_0) = a gamma^2 + O(gamma^3), a half the Fisher information along the shift. Two
measurements give a; the gamma for a budget follows, is measured itself and corrected once. Which sign
shortens is not taken from how vectors were stored (the published code of ASC contradicts itself): the
responses decide, by which sign makes the short ones more probable against the long ones.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.answers import answer_places
from surgeon.calibrate.head import Head
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.edit.examples import Example
from surgeon.errors import InputError, UsageError

LOGIT_BYTES = 64 << 20
"""Bytes of the logits of one model that are compared at once."""

Steered = Callable[[float], Checkpoint]
"""The model steered by gamma."""


class _Nothing:
    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was asked for")


@dataclass(frozen=True)
class Fit:
    """gamma for a budget.

    Attributes:
        gamma: the strength.
        coefficient: a of KL = a gamma^2.
        measured: (gamma, KL in nats a token), in the order they were measured; the last is the chosen gamma's.
    """

    gamma: float
    coefficient: float
    measured: tuple[tuple[float, float], ...]

    def record(self) -> dict[str, Any]:
        return {
            "gamma": self.gamma,
            "coefficient": self.coefficient,
            "measured": [list(point) for point in self.measured],
        }


def states(checkpoint: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, stop: threading.Event | None = None) -> list[Tensor]:  # fmt: skip
    """Return the last hidden states [tokens, hidden] of every sample."""
    with Walk(checkpoint, samples, replace(settings, spill=None)) as walk:
        walk.run(_Nothing(), stop=stop)
        return [hidden.clone() for _, hidden in walk.hidden()]


def divergence(steered: Head, plain: Head, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the mean over tokens of KL(steered || plain), in nats.

    Args:
        steered, plain: the heads.
        ours, theirs: last hidden states of the steered model and of the plain one, by sample.
    """
    total, count = 0.0, 0
    rows = max(1, LOGIT_BYTES // (4 * plain.vocabulary))
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            for first in range(0, len(mine), rows):
                p = steered.logits(mine[first : first + rows]).double().log_softmax(1)
                q = plain.logits(other[first : first + rows]).double().log_softmax(1)
                total += float((p.exp() * (p - q)).sum())
            count += len(mine)
    return total / count


def perplexity(head: Head, hidden: Sequence[Tensor], samples: Sequence[np.ndarray]) -> float:
    """Return exp of the mean -log p(next token) over all tokens of the samples."""
    with torch.no_grad():
        losses = [
            head.losses(state[:-1], torch.as_tensor(ids)[1:]).double()
            for state, ids in zip(hidden, samples, strict=True)
        ]
    return float(torch.cat(losses).mean().exp())


def fit_gamma(
    checkpoint: Checkpoint,
    steered: Steered,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    budget: float,
    start: float,
    sign: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
) -> Fit:
    """Return the gamma whose mean KL on the samples is ``budget``.

    Args:
        checkpoint: the plain model.
        steered: gamma -> the steered model.
        samples: token ids.
        budget: nats a token.
        start: a small gamma, where the first measurement is made; the second at twice that.
        sign: of gamma.

    Raises:
        UsageError: E299 the budget is not positive. InputError: E384 the shift changes nothing.
    """
    if not 0 < budget < math.inf:
        raise UsageError(
            "E299", f"the divergence budget is {budget:g}", help="nats a token, above 0; 0.05 is usual"
        )
    plain = states(checkpoint, samples, settings, stop)
    head = Head(checkpoint, settings)
    measured: list[tuple[float, float]] = []

    def measure(gamma: float) -> float:
        view = steered(sign * gamma)
        found = divergence(Head(view, settings), head, states(view, samples, settings, stop), plain)
        measured.append((sign * gamma, found))
        if progress is not None:
            progress(len(measured), 4)
        return found

    first, second = measure(start), measure(2 * start)
    # least squares of KL = a g^2 over both points: the larger one counts more, being measured better
    a = (first * start**2 + second * (2 * start) ** 2) / (start**4 + (2 * start) ** 4)
    if not a > 0:
        raise InputError(
            "E384", "steering along this direction changes no probability", help="choose another layer"
        )
    gamma = math.sqrt(budget / a)
    found = measure(gamma)
    if not 0.95 <= found / budget <= 1.05:  # beyond the quadratic range: one secant step in the logarithm
        slope = (
            math.log(found / second) / math.log(gamma / (2 * start))
            if gamma != 2 * start and found > 0
            else 2.0
        )
        gamma *= (budget / found) ** (1 / min(4.0, max(1.0, slope)))
        measure(gamma)
    return Fit(sign * gamma, a, tuple(measured))


def margin(checkpoint: Checkpoint, long: Sequence[Example], short: Sequence[Example], settings: Settings, stop: threading.Event | None = None) -> float:  # fmt: skip
    """Return mean log p(token) of short responses minus that of long ones; every response counts once."""
    examples = [*long, *short]
    head = Head(checkpoint, settings)
    found = []
    with torch.no_grad():
        hidden = states(checkpoint, [example.ids for example in examples], settings, stop)
        for example, state in zip(examples, hidden, strict=True):
            place = answer_places(example)
            targets = torch.as_tensor(example.ids[place.start + 1 : place.stop + 1])
            found.append(-float(head.losses(state[place], targets).double().mean()))
    return float(np.mean(found[len(long) :]) - np.mean(found[: len(long)]))


def shortening_sign(
    steered: Steered,
    gamma: float,
    long: Sequence[Example],
    short: Sequence[Example],
    settings: Settings,
    *,
    examples: int = 8,
    stop: threading.Event | None = None,
) -> tuple[float, dict[str, float]]:
    """Return 1.0 or -1.0, the sign of gamma that favours short responses, and both margins.

    Args:
        steered: gamma -> the steered model.
        gamma: a small strength, above 0.
        long, short: responses; the first ``examples`` of each are scored.
    """
    pair = [
        margin(steered(sign * gamma), long[:examples], short[:examples], settings, stop)
        for sign in (1.0, -1.0)
    ]
    return (1.0 if pair[0] >= pair[1] else -1.0), {"plus": pair[0], "minus": pair[1]}
