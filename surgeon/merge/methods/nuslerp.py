"""NuSLERP: spherical interpolation with weights, by tensor, row or column, optionally of task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.merge.combination import COLLINEAR, Combination, cosine, slerp_coefficients
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Operation

TINY_TOTAL = 1e-6
TINY_NORM = 1e-7


@dataclass(frozen=True)
class NuSlerp:
    """As slerp, but linear only where the vectors are collinear."""

    t: float

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        cos = cosine(gram, TINY_NORM)
        return slerp_coefficients(cos, self.t, 1.0 - np.square(cos) <= COLLINEAR)

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        return {"cosine": float(cosine(gram, TINY_NORM))}


def bind(b: Binding) -> Operation:
    first, second = (float(w) for w in b.of("weight"))
    total = first + second
    t = 0.5 if abs(total) < TINY_TOTAL else second / total
    vectors = "tensor"
    if not b.shared["nuslerp_flatten"] and len(b.shape) > 1:
        vectors = "column" if b.shared["nuslerp_row_wise"] else "row"
    return Combination(NuSlerp(t), b.others, b.base, b.work, vectors)


METHOD = Method(
    name="nuslerp",
    title="NuSLERP",
    summary="Spherical interpolation of two models by weight, whole tensors or vector by vector.",
    bind=bind,
    base="optional",
    models=(2, 3),
    parameters=(
        Parameter(
            "weight",
            "float",
            "share of this model; only the ratio counts",
            per_model=True,
            required=True,
            cli=1.0,
        ),
        Parameter("nuslerp_flatten", "bool", "one angle for the whole tensor", default=True),
        Parameter(
            "nuslerp_row_wise",
            "bool",
            "without flatten: vectors along axis 0 instead of the last",
            default=False,
        ),
    ),
    reference="mergekit (nuslerp)",
    page="""t = w2 / (w1 + w2), then slerp of the two models. With a base, which must be a third model, the task vectors
are interpolated and added to the base.

nuslerp_flatten: false takes an angle for each vector along the last axis; with nuslerp_row_wise: true along axis 0
(the names are mergekit's).""",
)
