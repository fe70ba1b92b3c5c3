"""What a search has tried: true losses by assignment, never computed twice, within a number of evaluations and a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

Levels = tuple[int, ...]
"""One level number for each module."""

Evaluate = Callable[[list[list[int]]], Sequence[float]]
"""True losses of assignments, in their order; lower is better, and what is not a number counts as infinite."""


@dataclass(frozen=True)
class Trial:
    """One assignment whose true loss was computed.

    Attributes:
        levels: the level of each module.
        loss: what `Evaluate` said.
        source: where it came from: "floor", "plain", "random", "fitted" or "local".
    """

    levels: Levels
    loss: float
    source: str


@dataclass(frozen=True)
class Found:
    """The best assignment of a search.

    Attributes:
        levels: the level of each module.
        loss: its true loss.
        source: what proposed it, as in `Trial`.
        coefficients: module weights [M] under which the dynamic program gives it, None for one that was given.
            With other times the program can be solved again for the same weights.
        history: every assignment whose loss was computed, in order.
        stopped: "converged", "evaluations" or "deadline". After a deadline the result depends on the machine's speed.
    """

    levels: Levels
    loss: float
    source: str
    coefficients: np.ndarray | None
    history: tuple[Trial, ...]
    stopped: str

    @property
    def evaluations(self) -> int:
        """How many true losses were computed."""
        return len(self.history)


class Clock:
    """A deadline in seconds from its making, on the monotonic clock; None never ends."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self._seconds = math.inf if seconds is None else seconds
        self._longest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self._now() - self._start

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Take note of how long one batch takes."""
        before = self._now()
        yield
        self._longest = max(self._longest, self._now() - before)

    @property
    def over(self) -> bool:
        """Whether another batch, as long as the longest so far, would pass the deadline."""
        return self.elapsed + self._longest > self._seconds


@dataclass
class Trials:
    """Evaluates assignments in batches, each one once, and remembers the best.

    Attributes:
        evaluate: the true loss.
        most: how many may be evaluated.
        clock: the deadline.
        batch: how many are handed over at once.
    """

    evaluate: Evaluate
    most: int
    clock: Clock
    batch: int
    losses: dict[Levels, float] = field(default_factory=dict)
    history: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    stopped: str = ""

    @property
    def left(self) -> int:
        """How many evaluations are left; 0 once the search has been stopped."""
        return 0 if self.stopped else self.most - len(self.history)

    def run(self, proposals: Sequence[tuple[Levels, str]], *, always: bool = False) -> None:
        """Evaluate what is new among proposals (levels, source).

        Args:
            always: regardless of limits, for what the result is compared with.
        """
        fresh = {levels: source for levels, source in reversed(proposals) if levels not in self.losses}
        order = [levels for levels, _ in proposals]
        queue = sorted(fresh, key=order.index)
        while queue:
            if not always and self.clock.over:
                self.stopped = "deadline"
                return
            room = self.batch if always else min(self.batch, self.left)
            if room <= 0:
                self.stopped = self.stopped or "evaluations"
                return
            part, queue = queue[:room], queue[room:]
            with self.clock.batch():
                losses = self.evaluate([list(levels) for levels in part])
            if len(losses) != len(part):
                raise ValueError(f"{len(part)} assignments were given and {len(losses)} losses came back")
            for levels, loss in zip(part, losses, strict=True):
                value = math.inf if math.isnan(loss) else float(loss)
                trial = Trial(levels, value, fresh[levels])
                self.losses[levels] = value
                self.history.append(trial)
                if self.best is None or value < self.best.loss:
                    self.best = trial

    def found(self, coefficients: np.ndarray | None) -> Found:
        """Return the result."""
        assert self.best is not None  # the plain solution is always evaluated
        return Found(
            self.best.levels, self.best.loss, self.best.source, coefficients, tuple(self.history),
            self.stopped or "converged",
        )  # fmt: skip
