"""Do two domains need the same experts, and do the demonstrations at hand tell which those are?

Choices are compared by the share of experts they have in common (EASY-EP, arXiv 2504.06792, section on
localisation): |top-M of A and top-M of B| / M, for which chance gives M / E.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.seeds import stream_key, uniform

DEMONSTRATIONS = (5, 10, 25)
DRAWS = 20
"""Random sets of demonstrations of each size."""
STABLE = 0.8
"""Below this agreement a choice owes much to the demonstrations that happened to be drawn."""
NEAR_CHANCE = 0.25
"""Overlap is called close to chance when it is at most this far on the way from M/E to 1."""


def top(scores: np.ndarray, kept: int, groups: int = 1) -> np.ndarray:
    """Return the experts of the highest scores, ascending; of equal scores the lower numbers.

    Args:
        scores: [E].
        kept: how many, M.
        groups: routing groups, of which each keeps equally many.
    """
    grouped = np.asarray(scores, dtype=np.float64).reshape(groups, -1)
    chosen = np.argsort(-grouped, axis=1, kind="stable")[:, : kept // groups]
    return np.sort((chosen + grouped.shape[1] * np.arange(groups)[:, None]).reshape(-1))


def overlap(first: np.ndarray, second: np.ndarray, kept: int, groups: int = 1) -> float:
    """Return |top-M of one and top-M of the other| / M for two score vectors [E]."""
    return len(np.intersect1d(top(first, kept, groups), top(second, kept, groups), assume_unique=True)) / kept


def bands(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the first, middle and last third of the layers (the middle gets what does not divide); one "all" below three."""
    third = len(layers) // 3
    if not third:
        return {"all": tuple(layers)}
    return {
        "first": tuple(layers[:third]),
        "middle": tuple(layers[third : len(layers) - third]),
        "last": tuple(layers[len(layers) - third :]),
    }


@dataclass(frozen=True)
class DomainOverlap:
    """How far two domains choose the same experts.

    Attributes:
        first, second: domains.
        kept: experts chosen in each layer, M.
        expected: M / E, the overlap of random choices.
        layers: layer -> overlap.
        bands: band of layers -> mean overlap.
    """

    first: str
    second: str
    kept: int
    expected: float
    layers: dict[int, float]
    bands: dict[str, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.layers.values())))

    @property
    def near_chance(self) -> bool:
        """Say whether the two choices share little more than random ones."""
        return self.expected < 1 and (self.mean - self.expected) / (1 - self.expected) <= NEAR_CHANCE + 1e-12

    def document(self) -> dict[str, Any]:
        """Return the overlap as plain data."""
        return {
            "first": self.first, "second": self.second, "kept": self.kept, "expected": self.expected, "mean": self.mean,
            "near_chance": self.near_chance, "bands": self.bands, "layers": {str(k): v for k, v in self.layers.items()},
        }  # fmt: skip


def domain_overlaps(
    scores: Mapping[str, Mapping[int, np.ndarray]], kept: int, groups: int = 1
) -> list[DomainOverlap]:
    """Return the overlap of every two domains.

    Args:
        scores: domain -> layer -> [E]; the same layers in all domains.
        kept: experts chosen in each layer, M.
        groups: routing groups.
    """
    names = list(scores)
    found = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            each = {
                layer: overlap(scores[first][layer], scores[second][layer], kept, groups)
                for layer in scores[first]
            }
            experts = len(next(iter(scores[first].values())))
            thirds = {
                band: float(np.mean([each[layer] for layer in layers]))
                for band, layers in bands(sorted(each)).items()
            }
            found.append(DomainOverlap(first, second, kept, kept / experts, each, thirds))
    return found


