"""The Pareto front of accuracy against answer length, and what the intervals allow to say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """Mean tokens per answer and accuracy (a fraction) of one model, with the ends of their intervals."""

    tokens: float
    accuracy: float
    tokens_low: float | None = None
    tokens_high: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point dominates, shortest answers first.

    One point dominates another when it is at least as accurate with at most as many tokens, and better
    in one of the two. Equal points do not dominate each other: all of them are on the front. Judged by
    the estimates alone; `clearly_beaten` is the statement that the intervals support.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i].tokens, -points[i].accuracy, i))
    kept: list[int] = []
    for i in order:
        best = points[kept[-1]] if kept else None
        equal = best is not None and (points[i].tokens, points[i].accuracy) == (best.tokens, best.accuracy)
        if best is None or points[i].accuracy > best.accuracy or equal:
            kept.append(i)
    return kept


def clearly_beaten(points: Sequence[Point]) -> list[bool]:
    """Say for each point whether another one is shorter and more accurate beyond both of their intervals.

    Intervals of separate models that do not touch are a conservative test; a point without intervals, or
    compared with one without, is never called beaten.
    """
    return [any(_beats(other, point) for other in points) for point in points]


def _beats(better: Point, worse: Point) -> bool:
    if better.tokens_high is None or better.accuracy_low is None:
        return False
    if worse.tokens_low is None or worse.accuracy_high is None:
        return False
    return better.tokens_high < worse.tokens_low and better.accuracy_low > worse.accuracy_high


def staircase(points: Sequence[Point], tokens_end: float, accuracy_start: float) -> list[tuple[float, float]]:
    """Return the corners of the front as (tokens, accuracy): the best accuracy to be had within a length.

    Args:
        points: the front, shortest first, as `front` orders it.
        tokens_end: where the last step ends.
        accuracy_start: where the line rises from below the shortest point.
    """
    corners: list[tuple[float, float]] = []
    level = accuracy_start
    for point in points:
        corners += [(point.tokens, level), (point.tokens, point.accuracy)]
        level = point.accuracy
    if points:
        corners.append((max(tokens_end, points[-1].tokens), level))
    return corners
