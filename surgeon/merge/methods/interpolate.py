"""Plain interpolation of siblings, or of two end points."""

from __future__ import annotations

from surgeon.errors import UsageError
from surgeon.merge.combination import Combination, Fixed
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.plan import Operation


def bind(b: Binding) -> Operation:
    given = [b.each[i].get("weight") for i in b.others]
    t = b.shared.get("t")
    if any(w is not None for w in given):
        if b.base is None:
            raise UsageError("E213", "interpolate: weight needs a base",
                             help="--base MODEL, or t for two models without a base")  # fmt: skip
        if any(w is None for w in given):
            raise UsageError(
                "E213",
                "interpolate: some models have a weight and some have none",
                help="give every model but the base a weight",
            )
        return Combination(Fixed(tuple(float(w) for w in given if w is not None)), b.others, b.base, b.work)
    if t is None:
        raise UsageError(
            "E211",
            "interpolate needs t, or a weight for each model and a base",
            help="--t 0.5, or --base MODEL with --weight",
        )
    t = float(t)
    if b.base is None:
        if len(b.others) != 2:
            raise UsageError("E213", f"interpolate: t is for two models, {len(b.others)} are given",
                             help="--base MODEL and a weight for each of the others")  # fmt: skip
        # (1 - t) A + t L written as A + t (L - A): equal entries stay equal.
        first, second = b.others
        return Combination(Fixed((t,)), (second,), first, b.work)
    if len(b.others) > 2:
        raise UsageError("E213", f"interpolate: {len(b.others)} models need a weight each",
                         help="weight: N under each of them; t is for two models")  # fmt: skip
    shares = (t,) if len(b.others) == 1 else (1.0 - t, t)
    return Combination(Fixed(shares), b.others, b.base, b.work)


METHOD = Method(
    name="interpolate",
    title="Interpolation",
    summary="Adds given shares of each sibling's update to the base, or blends two models; nothing is dropped.",
    bind=bind,
    base="optional",
    models=(2, None),
    parameters=(
        Parameter("weight", "float", "share c of this model's update (needs a base)", per_model=True),
        Parameter(
            "t", "float", "0 gives the first model, 1 the second; outside [0, 1] extrapolates", cli=0.5
        ),
    ),
    reference="ReCUT, arXiv 2506.10822; CoT-Valve, arXiv 2502.09601",
    page="""With a base: y = b + sum(c_i (x_i - b)), c = weight, or 1 - t and t for two siblings. Without: y = (1 - t) A + t L.
Any real t: beyond 1 goes further in the direction from A to L, as CoT-Valve does to shorten reasoning more.

Sums are float32 with one rounding at the end; t = 0 and t = 1 give the end points bit for bit. Two specialists trained
from one base (accuracy and length, as in ReCUT) are its case; sweep t over 0.25, 0.5, 0.75.""",
)
