"""Optimal brain surgeon the plain way: in-place rank-1 updates of W and the inverse Hessian, one column a step.

The reference that `surgeon.prune.obs` is tested against and timed against. It shares no code with it.
"""

from __future__ import annotations

import torch


def damped_hessian(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Return H with damping: relative to the mean of live inputs, dead ones get that mean."""
    live = hessian.diagonal() != 0
    mean = hessian.diagonal()[live].mean()
    matrix = hessian.clone()
    matrix[~live, ~live] = mean
    return matrix + damp * mean * torch.eye(len(matrix), dtype=matrix.dtype)


def remove(weight: torch.Tensor, hessian: torch.Tensor, damp: float, steps: int, seen=None):
    """Remove ``steps`` columns greedily.

    Args:
        weight: [out, in]; left alone.
        hessian: [in, in], undamped.
        seen: called with (step, weight) after each.

    Returns:
        (order, compensated weight)
    """
    weight = weight.clone()
    inverse = torch.linalg.inv(damped_hessian(hessian, damp).double()).to(weight.dtype)
    weight[:, hessian.diagonal() == 0] = 0
    gone = torch.zeros(len(hessian), dtype=torch.bool)
    order, squares = [], torch.empty_like(weight)
    for step in range(steps):
        scores = torch.mul(weight, weight, out=squares).sum(0) / inverse.diagonal()
        scores[gone] = torch.inf
        s = int(scores.argmin())
        row = inverse[s].clone()
        weight.addr_(weight[:, s].clone(), row, alpha=-1 / float(row[s]))
        inverse.addr_(row, row, alpha=-1 / float(row[s]))
        gone[s] = True
        weight[:, s] = 0
        inverse[s], inverse[:, s] = 0, 0
        inverse[s, s] = 1
        order.append(s)
        if seen is not None:
            seen(step, weight)
    return order, weight
