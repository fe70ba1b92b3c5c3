"""Criteria: which experts of a layer matter most. One file per criterion; the file name is its name.

A file holds one ``CRITERION``. All of them read "higher stays" and never return NaN: an expert that no token was
routed to scores 0 under every criterion of routing.

    get("reap").score(statistics.total(layer))     # float64 [experts]
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from surgeon.errors import InputError, UsageError, close_matches
from surgeon.experts.statistics import LayerStatistics, RoutingStatistics

RARE = 8
"""Tokens below which a mean over an expert's tokens says little (see `shrunk`)."""


Mix = Literal["auto", "mean", "max", "pool"]
"""How several domains become one score."""


@dataclass(frozen=True)
class Criterion:
    """One way to score the experts of a layer.

    Attributes:
        name: of its file.
        title: one line for people.
        needs: "routing": ``score(statistics: LayerStatistics)``; "weights": ``score(checkpoint, experts, layer)``;
            "nothing": ``score(layer, experts, seed)``. All return float64 [experts].
        source: where it comes from.
        score: the function.
        averaged: whether it is a mean over an expert's tokens, which few tokens make noisy.
    """

    name: str
    title: str
    needs: Literal["routing", "weights", "nothing"]
    source: str
    score: Callable[..., np.ndarray]
    averaged: bool = False


@cache
def known() -> tuple[str, ...]:
    """Return the names of all criteria, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Criterion:
    """Return a criterion by its name; hyphens and underscores are the same.

    Raises:
        UsageError: E244 there is none of this name.
    """
    wanted = name.replace("-", "_")
    if wanted not in known():
        choices = [one.replace("_", "-") for one in known()]
        raise UsageError("E244", f"there is no criterion {name!r}",
                         help=close_matches(name, choices) or "there are: " + ", ".join(choices))  # fmt: skip
    return importlib.import_module(f"{__name__}.{wanted}").CRITERION


def of_routing(name: str) -> Criterion:
    """Return a criterion by which domains can be compared: one that looks at what a pass over text shows.

    Raises:
        UsageError: E244 there is none of this name; E246 it does not look at text.
    """
    found = get(name)
    if found.needs != "routing":
        raise UsageError("E246", f"domains cannot be compared by {name}, which does not look at text",
                         help="use easy-ep, reap or another criterion of routing")  # fmt: skip
    return found


def per_token(sums: np.ndarray, statistics: LayerStatistics) -> np.ndarray:
    """Return sums over each expert's tokens divided by their number, float64 [E]; 0 for an expert without any."""
    return sums / np.maximum(statistics.tokens, 1)


def shrunk(scores: np.ndarray, tokens: np.ndarray, prior: float = RARE) -> np.ndarray:
    """Return scores pulled towards 0 where few tokens stand behind them: S n / (n + prior), float64 [E].

    Args:
        scores: float64 [E], of a criterion that is a mean.
        tokens: int64 [E], n.
        prior: tokens that weigh as much as the measurement.
    """
    return scores * tokens / (tokens + prior)


def mixed(
    statistics: RoutingStatistics,
    criterion: Criterion,
    *,
    layer: int,
    how: Mix = "auto",
    weights: Mapping[str, float] | None = None,
    shrink: bool = False,
) -> np.ndarray:
    """Return the scores of one layer over several domains, float64 [E].

    By "mean" each domain's scores are divided by their sum, so that none counts for more because its text is longer,
    and averaged; by "max" the largest is taken, where no domain may suffer (EASY-EP, arXiv 2504.06792, section 3.3). By
    "pool" all text counts as one, as REAP calibrates. "auto" pools criteria that are means over an expert's tokens (they do
    not grow with the text, and a domain in which an expert has few tokens would count as much as one in which it has many),
    and takes the mean of the others. With one domain and no weights the scores are returned as they are.

    Args:
        statistics: of all layers and domains.
        criterion: one that needs routing.
        layer: the layer's number.
        how: "auto", "mean", "max" or "pool"; weights need one of the first three, and then "auto" is "mean".
        weights: domain -> its weight, for all domains; equal without.
        shrink: apply `shrunk` within each domain, to a criterion that is a mean.

    Raises:
        InputError: E433 a domain has no score at all in this layer.
        UsageError: E244 ``how`` or the weights are wrong.
    """
    if criterion.needs != "routing":
        raise ValueError(f"{criterion.name} does not look at text, so there are no domains to mix")
    if how not in get_args(Mix):
        raise UsageError(
            "E244", f"domains cannot be mixed by {how!r}", help="one of: " + ", ".join(get_args(Mix))
        )
    if how == "pool" and weights is not None:
        raise UsageError("E244", "pooled text has no weights by domain", help='mix by "mean" or "max"')
    if how == "pool" or (how == "auto" and weights is None and criterion.averaged):
        whole = statistics.total(layer)
        found = np.asarray(criterion.score(whole), np.float64)
        return shrunk(found, whole.tokens) if shrink and criterion.averaged else found
    shares = _shares(statistics, weights)
    scores = {}
    for domain, table in statistics.domains.items():
        found = np.asarray(criterion.score(table[layer]), np.float64)
        scores[domain] = shrunk(found, table[layer].tokens) if shrink and criterion.averaged else found
    if len(scores) == 1:
        return next(iter(scores.values()))
    parts = [shares[domain] * _normalised(one, domain, layer) for domain, one in scores.items()]
    return np.max(parts, axis=0) if how == "max" else np.sum(parts, axis=0)


def _normalised(scores: np.ndarray, domain: str, layer: int) -> np.ndarray:
    total = float(scores.sum())
    if not np.isfinite(total) or total <= 0:
        raise InputError(
            "E433", f"the text of domain {domain!r} gives no score to any expert of layer {layer}",
            help="give it more text, or leave the domain out",
        )  # fmt: skip
    return scores / total


def _shares(statistics: RoutingStatistics, weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return every domain's share, together 1."""
    names = list(statistics.domains)
    if weights is None:
        return dict.fromkeys(names, 1 / len(names))
    wrong = sorted(set(weights) ^ set(names))
    if wrong:
        raise UsageError("E244", f"weights are given for {sorted(weights)}, the domains are {names}",
                         help="give one weight for each domain")  # fmt: skip
    total = sum(weights.values())
    if not np.isfinite(total) or total <= 0 or min(weights.values()) < 0:
        raise UsageError("E244", f"weights of domains must be numbers from 0 up, not {dict(weights)}",
                         help="for instance 2 and 1: the first counts twice")  # fmt: skip
    return {name: weights[name] / total for name in names}
