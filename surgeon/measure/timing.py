"""Paired timing: what is compared runs in turns, in random order, and only ratios within a round count.

On a shared machine a time says what the machine did meanwhile; the ratio of two times taken right
after each other says what the programs do. So: rounds, each of which runs everything once in random
order; the median over rounds of the ratio to the baseline of the same round; a percentile bootstrap
interval of that median (Efron, Annals of Statistics 1979, 7:1); more rounds until the interval is
narrow enough, or time is up. What is not precise enough then is marked, never claimed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.errors import Interrupted
from surgeon.seeds import stream_key, uniform

WARM_UP = 2
LEAST, MOST = 9, 2000
"""Rounds: with fewer than 9 the ends of a 95 % interval of the median are the extremes themselves."""
RESAMPLES = 1000
Z = 1.959963984540054

Sample = Callable[[], float]
"""Runs the work once and returns its seconds; what it does not count is its own business."""


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % interval.

    Attributes:
        count: values it was taken over.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval, relative to the value."""
        return (self.high - self.low) / 2 / self.value

    def plain(self) -> dict[str, float | int]:
        """Return it as plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


@dataclass(frozen=True)
class Paired:
    """Times of several programs that ran in turns.

    Attributes:
        seconds: name -> one time a round; rounds of a name that was settled early are fewer.
        ratios: name -> median of (seconds of the name / seconds of the baseline) within rounds.
        precision: half-width asked for.
    """

    seconds: Mapping[str, np.ndarray]
    ratios: Mapping[str, Estimate]
    precision: float

    def measurable(self, name: str) -> bool:
        """Say whether a ratio is as precise as asked for."""
        return self.ratios[name].half_width <= self.precision


def median(values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the median of values with its 95 % bootstrap interval (percentiles); equal seeds, equal intervals.

    With a single value there is no interval: it is (0, inf).
    """
    found = np.asarray(values, dtype=np.float64)
    middle = float(np.median(found))
    if len(found) < 2:
        return Estimate(middle, 0.0, float("inf"), len(found))
    count = len(found)
    draws = uniform(stream_key(seed, 0, "rounds"), 0, resamples * count)
    chosen = np.minimum((draws * count).astype(np.int64), count - 1).reshape(resamples, count)
    low, high = np.percentile(np.median(found[chosen], axis=1), [2.5, 97.5])
    return Estimate(middle, float(low), float(high), count)


def paired(
    samples: Mapping[str, Sample],
    baseline: str,
    *,
    precision: float,
    time_limit: float,
    repeat: int | None = None,
    seed: int = 0,
    warm_up: int = WARM_UP,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Paired:
    """Time programs against a baseline, in rounds, until every ratio is precise enough.

    Args:
        samples: what runs; it must hold the baseline.
        precision: half-width of the 95 % interval of a ratio at which it is settled; the settled rest.
        time_limit: seconds after which no new round begins (there are `LEAST` rounds, whatever it is).
        repeat: exactly so many rounds of everything instead.
        now: the clock of the time limit.

    Raises:
        Interrupted: E130 when ``stop`` is set.
    """
    order = random.Random(seed)
    others = [name for name in samples if name != baseline]
    for _ in range(warm_up):
        for name in samples:
            _go_on(stop)
            samples[name]()
    began = now()
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    rows: dict[str, list[float]] = {name: [] for name in others}
    running = list(others)
    rounds = 0
    while True:
        turn = [baseline, *running]
        order.shuffle(turn)
        taken = {}
        for name in turn:
            _go_on(stop)
            taken[name] = samples[name]()
            seconds[name].append(taken[name])
        for name in running:
            rows[name].append(taken[name] / taken[baseline])
        rounds += 1
        if progress is not None:
            progress(rounds, repeat or 1)  # how many there will be is not known
        if repeat is not None:
            if rounds >= repeat:
                break
            continue
        if rounds < LEAST:
            continue
        # Intervals cost more than a short round does: looked at after every third.
        if rounds % 3 == 0:
            running = [name for name in running if median(rows[name], seed=seed).half_width > precision]
            settled = not running and (others or median(seconds[baseline], seed=seed).half_width <= precision)
            if settled:
                break
        if now() - began >= time_limit or rounds >= MOST:
            break
    return Paired(
        {name: np.asarray(values) for name, values in seconds.items()},
        {name: median(values, seed=seed) for name, values in rows.items()},
        precision,
    )


def _go_on(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("E130", "interrupted while measuring")
