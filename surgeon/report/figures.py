"""Figures as readers see them: percent, tokens, changes with their intervals, and what these allow to say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

DASH = "–"
"""Stands where nothing was measured."""

Verdict = Literal["higher", "lower", "not distinguishable", ""]


@dataclass(frozen=True)
class Measure:
    """A measured value with the ends of its 95 % interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def read(cls, entry: Any) -> Measure | None:
        """Return the measure of a result's entry: a number, or an object with value, low, high, n.

        None where nothing was measured, or where what was measured has no finite value.
        """
        if entry is None or (isinstance(entry, Mapping) and entry.get("value") is None):
            return None
        if not isinstance(entry, Mapping):
            return cls(float(entry))
        low, high, n = entry.get("low"), entry.get("high"), entry.get("n")
        if low is None or high is None:  # one end alone is no interval
            low = high = None
        return cls(float(entry["value"]), low, high, None if n is None else int(n))

    def verdict(self, neutral: float) -> Verdict:
        """Say on which side of ``neutral`` the interval lies; "" where there is no interval to tell."""
        if self.low is None or self.high is None:
            return ""
        if self.low <= neutral <= self.high:
            return "not distinguishable"
        return "higher" if self.low > neutral else "lower"


@dataclass(frozen=True)
class Metric:
    """How one metric is called and written."""

    key: str
    heading: str
    kind: Literal["percent", "number"]
    meaning: str
    interval: bool = True


METRICS = (
    Metric("accuracy", "Accuracy", "percent", "share of questions answered right"),
    Metric("tokens_mean", "Mean tokens", "number", "mean tokens per answer, the thinking included"),
    Metric("tokens_median", "Median tokens", "number", "median tokens per answer", False),
    Metric("intelligence_per_token", "Accuracy per 1,000 tokens", "number",
           "accuracy divided by thousands of mean tokens"),
    Metric("cap_rate", "Cap rate", "percent", "share of answers cut off at the token limit", False),
    Metric("reflection_rate", "Reflection rate", "percent",
           "share of answers that reconsider (wait, let me check, ...)", False),
    Metric("perplexity", "Perplexity", "number", "perplexity on the given text; lower is better"),
    Metric("kl", "KL divergence", "number", "mean KL divergence per token from the reference; lower is closer"),
    Metric("top1_agreement", "Top-1 agreement", "percent", "share of tokens where the reference has the same first choice"),
)  # fmt: skip


def metric(key: str) -> Metric:
    """Return how to show a metric; one this version does not know is shown as it is called."""
    if key.startswith("pass@"):
        return Metric(key, key, "percent", "chance that one of so many samples is right")
    if key.startswith("task:"):
        return Metric(key, key.removeprefix("task:"), "number", "")
    return next((m for m in METRICS if m.key == key), Metric(key, key.replace("_", " "), "number", ""))


def decimals(kind: str, values: Iterable[float], n: int | None = None) -> int:
    """Return the decimals of a column: about as many digits as its largest figure needs.

    Args:
        n: questions behind a percentage; 0.1 percentage points are finer than 2,000 answers can tell.
    """
    if kind == "percent":
        return 2 if n is not None and n > 5000 else 1
    largest = max((abs(v) for v in values), default=0.0)
    if largest == 0 or largest >= 100:
        return 0
    return max(0, 2 - math.floor(math.log10(largest)))


def written(value: float, kind: str, places: int) -> str:
    """Return a figure: 98.0%, 1,242, 0.0123."""
    if kind == "percent":
        return minus(f"{value * 100:.{places}f}%")
    return minus(f"{value:,.{places}f}")


def interval(low: float, high: float, kind: str, places: int) -> str:
    """Return an interval without repeating the unit: 95.0–99.2."""
    scale = 100 if kind == "percent" else 1
    ends = [f"{v * scale:,.{places}f}" for v in (low, high)]
    return minus(f"{ends[0]} to {ends[1]}" if min(low, high) < 0 else f"{ends[0]}–{ends[1]}")


def in_points(value: float) -> str:
    """Return a difference of accuracies in percentage points: −9.0."""
    return _signed(value * 100, 1)


def as_change(ratio: float) -> str:
    """Return a ratio as a change: 0.24 is −76%."""
    percent = ratio * 100 - 100
    return f"{_signed(percent, 0 if abs(percent) >= 9.95 else 1)}%"


def as_p_value(p: float) -> str:
    """Return a p value; below a thousandth its digits say nothing."""
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def _signed(value: float, places: int) -> str:
    rounded = round(value, places)
    return minus(f"{rounded:+.{places}f}") if rounded else f"{0:.{places}f}"


def minus(text: str) -> str:
    """Set the minus sign, which is as wide as a digit's plus."""
    return text.replace("-", "−")
