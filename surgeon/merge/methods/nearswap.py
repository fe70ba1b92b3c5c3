"""NearSwap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.kernels import cast
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Block, Operation

TINY_DISTANCE = 1e-6


@dataclass(frozen=True)
class NearSwap(Operation):
    """y = w x + (1 - w) b with w = min(1, t / |x - b|), rounded to ``work`` after every step."""

    base: int
    other: int
    t: float
    work: str

    name = "nearswap"
    scratch = 28

    def map(self, block: Block, carried: None) -> list[np.ndarray]:
        b, x = block.value(self.base, self.work), block.value(self.other, self.work)
        wide = b.dtype.type

        def rounded(values: np.ndarray) -> np.ndarray:
            return cast.round_to(values, self.work)

        distance = rounded(np.abs(b - x))
        tiny = rounded(np.array([TINY_DISTANCE], dtype=wide))[0]
        # 1 / d first, then t: so torch divides a number by a tensor. In float16 1 / d may overflow to inf,
        # and 0 * inf at t = 0 would be NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            w = rounded(rounded(wide(1) / np.maximum(distance, tiny)) * wide(self.t))
        w = np.clip(np.nan_to_num(w, nan=0.0), wide(0), wide(1))
        y = rounded(rounded(w * x) + rounded(rounded(wide(1) - w) * b))
        return [np.where(b == x, b, y)]


def bind(b: Binding) -> Operation:
    assert b.base is not None
    return NearSwap(b.base, b.others[0], float(b.shared["t"]), b.work)


METHOD = Method(
    name="nearswap",
    title="NearSwap",
    summary="Takes the other model's value where it is close to the base's.",
    bind=bind,
    base="required",
    models=(2, 2),
    parameters=(
        Parameter(
            "t", "float", "distance up to which values are taken over", required=True, cli=1e-4, low=0.0
        ),
    ),
    reference="alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (Hugging Face)",
    page="""y = w x + (1 - w) b with w = min(1, t / |x - b|): entries that differ by less than t become the other model's, larger
differences move by t. t = 0 is the base, a huge t the other model.""",
)
