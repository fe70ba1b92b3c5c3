"""Reinforced Agent Merging Plus, tensor-local."""

from __future__ import annotations

from surgeon.merge.method import Binding, Method, Parameter
from surgeon.merge.methods.ram import EPSILON, Ram
from surgeon.plan import Operation


def bind(b: Binding) -> Operation:
    assert b.base is not None
    boost = float(b.shared["r"]), float(b.shared["alpha"])
    return Ram(b.base, b.others, float(b.shared["epsilon"]), b.work, boost)


METHOD = Method(
    name="ramplus_tl",
    title="Reinforced Agent Merging Plus (tensor-local)",
    summary="RAM, with each model's own changes amplified where averaging diluted the shared ones.",
    bind=bind,
    base="required",
    models=(2, None),
    parameters=(
        Parameter("r", "float", "strength of the amplification", default=0.1),
        Parameter("alpha", "float", "most of shared / unique that counts", default=0.2, low=0.0),
        EPSILON,
    ),
    reference="arXiv 2601.13572",
    page="""As ram; what only model i changed is multiplied by 1 + r min(shared_i / unique_i, alpha), the counts taken within the
tensor. The result has the type the configuration announces (mergekit writes float32; --mergekit-quirks does, too).""",
)
