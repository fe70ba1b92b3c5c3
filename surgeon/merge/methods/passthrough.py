"""One model's tensors as they are, for layer surgery."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.copying import Copy
from surgeon.kernels import cast
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Block, Operation


@dataclass(frozen=True)
class Scaled(Operation):
    """y = scale * x, one rounding to ``work``."""

    scale: float
    work: str

    name = "scaled"
    scratch = 16

    def map(self, block: Block, carried: None) -> list[np.ndarray]:
        x = block.value(0, self.work)
        with np.errstate(over="ignore"):  # a product that does not fit is reported when it is encoded
            return [cast.round_to(x * x.dtype.type(self.scale), self.work)]


def bind(b: Binding) -> Operation:
    scale = b.each[0].get("scale")
    return Copy() if scale is None else Scaled(float(scale), b.work)


METHOD = Method(
    name="passthrough",
    title="Passthrough",
    summary="Copies one model's tensors, layer ranges in any order; optionally scaled.",
    bind=bind,
    base="ignored",
    models=(1, 1),
    parameters=(
        Parameter("scale", "float", "factor of the tensors it applies to", per_model=True, every_input=True),
    ),
    reference="mergekit (passthrough)",
    page="""y = x, or scale * x. Exactly one model contributes to each output tensor: use it with slices to repeat,
reorder or stack layers (depth up-scaling, franken-merges).

A repeated block whose o_proj and down_proj have scale 0 adds nothing to the residual stream, so the deeper model
starts out computing what the shallower one did.""",
)
