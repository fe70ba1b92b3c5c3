"""Making up for what was quantized before: the matrix to approximate moves, then GPTQ runs as it is.

Let x be what a matrix is fed by the layers already quantized and x0 what the original model feeds it. Wanted is
Q x = W x0. With H = sum of x x' and C = sum of (x0 - x) x'

    ||Q X - W X0||^2 = tr((Q - W') H (Q - W')') + a constant,    W' = W + W C H^-1,

so the best Q is the nearest to W' in the same sense as before. GPTAQ (Li et al. 2025, 2504.02692) moves, column by
column, only inputs still to be rounded; this is the whole of it. With the damped H it is the solution that also
stays near W. Grids are made from W', which may reach beyond the range of W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.calibrate.damping import dead_inputs, exact_products
from surgeon.formats.scheme import Scheme
from surgeon.quantize.factor import Factor, Order, factorise
from surgeon.quantize.gptq import quantize_with
from surgeon.quantize.grids import group_of, working
from surgeon.quantize.moments import Moments
from surgeon.quantize.output_error import energy
from surgeon.quantize.shrinkage import ENOUGH

AMOUNTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def shifted(weight: Tensor, cross: Tensor, factor: Factor, amount: float = 1.0) -> Tensor:
    """Return W' = W + amount W C H^-1, [out, in], for the damped H of a factor.

    Args:
        weight: W, [out, in].
        cross: C, [in, in], sum of (x0 - x) x' over the same tokens, weighted alike, as the factor's Hessian.
        factor: of the Hessian of x. Without one (it could not be factorised) W' = W.
        amount: 1 is best on the tokens seen.
    """
    weight = working(weight)
    if factor.unit is None or amount == 0:
        return weight
    with exact_products(), torch.no_grad():
        # In the factor's order H = U D U', U with ones on its diagonal, D the squares of the pivots.
        wanted = (weight @ cross.to(weight)).index_select(1, factor.columns).T
        found = torch.linalg.solve_triangular(factor.unit, wanted, upper=False, unitriangular=True)
        found /= factor.pivots.square().to(found)[:, None]
        found = torch.linalg.solve_triangular(factor.unit.T, found, upper=True, unitriangular=True)
        result = weight.clone()
        result[:, factor.columns] += amount * found.T
        return result


def error(values: Tensor, weight: Tensor, moments: Moments) -> float:
    """Return ||Q X - W X0||^2 less ||W (X0 - X)||^2, which does not depend on Q.

    Args:
        values: Q, [out, in].
        weight: W, [out, in].
        moments: with ``cross``.
    """
    assert moments.cross is not None
    difference = values - weight
    with exact_products(), torch.no_grad():
        product = (difference @ moments.cross.to(weight).T).mul_(weight)
    return energy(difference, moments.hessian) - 2 * float(product.sum(dtype=torch.float64))


def choose_amount(
    weights: Sequence[Tensor], train: Moments, held: Moments, scheme: Scheme, *, scale_dtype: str, k: float = 0.0,
    order: Order = "static-act", damp: float = 0.01, block: int = 128, clip: bool | None = None,
    menu: Sequence[float] = AMOUNTS, module: str = "the matrix",
) -> tuple[float, dict[float, float]]:  # fmt: skip
    """Return how far to move matrices that share their inputs, and the errors on the samples held out.

    With ``ENOUGH`` effective tokens an input, all the way, untried; where nothing can be held out, not at all.

    Args:
        weights: matrices [out, in].
        train, held: sums over three quarters of the samples and over the others, with ``cross``.
        k: how far the Hessian is drawn to its diagonal (`surgeon.quantize.shrinkage`).
        menu: amounts to try.
        scheme, scale_dtype, order, damp, block, clip, module: as `surgeon.quantize.gptq.quantize` will get them.
    """
    inputs = len(train.hessian)
    whole = train.merged(held)
    if whole.count >= ENOUGH * inputs:
        return 1.0, {}
    if not train.hessian.diagonal().any() or not held.hessian.diagonal().any():
        return 0.0, {}
    assert train.cross is not None
    group = group_of(inputs, scheme, module)
    factor = factorise(
        train.hessian, order=order, group=group, damp=damp, k=k, dead=dead_inputs(whole.hessian), module=module
    )  # fmt: skip
    errors = {}
    for amount in menu:
        errors[amount] = 0.0
        for weight in weights:
            target = shifted(weight, train.cross, factor, amount)
            codes, _ = quantize_with(
                target, factor, scheme, scale_dtype=scale_dtype, block=block, clip=clip, known_energy=math.nan, module=module
            )  # fmt: skip
            errors[amount] += error(torch.from_numpy(codes.values()).to(target), working(weight), held)
    return min(errors, key=lambda amount: (errors[amount], amount)), errors
