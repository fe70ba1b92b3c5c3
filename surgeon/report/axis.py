"""Axes of a plot: round ticks, linear or logarithmic, and the way from a value to a place."""

from __future__ import annotations

import math
from dataclasses import dataclass


def round_step(span: float, count: int) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that divides ``span`` into at most ``count`` steps."""
    if not span > 0:
        return 1.0
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round values inside [low, high], at most ``count`` steps apart."""
    step = round_step(high - low, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))  # 0.1 * 3 is 0.30000000000000004
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Return 1, 2, 5 times powers of ten inside [low, high]; only powers of ten where that is too many.

    Args:
        low: above 0.
    """
    found: list[float] = []
    for multiples in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [
            m * 10.0**p
            for p in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
            for m in multiples
            if low * (1 - 1e-9) <= m * 10.0**p <= high * (1 + 1e-9)
        ]
        if len(found) <= count:
            break
    return found


@dataclass(frozen=True)
class Axis:
    """From values [low, high] to places [start, end] in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value; 0 has no logarithm and lies at the beginning of such an axis."""
        if self.log and value < self.low:
            return self.start
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return round values on this axis."""
        if self.log:
            found = log_ticks(self.low, self.high, count)
            if len(found) >= 2:
                return found
        return [t for t in linear_ticks(self.low, self.high, count) if t > 0 or not self.log]


def tokens_axis(values: list[float], start: float, end: float, log: bool = False) -> Axis:
    """Return an axis for answer lengths: from 0 unless the lengths lie close together."""
    low, high = min(values), max(values)
    if log:
        positive = max(1e-3, min((v for v in values if v > 0), default=1.0))
        high = max(high, positive)
        spread = max(high / positive, 1.5) ** 0.08
        return Axis(positive / spread, high * spread, start, end, log=True)
    if high < 1e-3:  # no answer is so short; so near to 0 differences would vanish in rounding
        return Axis(0.0, 1.0, start, end)
    if low < 0.6 * high:
        return Axis(0.0, high * 1.04, start, end)
    pad = (high - low) * 0.12 or high * 0.05
    return Axis(low - pad, high + pad, start, end)


def accuracy_axis(values: list[float], start: float, end: float) -> Axis:
    """Return an axis for fractions that shows the values and a little around them, within [0, 1]."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or 0.05
    return Axis(max(0.0, low - pad), min(1.0, high + pad), start, end)
