"""Karcher (Riemannian) mean on the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.copying import Cast
from surgeon.merge.combination import Combination, length, norms
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Operation


@dataclass(frozen=True)
class Karcher:
    """Gradient steps m <- exp_m(mean_i log_m(u_i)) from the normalised mean, times the mean length.

    log_m(u) = a / sin a (u - cos a m) with cos a = <m, u>; exp_m(v) = cos|v| m + sin|v| v / |v|.
    """

    max_iter: int
    tol: float
    native: bool

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        size = norms(gram)
        count = len(size)
        valid = np.flatnonzero(size > self.tol)
        if not len(valid):
            # Too short to have a direction. mergekit gives zeros; the plain mean loses nothing.
            return np.full(count, 1.0 / count if self.native else 0.0)
        units = np.zeros((len(valid), count))
        units[np.arange(len(valid)), valid] = 1.0 / size[valid]
        mean = units.mean(axis=0)
        start = length(gram, mean)
        mean = units[0] if start < self.tol else mean / start
        for _ in range(self.max_iter):
            tangent = np.zeros(count)
            for unit in units:
                dot = float(np.clip(mean @ gram @ unit, -1.0, 1.0))
                angle = math.acos(dot)
                if angle < self.tol:
                    continue
                # At the antipode every direction is as good: no step, where mergekit divides by zero.
                sine = math.sin(angle)
                if sine > 1e-12:
                    tangent += angle / sine * (unit - dot * mean) / len(units)
            move = length(gram, tangent)
            if move < self.tol:
                break
            mean = math.cos(move) * mean + math.sin(move) / move * tangent
            mean /= max(length(gram, mean), self.tol)
        return mean * float(size.mean())

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        return {}


def bind(b: Binding) -> Operation:
    if b.count == 1:
        return Cast(b.work)
    solver = Karcher(int(b.shared["max_iter"]), float(b.shared["tol"]), b.native)
    return Combination(solver, tuple(range(b.count)), None, b.work)


METHOD = Method(
    name="karcher",
    title="Karcher mean",
    summary="Averages directions on the sphere, all models alike.",
    bind=bind,
    base="ignored",
    models=(1, None),
    parameters=(
        Parameter("max_iter", "int", "most steps of the iteration", default=10, low=0),
        Parameter("tol", "float", "angle below which it has converged", default=1e-5, low=0.0, open_low=True),
    ),
    reference="Karcher mean for model merging, arXiv 2603.04972",
    page="""The point of the unit sphere with the least mean squared angle to all models (each tensor flattened), times their
mean length. A base model, when named, is one more input. Models whose tensor is shorter than tol have no direction
and only count in the length.""",
)
