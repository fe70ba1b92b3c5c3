"""Weighted average of all inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.errors import UsageError
from surgeon.kernels import cast
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Block, Operation


@dataclass(frozen=True)
class Linear(Operation):
    """y = sum_i w_i x_i / sum_i w_i, accumulated in float32 in input order, rounded once.

    Each step is a fused multiply-add, which is what torch computes on current CPUs.
    """

    weights: tuple[float, ...]
    normalize: bool
    work: str

    name = "linear"
    scratch = 24

    def map(self, block: Block, carried: None) -> list[np.ndarray]:
        from surgeon.kernels import fused

        done = fused.linear(block, self.weights, self.normalize, self.work)
        if done is not None:
            return [done]
        wide = np.float64 if self.work == "F64" else np.float32
        weights = np.array(self.weights, dtype=wide)
        total = np.zeros(block.stop - block.start, dtype=wide)
        for x, w in zip(block.values(self.work), weights, strict=True):
            if wide is np.float64:
                total += x * w
            else:  # float64 holds the product exactly, so this rounds once like a fused multiply-add
                total = (x.astype(np.float64) * np.float64(w) + total).astype(np.float32)
        if self.normalize:
            total /= weights.sum(dtype=wide)
        return [cast.round_to(total, self.work)]


def bind(b: Binding) -> Operation:
    weights = tuple(float(values["weight"]) for values in b.each)
    if b.shared["normalize"] and sum(weights) == 0:
        raise UsageError(
            "E213",
            "linear: the weights sum to 0 and normalize is on",
            help="--no-normalize, or other weights",
        )
    return Linear(weights, bool(b.shared["normalize"]), b.work)


METHOD = Method(
    name="linear",
    title="Linear",
    summary="Weighted average of all models.",
    bind=bind,
    base="ignored",
    models=(1, None),
    parameters=(
        Parameter(
            "weight", "float", "share of this model", per_model=True, every_input=True, required=True, cli=1.0
        ),
        Parameter("normalize", "bool", "divide by the sum of the weights", default=True),
    ),
    reference="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
    page="""y = sum(w_i x_i) / sum(w_i). A base model, when named, is one more input.

Weights that sum to something else than 1 are divided by their sum unless normalize is off: task
arithmetic written as weights (+1 +1 -1) needs --no-normalize. The sum of weights must not be 0.""",
)
