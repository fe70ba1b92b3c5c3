"""The closed form: what the kept columns of a matrix become when others are removed, and what error is left.

    W_K = W0_K + W0_R H[R, K] H[K, K]^-1   ( = W0 H[:, K] H[K, K]^-1 )

with the damped H (`surgeon.calibrate.damping`), H = mean of x x' over the inputs of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.damping import dead_inputs, exact_products, factorise, shift

CHUNK = 1 << 22
"""Elements of a large matrix handled at once."""

FLOAT64_COLUMNS = 4096
"""Systems up to this size are solved in float64, larger ones in float32 with refinement."""


def columns_of(units: np.ndarray, size: int) -> np.ndarray:
    """Return the columns of units, ascending, int64."""
    units = np.sort(np.asarray(units, dtype=np.int64).reshape(-1))
    return (units[:, None] * size + np.arange(size)).reshape(-1)


def solve(
    weight: Tensor,
    hessian: Tensor,
    kept: Sequence[int] | np.ndarray | Tensor,
    damp: float = 1e-2,
    *,
    module: str = "the matrix",
) -> Tensor:
    """Return the kept columns of a matrix, changed so that they make up for the others: float32 [out, kept].

    Args:
        weight: W0, float32 [out, in].
        hessian: mean of x x' [in, in], undamped.
        kept: columns that stay, ascending.
        damp: relative damping (of the whole Hessian), raised when the system cannot be solved.
        module: for messages.

    Columns of inputs that never fired stay as they are: nothing is known about them. With every column
    kept the result is W0, bit for bit.

    Raises:
        InputError: E314 the system cannot be solved with any damping.
    """
    with exact_products(), torch.no_grad():
        mask = mask_of(kept, weight.shape[1], weight.device)
        if bool(mask.all()):
            return weight.clone()
        change, _, _ = _system(weight, hessian, mask, damp, module, torch.float64)
        return weight[:, mask] + change.to(weight.dtype)


def error_of(weight: Tensor, hessian: Tensor, solved: Tensor, kept: Sequence[int] | np.ndarray) -> float:
    """Return ||(W - W0) X||^2 / ||W0 X||^2 of given kept columns, on the undamped Hessian."""
    with exact_products(), torch.no_grad():
        mask = mask_of(kept, weight.shape[1], weight.device)
        difference = -weight.double()
        difference[:, mask] += solved.double()
        total = energy(weight, hessian)
        return energy(difference, hessian) / total if total else 0.0


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Return tr(W H W') in float64; with H = mean of x x' the mean squared norm of W x."""
    total = 0.0
    for columns in range(0, len(hessian), 512):
        part = slice(columns, columns + 512)
        total += float((weight.double() @ hessian[:, part].double()).mul_(weight[:, part]).sum())
    return total


def mask_of(kept: Sequence[int] | np.ndarray | Tensor, columns: int, device: torch.device) -> Tensor:
    mask = torch.zeros(columns, dtype=torch.bool, device=device)
    mask[torch.as_tensor(np.asarray(kept, dtype=np.int64), device=device)] = True
    return mask


def _system(
    weight: Tensor, hessian: Tensor, mask: Tensor, damp: float, module: str, products: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the kept columns change by [out, kept], W0_R H[R, K], and what was added to H[K, K].

    ``products`` is the precision of the right-hand side.
    """
    kept, removed = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    gone = weight[:, removed].masked_fill(dead_inputs(hessian)[removed], 0).to(products)
    known = gone @ _part(hessian, removed, kept, products)
    change, added = ridge(known, hessian, kept, lambda r: shift(hessian.diagonal(), r)[kept], damp, module)
    return change, known.to(change.dtype), added


def ridge(
    known: Tensor,
    hessian: Tensor,
    kept: Tensor,
    shift_of: Callable[[float], Tensor],
    damp: float,
    module: str,
) -> tuple[Tensor, Tensor]:
    """Solve change (H[K, K] + diag(shift)) = known, in float64 where it fits, else in float32 with refinement.

    Args:
        known: [out, kept].
        hessian: [n, n], undamped.
        kept: int64 [kept], which of its rows and columns make the system.
        shift_of: relative damping -> shift, float64 [kept] (`surgeon.calibrate.damping.shift`).
        damp: relative damping, raised when the system cannot be solved.
        module: for messages.

    Returns:
        The change [out, kept], and the shift that was added, float64 [kept].
    """
    dtype = torch.float64 if len(kept) <= FLOAT64_COLUMNS else torch.float32

    def fill(relative: float) -> Tensor:
        square = _part(hessian, kept, kept, dtype)
        square.diagonal().add_(shift_of(relative).to(dtype))
        return square.T

    factor, relative = factorise(fill, damp, module)
    known = known.to(dtype)
    change = torch.cholesky_solve(known.T, factor).T
    added = shift_of(relative)
    if dtype == torch.float32:
        change = _refined(change, known, hessian, kept, added, factor)
    return change, added


def remaining_error(
    weight: Tensor, hessian: Tensor, mask: Tensor, damp: float, module: str, total: float
) -> float:
    """Return tr(dW H dW') of the closed form, undamped; ``total`` is tr(W0 H W0')."""
    dtype = hessian.dtype
    change, known, added = _system(weight, hessian, mask, damp, module, dtype)
    stay = mask if int(mask.sum()) <= len(mask) // 2 else ~mask  # the smaller square is the cheaper one
    part = weight[:, stay].masked_fill(dead_inputs(hessian)[stay], 0).to(dtype)
    chosen = stay.nonzero().flatten()
    square = (part @ _part(hessian, chosen, chosen, dtype)).mul_(part).sum(dtype=torch.float64)
    if stay is mask:  # tr(W0_R H[R, R] W0_R') from the whole
        square = total - square - 2 * known.mul(part).sum(dtype=torch.float64)
    # dW = [change, -W0_R]; the normal equations give change H[K, K] = known - change * added.
    ridge = (change.double().square().sum(0) * added).sum()
    return max(0.0, float(square - change.mul(known).sum(dtype=torch.float64) - ridge))


def _part(hessian: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return H[rows, columns] in ``dtype``, made in slices so that no wide copy lies beside it."""
    out = torch.empty(len(rows), len(columns), dtype=dtype, device=hessian.device)
    copy_part(hessian, rows, columns, out)
    return out


def copy_part(hessian: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    if len(rows) == len(columns) == len(hessian):
        out.copy_(hessian)
        return
    step = max(1, CHUNK // len(hessian))
    for start in range(0, len(rows), step):
        taken = hessian[rows[start : start + step]]
        out[start : start + step] = torch.gather(taken, 1, columns.expand(len(taken), -1))


def _refined(
    change: Tensor, known: Tensor, hessian: Tensor, kept: Tensor, added: Tensor, factor: Tensor
) -> Tensor:
    """Return a float32 solution after one step of refinement with residuals in float64."""
    wide = change.double()
    residual = known.double() - wide * added
    step = max(1, CHUNK // len(kept))
    for start in range(0, len(kept), step):
        rows = _part(hessian, kept[start : start + step], kept, torch.float64)
        residual.addmm_(wide[:, start : start + step], rows, alpha=-1)
    return change + torch.cholesky_solve(residual.float().T, factor).T
