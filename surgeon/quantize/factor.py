"""Hessians ready for GPTQ: brought into the order of rounding, damped, drawn to their diagonal, factorised.

One factorisation serves all matrices with the same inputs, at any width (`surgeon.quantize.gptq`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from surgeon.calibrate.damping import dead_inputs, escalated, exact_products, shift
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.quantize.grids import finite

Order = Literal["static-act", "group-aware", "none"]
"""Which inputs are rounded first: those with most energy; the same, but group after group; as they come."""

ATTEMPTS = 4
"""Factorisations tried: with the damping as given, then ten times more each time."""


@dataclass(frozen=True)
class Factor:
    """A Hessian ready for the matrices that share it.

    Attributes:
        hessian: [in, in], as it was given, not drawn to its diagonal.
        columns: int64 [in], the input at each place; places are rounded from the last to the first.
        unit: [in, in], L with every column divided by its diagonal; None where H could not be factorised.
        pivots: float64 [in], the diagonal of L.
        shift: float64 [in], what damping added, by input, and drawing: k times the diagonal.
        dead: bool [in], inputs that were zero for every token: their weights become zero.
        order: as asked.
        group: group size the order was made for; 0 where it does not matter.
        damp: relative damping that was used.
        asked: relative damping that was asked for.
        k: how far the Hessian is drawn to its diagonal (`surgeon.quantize.shrinkage`).
    """

    hessian: Tensor
    columns: Tensor
    unit: Tensor | None
    pivots: Tensor
    shift: Tensor
    dead: Tensor
    order: Order
    group: int
    damp: float
    asked: float
    k: float = 0.0


def order_of(diagonal: Tensor, order: Order, group: int = 0) -> Tensor:
    """Return the inputs in the order in which they are rounded, int64 [in].

    Args:
        diagonal: of the Hessian, [in].
        order: "static-act" by falling diagonal; "group-aware" the same inside each group, and groups by their largest
            (Gafni et al. 2025, GAR); "none" as they come. Ties keep the lower input first.
        group: inputs that share a scale, for "group-aware".
    """
    if order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "static-act":
        return torch.argsort(diagonal, descending=True, stable=True)
    if order != "group-aware":
        raise ValueError(f"no such order: {order!r}")
    inside = torch.argsort(diagonal.reshape(-1, group), dim=1, descending=True, stable=True)
    groups = torch.argsort(diagonal.reshape(-1, group).amax(1), descending=True, stable=True)
    return (inside + group * torch.arange(len(inside), device=diagonal.device)[:, None])[groups].reshape(-1)


def factorise(
    hessian: Tensor, *, order: Order = "static-act", group: int = 0, damp: float = 0.01, k: float = 0.0,
    dtype: torch.dtype = torch.float32, dead: Tensor | None = None, module: str = "the matrix",
) -> Factor:  # fmt: skip
    """Return what all matrices with these inputs need; one factorisation serves any number of them, and any width.

    Args as of `Drawn`, and:
        k: how far the Hessian is drawn to its diagonal: (1 - k) H + k diag(H) is factorised.

    Raises:
        InputError: E451, E452, see `Drawn`.
    """
    drawn = Drawn(hessian, order=order, group=group, damp=damp, dtype=dtype, dead=dead, module=module)
    return drawn.factor(k, last=True)


class Drawn:
    """A Hessian that may be drawn to its diagonal by several amounts: its order, damping and dead inputs are the same for all.

    Args:
        hessian: [in, in], sum or mean of x x' over tokens, undamped. Its scale does not matter.
        order: of rounding, see `order_of`.
        group: group size of the schemes to come; needed for "group-aware" only.
        damp: relative damping: this times the mean diagonal of live inputs is added. Ten times more, up to
            three times, where the factorisation fails; after that `quantize_with` rounds to nearest.
        dtype: precision of the computation.
        dead: bool [in], inputs whose weights become zero, where that is known from more than this Hessian;
            otherwise those it has a zero for.
        module: for messages.

    Raises:
        InputError: E451 the Hessian is not finite, E452 it is zero: no token reached the matrix.
    """

    def __init__(
        self, hessian: Tensor, *, order: Order = "static-act", group: int = 0, damp: float = 0.01,
        dtype: torch.dtype = torch.float32, dead: Tensor | None = None, module: str = "the matrix",
    ) -> None:  # fmt: skip
        if not finite(hessian):
            raise InputError(
                "E451", f"the Hessian of {printable(module)} holds a NaN or an infinity",
                where=Where(tensor=printable(module)),
                help="the model overflows on the calibration text: calibrate in bfloat16 or float32",
            )  # fmt: skip
        silent = dead_inputs(hessian)
        if bool(silent.all()):
            raise InputError(
                "E452", f"no calibration token reached {printable(module)}", where=Where(tensor=printable(module)),
                help="calibrate with more or other texts, or quantize this matrix with --method rtn",
            )  # fmt: skip
        self._diagonal = hessian.diagonal()
        if order == "group-aware" and (group < 1 or len(self._diagonal) % group):
            raise ValueError(
                f"group-aware order of {len(self._diagonal)} inputs needs a group size, not {group}"
            )
        self.hessian, self.dead = hessian, silent if dead is None else dead
        self.columns = order_of(self._diagonal, order, group).flip(0)
        self._order: Order = order
        self._group = group if order == "group-aware" else 0
        self._damp, self._dtype = damp, dtype
        self._sorted: Tensor | None = None

    def factor(self, k: float, *, last: bool = False) -> Factor:
        """Return the factor of (1 - k) H + k diag(H), damped.

        Args:
            last: no other amount will be asked for, so that nothing has to be kept.
        """
        used, unit = self._damp, None
        added = shift(self._diagonal, used)
        pivots = added.new_empty(0)
        with exact_products(), torch.no_grad():
            for used in islice(escalated(self._damp), ATTEMPTS):
                added = shift(self._diagonal, used)
                unit = _factored(self._reordered(last), k, added[self.columns])
                if unit is not None:
                    pivots = unit.diagonal().to(torch.float64, copy=True)
                    unit /= pivots.to(self._dtype)
                    break
        return Factor(
            self.hessian, self.columns, unit, pivots, added + k * self._diagonal.double(), self.dead, self._order,
            self._group, used, self._damp, k,
        )  # fmt: skip

    def _reordered(self, last: bool) -> Tensor:
        """Return a copy of the Hessian in the order of rounding."""
        if self._sorted is None:
            # Whole rows are copied both times: H is symmetric.
            rows = self.hessian.index_select(0, self.columns)
            rows = rows.T.contiguous()
            rows = rows.index_select(0, self.columns).to(self._dtype)
            if last:
                return rows
            self._sorted = rows
        return self._sorted.clone()


def _factored(matrix: Tensor, k: float, added: Tensor) -> Tensor | None:
    """Return the lower factor of a reordered Hessian, drawn and damped, or None where it has none; it is overwritten."""
    if k:
        diagonal = matrix.diagonal().clone()
        matrix *= 1 - k
        matrix.diagonal().copy_(diagonal)
    matrix.diagonal().add_(added.to(matrix.dtype))
    matrix = matrix.mT  # symmetric; column-major storage is factorised in place
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    # A NaN passes through the factorisation without a complaint.
    return matrix if int(info) == 0 and bool(torch.isfinite(matrix.diagonal()).all()) else None
