"""From replies to metrics: accuracy, length, caps, reflection, intelligence per token; paired with a baseline.

A metric is {"value", "low", "high", "n"}: 95 % interval (null where there is none) and how many
questions it is over. Lengths are in generated tokens, the end-of-sequence token included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgeon.evaluate.intervals import bootstrap, mcnemar, wilson

REFLECTION_WORDS = (
    "wait", "re-examine", "reexamine", "recap", "double-check", "double check", "let me check",
    "let me verify", "let me re-check", "check again", "on second thought",
)  # fmt: skip
"""Signs of reflection; merged models lose them together with length (R1-Distill-7B: in 99 % of replies)."""


@dataclass(frozen=True)
class Outcomes:
    """What came of all questions; arrays are [questions, samples].

    Attributes:
        keys: `Question.key`, in file order.
        domains: "" where there is none.
        correct: bool, or None when answers were not judged.
        tokens: generated tokens.
        finished: False where the reply hit the length limit.
        reflective: whether it holds a reflection word.
    """

    keys: tuple[str, ...]
    domains: tuple[str, ...]
    correct: np.ndarray | None
    tokens: np.ndarray
    finished: np.ndarray
    reflective: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def samples(self) -> int:
        return self.tokens.shape[1]

    def take(self, rows: Sequence[int]) -> Outcomes:
        """Return the outcomes of some questions."""
        chosen = list(rows)
        return replace(
            self, keys=tuple(self.keys[r] for r in chosen), domains=tuple(self.domains[r] for r in chosen),
            correct=None if self.correct is None else self.correct[chosen], tokens=self.tokens[chosen],
            finished=self.finished[chosen], reflective=self.reflective[chosen],
        )  # fmt: skip


def reflection_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the words or phrases, whatever their case, as whole words."""
    return re.compile(
        "|".join(rf"(?<!\w){re.escape(w.strip())}(?!\w)" for w in words if w.strip()), re.IGNORECASE
    )


def measure(outcomes: Outcomes, *, seed: int = 0, pass_at: Sequence[int] = ()) -> dict[str, Any]:
    """Return all metrics of some outcomes.

    Proportions over single replies get Wilson's interval; over several samples a question the
    bootstrap over questions, and Wilson's over the questions where all of them agree (a bootstrap
    would give an interval of length 0).
    """
    count = len(outcomes)
    shares = {"cap_rate": ~outcomes.finished, "reflection_rate": outcomes.reflective}
    if outcomes.correct is not None:
        shares = {"accuracy": outcomes.correct, **shares}
    means = {name: values.mean(axis=1, dtype=np.float64) for name, values in shares.items()}
    if outcomes.correct is not None:
        for k in pass_at:
            means[f"pass@{k}"] = pass_at_k(outcomes.correct.sum(axis=1), outcomes.samples, k)
    means["tokens_mean"] = outcomes.tokens.mean(axis=1, dtype=np.float64)
    intervals = bootstrap(count, lambda rows: _resampled(rows, means, outcomes.tokens), seed=seed)
    found = {name: _metric(float(values.mean()), intervals[name], count) for name, values in means.items()}
    for name, values in shares.items():
        share = found[name]["value"]
        if outcomes.samples == 1 or share in (0.0, 1.0):
            found[name] = _metric(share, wilson(float(values.mean(axis=1).sum()), count), count)
    for name in (f"pass@{k}" for k in pass_at if f"pass@{k}" in found):
        share = found[name]["value"]
        if share in (0.0, 1.0):
            found[name] = _metric(share, wilson(share * count, count), count)
    found["tokens_median"] = _metric(float(np.median(outcomes.tokens)), intervals["tokens_median"], count)
    if outcomes.correct is not None:
        per_token = per_thousand(means["accuracy"].mean(), means["tokens_mean"].mean())
        found["intelligence_per_token"] = _metric(per_token, intervals["intelligence_per_token"], count)
    return found


def _resampled(rows: np.ndarray, means: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    found = {name: values[rows].mean(axis=1) for name, values in means.items()}
    found["tokens_median"] = np.median(tokens[rows].reshape(len(rows), -1), axis=1)
    if "accuracy" in means:
        found["intelligence_per_token"] = 1000 * found["accuracy"] / found["tokens_mean"]
    return found


def per_thousand(accuracy: float, tokens: float) -> float:
    """Return accuracy per thousand generated tokens."""
    return float(1000 * accuracy / tokens) if tokens else math.nan


def _metric(value: float, interval: tuple[float, float] | None, count: int) -> dict[str, Any]:
    low, high = interval if interval is not None else (None, None)
    return {"value": value if math.isfinite(value) else None, "low": low, "high": high, "n": count}


def pass_at_k(hits: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Return per question the unbiased chance that one of ``k`` samples is right (Chen et al., 2107.03374, section 2.1).

    1 - C(samples - hits, k) / C(samples, k), from hits [questions].
    """
    table = [1.0 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.asarray(table)[hits]


def by_domain(outcomes: Outcomes, *, seed: int = 0, pass_at: Sequence[int] = ()) -> dict[str, Any]:
    """Return the metrics of each domain; empty when no question names one."""
    names = sorted(set(outcomes.domains))
    if not any(names):
        return {}
    rows = {name: [i for i, d in enumerate(outcomes.domains) if d == name] for name in names}
    return {
        name or "other": measure(outcomes.take(r), seed=seed, pass_at=pass_at) for name, r in rows.items()
    }


def paired(model: Outcomes, baseline: Outcomes, *, seed: int = 0) -> dict[str, Any]:
    """Compare two models on the same questions, by resampling questions for both at once.

    Returns:
        accuracy_difference (model - baseline), tokens_ratio and intelligence_per_token_ratio
        (model / baseline), each with its interval; with one sample a question also McNemar's test.
    """
    place = {key: i for i, key in enumerate(baseline.keys)}
    common = [(i, place[key]) for i, key in enumerate(model.keys) if key in place]
    ours = model.take([i for i, _ in common])
    theirs = baseline.take([j for _, j in common])
    tokens = ours.tokens.mean(axis=1, dtype=np.float64), theirs.tokens.mean(axis=1, dtype=np.float64)
    solved, solved_before = ours.correct, theirs.correct
    right = None
    if solved is not None and solved_before is not None:
        right = solved.mean(axis=1), solved_before.mean(axis=1)

    def statistics(rows: np.ndarray) -> dict[str, np.ndarray]:
        first, second = tokens[0][rows].mean(axis=1), tokens[1][rows].mean(axis=1)
        found = {"tokens_ratio": first / second}
        if right is not None:
            mine, other = right[0][rows].mean(axis=1), right[1][rows].mean(axis=1)
            found["accuracy_difference"] = mine - other
            with np.errstate(divide="ignore", invalid="ignore"):
                found["intelligence_per_token_ratio"] = mine / first / (other / second)
        return found

    values = {name: float(v[0]) for name, v in statistics(np.arange(len(common))[None, :]).items()}
    intervals = bootstrap(len(common), statistics, seed=seed)
    found: dict[str, Any] = {name: _metric(v, intervals[name], len(common)) for name, v in values.items()}
    if solved is not None and solved_before is not None and ours.samples == theirs.samples == 1:
        gained, lost = int((solved & ~solved_before).sum()), int((~solved & solved_before).sum())
        found["mcnemar"] = {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost)}
    return found
