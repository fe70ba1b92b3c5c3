"""SparseGPT: weights become zero column by column, those to the right take over what is lost.

"SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (Frantar and Alistarh, arXiv
2301.00774, algorithm 1). With H the damped second moments of the inputs and U upper triangular with
H^-1 = U'U, blocks of 128 columns go from left to right:

    mask     the smallest w_ij^2 / U_jj^2 of the block; for N:M of each group, with the weights as updated so far
    column   e = (w - q) / U_jj with q the masked column; later columns of the block lose e U_j,later
    block    all columns behind it lose E U_block,rest

The sum of all e^2 is the error it has made: tr(dW H dW').
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.calibrate.damping import damped, dead_inputs, escalated, exact_products, factorise
from surgeon.errors import InputError, Where
from surgeon.prune.sparse.masks import Pattern, share, smallest, smallest_rows

BLOCK = 128


@dataclass(frozen=True)
class Solved:
    """A sparse matrix.

    Attributes:
        weight: [out, in], exact zeros.
        error: sum of e^2 = tr(dW H dW') with the damped H.
        damp: relative damping it took.
    """

    weight: Tensor
    error: float
    damp: float


def inverse_factor(hessian: Tensor, damp: float, module: str) -> tuple[Tensor, float]:
    """Return U, upper triangular with (H + damping)^-1 = U'U, and the damping it took.

    H is factorised from its last column on, H = R R' with R upper; then U = R^-1 needs no inverse of H.
    """

    def flipped(relative: float) -> Tensor:
        return damped(hessian, relative).flip(0, 1).T.contiguous().T

    for start in escalated(damp):
        lower, taken = factorise(flipped, start, module)
        upper = lower.tril().flip(0, 1)
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        found = torch.linalg.solve_triangular(upper, identity, upper=True)
        if bool(torch.isfinite(found).all()):
            return found, taken
    raise InputError("E314", f"the Hessian of {module} cannot be inverted", where=Where(tensor=module),
                     help="use more or longer calibration samples, or a larger --damp")  # fmt: skip


def solve(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    *,
    damp: float = 1e-2,
    module: str = "",
) -> Solved:
    """Make a matrix sparse.

    Args:
        weight: [out, in]; computed in float32, float64 stays.
        hessian: mean of x x' over tokens [in, in].
        sparsity: share of all weights; every block gets its part, in sum exactly round(s n).
        pattern: or N:M.
        damp: share of the mean diagonal of live inputs that is added. Dead inputs' weights become zero.
        module: for messages.

    Raises:
        InputError: E314 the Hessian stays singular however it is damped.
    """
    work = weight.double() if weight.dtype == torch.float64 else weight.float()
    work = work.clone()
    with exact_products():
        upper, taken = inverse_factor(hessian.to(work.dtype), damp, module)
        dead = dead_inputs(hessian)
        width = work.shape[1]
        step = BLOCK if pattern is None else max(1, BLOCK // pattern.group) * pattern.group
        error, done = 0.0, 0
        for start in range(0, width, step):
            stop = min(start + step, width)
            part = upper[start:stop, start:stop]
            chosen = None
            if pattern is None:
                assert sparsity is not None
                due = share(sparsity, work.shape[0] * stop)
                chosen = smallest(_scores(work[:, start:stop], part, dead[start:stop]), due - done)
                done = due
            lost = _block(work[:, start:stop], part, chosen, pattern, dead[start:stop])
            error += float(lost.double().square().sum())
            if stop < width:
                work[:, stop:] -= lost @ upper[start:stop, stop:]
    return Solved(work, error, taken)


def _scores(block: Tensor, upper: Tensor, dead: Tensor) -> Tensor:
    """Return what each weight costs [out, columns]; those of dead inputs go first."""
    found = block.square() / upper.diagonal().square()
    found[:, dead] = -1.0
    return found


def _block(
    block: Tensor, upper: Tensor, chosen: Tensor | None, pattern: Pattern | None, dead: Tensor
) -> Tensor:
    """Prune the columns of a block in place and return their errors [out, columns]."""
    lost = torch.zeros_like(block)
    for column in range(block.shape[1]):
        if pattern is not None and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            chosen_group = smallest_rows(
                _scores(block[:, group], upper[group, group], dead[group]), pattern.zeros
            )
            chosen = chosen_group if chosen is None else torch.cat([chosen, chosen_group], dim=1)
        assert chosen is not None
        gone = chosen[:, column] | dead[column]
        current = block[:, column]
        e = torch.where(gone, current, 0.0) / upper[column, column]
        lost[:, column] = e
        block[:, column:] -= e[:, None] * upper[column, column:]
        block[:, column].masked_fill_(gone, 0.0)
    return lost