@dataclass(frozen=True)
class Stability:
    """How much a choice of experts depends on which demonstrations it is made from.

    Attributes:
        samples: demonstrations there are.
        kept: experts chosen in each layer, M.
        expected: M / E.
        agreement: demonstrations -> mean overlap between the choice of so many random ones and that of all.
        halves: mean overlap between the choices of two halves that share nothing; the figure a decision is made
            by, because the others contain what they are compared with. None with one demonstration.
        worst: (layer, its overlap of halves), the layer where it is lowest; None with one demonstration.
    """

    samples: int
    kept: int
    expected: float
    agreement: dict[int, float]
    halves: float | None
    worst: tuple[int, float] | None

    @property
    def enough(self) -> bool:
        """Say whether the choice may be believed."""
        return self.halves is not None and self.halves >= STABLE

    def document(self) -> dict[str, Any]:
        """Return the stability as plain data."""
        return {
            "samples": self.samples, "kept": self.kept, "expected": self.expected, "halves": self.halves,
            "agreement": {str(k): v for k, v in self.agreement.items()}, "enough": self.enough,
            "worst": None if self.worst is None else {"layer": self.worst[0], "overlap": self.worst[1]},
        }  # fmt: skip


def stability(
    by_sample: Mapping[int, np.ndarray], kept: int, *, groups: int = 1, seed: int = 0,
    demonstrations: Sequence[int] = DEMONSTRATIONS, draws: int = DRAWS,
) -> Stability:  # fmt: skip
    """Return how stable the choice of the ``kept`` best experts is.

    Args:
        by_sample: layer -> [samples, E], what each demonstration adds to the scores.
        groups: routing groups.
        seed: of the random sets of demonstrations.
    """
    samples, experts = next(iter(by_sample.values())).shape
    whole = {
        layer: top(np.asarray(values, np.float64).sum(axis=0), kept, groups)
        for layer, values in by_sample.items()
    }
    orders = [_order(samples, seed, draw) for draw in range(draws)]

    def chosen(layer: int, numbers: np.ndarray) -> np.ndarray:
        return top(by_sample[layer][numbers].astype(np.float64).sum(axis=0), kept, groups)

    def common(first: np.ndarray, second: np.ndarray) -> float:
        return len(np.intersect1d(first, second, assume_unique=True)) / kept

    agreement = {
        count: float(
            np.mean(
                [
                    common(chosen(layer, order[:count]), whole[layer])
                    for order in orders
                    for layer in by_sample
                ]
            )
        )
        for count in demonstrations
        if count < samples
    }
    if samples < 2:
        return Stability(samples, kept, kept / experts, agreement, None, None)
    half = samples // 2
    each = {
        layer: float(np.mean([common(chosen(layer, o[:half]), chosen(layer, o[half : 2 * half])) for o in orders]))
        for layer in by_sample
    }  # fmt: skip
    worst = min(each, key=lambda layer: (each[layer], layer))
    return Stability(
        samples, kept, kept / experts, agreement, float(np.mean(list(each.values()))), (worst, each[worst])
    )


def sentences(overlaps: Sequence[DomainOverlap], stabilities: Mapping[str, Stability]) -> list[str]:
    """Return what follows for pruning, one sentence each; nothing where nothing speaks against it.

    Two domains are only said to differ where both choices are stable: noise overlaps with nothing.
    """
    found = []
    for domain, stable in stabilities.items():
        name = f' of "{domain}"' if domain else ""
        if stable.halves is None:
            found.append(
                f"one demonstration{name} says nothing about how stable the choice of experts is: give 25"
            )
        elif not stable.enough:
            found.append(
                f"too few demonstrations{name}: two halves of the {stable.samples} agree on {stable.halves:.0%} of the "
                f"{stable.kept} experts kept (chance {stable.expected:.0%}, wanted {STABLE:.0%})"
            )
    for pair in overlaps:
        believed = all(stabilities[d].enough for d in (pair.first, pair.second) if d in stabilities)
        if pair.near_chance and believed:
            found.append(
                f'"{pair.first}" and "{pair.second}" share {pair.mean:.0%} of their {pair.kept} best experts (chance '
                f"{pair.expected:.0%}): pruning for both at this number will hurt one of them; keep more experts, or make "
                "two models"
            )
    return found


def _order(samples: int, seed: int, draw: int) -> np.ndarray:
    return np.argsort(uniform(stream_key(seed, draw, "sets of demonstrations"), 0, samples), kind="stable")
