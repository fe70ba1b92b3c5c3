"""Spherical linear interpolation of two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.merge.combination import Combination, cosine, slerp_coefficients
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Operation

STRAIGHT = 0.9995  # |cos| above which mergekit and its predecessors interpolate linearly
TINY_NORM = 1e-8


@dataclass(frozen=True)
class Slerp:
    """c = [sin((1-t) a), sin(t a)] / sin a with a the angle between the two tensors."""

    t: float

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        cos = cosine(gram, TINY_NORM)
        return slerp_coefficients(cos, self.t, np.abs(cos) > STRAIGHT)

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        cos = float(cosine(gram, TINY_NORM))
        return {"cosine": cos, "branch": "linear" if abs(cos) > STRAIGHT else "spherical"}


def bind(b: Binding) -> Operation:
    assert b.base is not None
    return Combination(Slerp(float(b.shared["t"])), (b.base, *b.others), None, b.work)


METHOD = Method(
    name="slerp",
    title="SLERP",
    summary="Interpolates two models along the arc between them.",
    bind=bind,
    base="required",
    models=(2, 2),
    parameters=(Parameter("t", "float", "0 gives the base, 1 the other model", required=True, cli=0.5),),
    reference="Shoemake 1985, Animating rotation with quaternion curves",
    page="""y = sin((1-t) a) / sin a * base + sin(t a) / sin a * other, with a the angle between the two tensors,
each flattened. Where |cos a| > 0.9995, y = (1-t) base + t other; light fine-tunes of one model are usually there, so
slerp and linear then agree. The report says which branch each tensor took.

t is often a gradient over layers, or differs by filter (self_attn, mlp). Embedding and head use its first value.""",
)
