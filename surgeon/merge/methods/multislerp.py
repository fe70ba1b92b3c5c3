"""Barycentric interpolation of several models on a sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.copying import Cast
from surgeon.errors import InputError, UsageError, Where
from surgeon.kernels import cast
from surgeon.merge.combination import Combination, length, norms
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Operation


@dataclass(frozen=True)
class MultiSlerp:
    """u_i = x_i / |x_i|; m = unit of sum w_i u_i; v = sum w_i (u_i - <u_i, m> m).

    y = (cos|v| m + sin|v| / |v| v) * sum w_i |x_i|
    """

    weights: tuple[float, ...]
    eps: float
    tensor: str

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        w = np.array(self.weights)
        size = norms(gram)
        unit = np.diag(1.0 / (size + self.eps))  # row i: coefficients of u_i
        mean = w @ unit
        mean_length = length(gram, mean)
        if mean_length < self.eps:
            if len(w) > 2 and size.any():
                raise InputError(
                    "E348", f"multislerp: the weighted directions of {printable(self.tensor)} cancel",
                    where=Where(tensor=printable(self.tensor)),
                    help="no mean direction exists for opposite vectors of balanced weight; choose other weights",
                )  # fmt: skip
            return w
        mean = mean / mean_length
        tangents = unit - (unit @ gram @ mean)[:, None] * mean
        move = w @ tangents
        step = length(gram, move) + self.eps
        return (mean * math.cos(step) + move * (math.sin(step) / step)) * float(size @ w)

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        return {}


def bind(b: Binding) -> Operation:
    raw = [float(w) for w in b.of("weight")]
    if len(raw) == 1:
        return Cast(b.work, b.others[0])
    weights = cast.round_to(np.array(raw, np.float64 if b.work == "F64" else np.float32), b.work)
    normalized = bool(b.shared["normalize_weights"])
    if normalized:
        total = cast.round_to(weights.sum(keepdims=True), b.work)
        if total[0] == 0:
            raise UsageError("E213", "multislerp: the weights sum to 0 and normalize_weights is on",
                             help="--param normalize_weights=false, or other weights")  # fmt: skip
        weights = cast.round_to(weights / total, b.work)
    solver = MultiSlerp(tuple(float(w) for w in weights), float(b.shared["eps"]), b.name)
    identity = normalized or b.base is not None
    return Combination(solver, b.others, b.base, b.work, identity=identity)


METHOD = Method(
    name="multislerp",
    title="Multi-SLERP",
    summary="Interpolates any number of models on the sphere around their mean direction.",
    bind=bind,
    base="optional",
    models=(1, None),
    parameters=(
        Parameter("weight", "float", "share of this model", per_model=True, required=True, cli=1.0),
        Parameter("normalize_weights", "bool", "make the weights sum to 1", default=True),
        Parameter("eps", "float", "guard of the divisions by lengths", default=1e-8, low=0.0, open_low=True),
    ),
    reference="Goddard 2025, Multi-SLERP (goddard.blog/posts/multislerp-wow-what-a-cool-idea)",
    page="""Projects the models onto the tangent space at their mean direction, averages there, projects back and scales
to the mean length. With a base it works on task vectors and adds the base. One model comes out as it is.

Undefined when the weighted directions cancel: two models are then averaged, more are refused.""",
)
