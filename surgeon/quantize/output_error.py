"""How far the outputs of a quantized matrix are from those of the original, on second moments of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.calibrate.damping import exact_products
from surgeon.formats.scheme import Codes

STRIP = 512

PIECE = 1 << 22
"""Weights whose values are made at once: that takes five copies of them."""


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Return tr(W H W') for W [out, in] and symmetric H [in, in]; with H = sum of x x' it is ||W X||^2.

    Each pair of inputs is multiplied once. Products are in the precision of ``weight``, sums in float64.
    """
    total = 0.0
    with exact_products(), torch.no_grad():
        for start in range(0, len(hessian), STRIP):
            stop = min(start + STRIP, len(hessian))
            strip = hessian[start:, start:stop].to(weight, copy=True)
            square = strip[
                : stop - start
            ].tril_()  # each pair once; the sum is doubled, so the diagonal is halved
            square.diagonal().mul_(0.5)
            product = (weight[:, start:] @ strip).mul_(weight[:, start:stop])
            total += 2 * float(product.sum(dtype=torch.float64))
    return total


def error(codes: Codes, weight: Tensor, hessian: Tensor) -> float:
    """Return tr((Q - W) H (Q - W)') for the values Q of codes, made a range of outputs after the other."""
    weight = weight if weight.dtype == torch.float64 else weight.float()
    step, total = max(1, PIECE // weight.shape[1]), 0.0
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = Codes(codes.scheme, codes.codes[rows], codes.scales[rows], codes.zeros[rows])
        total += energy(torch.from_numpy(part.values()).to(weight).sub_(weight[rows]), hessian)
    return max(0.0, total)


def relative(codes: Codes, weight: Tensor, hessian: Tensor, total: float | None = None) -> float:
    """Return tr((Q - W) H (Q - W)') / tr(W H W'); 0 where the matrix computes nothing.

    Args:
        codes: Q.
        weight: W [out, in].
        hessian: [in, in], undamped; any multiple of the mean of x x'.
        total: tr(W H W'), where it is known already.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    total = energy(weight, hessian) if total is None else total
    return error(codes, weight, hessian) / total if total > 0 else 0.0
