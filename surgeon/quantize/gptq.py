"""GPTQ: rounding one input after the other, each time letting the inputs still to come make up for the error.

For W [out, in] and H = sum of x x' the error of the outputs is ||(Q - W) X||^2 = tr((Q - W) H (Q - W)')
(Frantar et al. 2022, 2210.17323). The paper works with the factor of the inverse, U'U = H^-1. Written with a factor of
H itself it is Babai's nearest plane (Chen et al. 2025, 2507.18553) and takes one factorisation and no inverse: with the
inputs in reverse order and H = L L', L lower triangular, the error is ||(Q - W) L||^2, and column c of that product,

    (Q_c - W_c) L_cc + sum_{j > c} (Q_j - W_j) L_jc,

depends on the columns from c on only. So from the last column to the first, Q_c is what the grid has nearest to

    W_c - sum_{j > c} (Q_j - W_j) L_jc / L_cc,

which are the codes of the paper's recursion. What is left of column c, times L_cc, is its part of the error: the
sum of their squares is tr((Q - W) H (Q - W)') with the damped H, exactly.

Grids belong to groups of inputs in their original order and are fixed before anything is rounded (static groups):
whatever the order of rounding, nothing but codes, scales and zero points needs to be stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from surgeon.calibrate.damping import dead_inputs, escalated, exact_products, shift
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import rtn
from surgeon.quantize.columns import runner
from surgeon.quantize.grids import as_codes, clips, grid, group_of, working
from surgeon.quantize.output_error import energy, relative

Order = Literal["static-act", "group-aware", "none"]
"""Which inputs are rounded first: those with most energy; the same, but group after group; as they come."""

ATTEMPTS = 4
"""Factorisations tried: with the damping as given, then ten times more each time."""

STRIP = 256
"""Outputs that are brought into the order of rounding at once."""


@dataclass(frozen=True)
class Factor:
    """A Hessian ready for the matrices that share it.

    Attributes:
        hessian: [in, in], as it was given.
        columns: int64 [in], the input at each place; places are rounded from the last to the first.
        unit: [in, in], L with every column divided by its diagonal; None where H could not be factorised.
        pivots: float64 [in], the diagonal of L.
        shift: float64 [in], what damping added, by input.
        dead: bool [in], inputs that were zero for every token: their weights become zero.
        order: as asked.
        group: group size the order was made for; 0 where it does not matter.
        damp: relative damping that was used.
        asked: relative damping that was asked for.
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


@dataclass(frozen=True)
class Record:
    """How a matrix was quantized, for the journal.

    Attributes:
        method: "gptq", or "rtn" after a fallback.
        order: of rounding.
        damp: relative damping that was used.
        escalated: it is more than was asked for.
        dead: inputs that no token reached; their weights are zero now.
        clipped: the range of the grid was searched.
        error: tr((Q - W) H (Q - W)') on the undamped Hessian.
        damped_error: the same on the damped one, which is what was minimised; NaN after a fallback.
        energy: tr(W H W').
        fallback: why the matrix was rounded to nearest instead; "" where it was not.
        shrinkage: how far the Hessian was drawn to its diagonal (`surgeon.quantize.shrinkage`).
    """

    method: str
    order: Order
    damp: float
    escalated: bool
    dead: int
    clipped: bool
    error: float
    damped_error: float
    energy: float
    fallback: str = ""
    shrinkage: float = 0.0


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
    hessian: Tensor, *, order: Order = "static-act", group: int = 0, damp: float = 0.01,
    dtype: torch.dtype = torch.float32, dead: Tensor | None = None, module: str = "the matrix",
) -> Factor:  # fmt: skip
    """Return what all matrices with these inputs need; one factorisation serves any number of them, and any width.

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
    diagonal = hessian.diagonal()
    if not _finite(hessian):
        raise InputError(
            "E451", f"the Hessian of {printable(module)} holds a NaN or an infinity",
            where=Where(tensor=printable(module)),
            help="the model overflows on the calibration text: calibrate in bfloat16 or float32",
        )  # fmt: skip
    silent = dead_inputs(hessian)
    dead = silent if dead is None else dead
    if bool(silent.all()):
        raise InputError(
            "E452", f"no calibration token reached {printable(module)}", where=Where(tensor=printable(module)),
            help="calibrate with more or other texts, or quantize this matrix with --method rtn",
        )  # fmt: skip
    if order == "group-aware" and (group < 1 or len(diagonal) % group):
        raise ValueError(f"group-aware order of {len(diagonal)} inputs needs a group size, not {group}")
    columns = order_of(diagonal, order, group).flip(0)
    added, used, unit = shift(diagonal, damp), damp, None
    pivots = added.new_empty(0)
    with exact_products(), torch.no_grad():
        for used in islice(escalated(damp), ATTEMPTS):
            added = shift(diagonal, used)
            unit = _factor(hessian, columns, added, dtype)
            if unit is not None:
                pivots = unit.diagonal().to(torch.float64, copy=True)
                unit /= pivots.to(dtype)
                break
    return Factor(
        hessian, columns, unit, pivots, added, dead, order, group if order == "group-aware" else 0, used, damp
    )


def _finite(matrix: Tensor) -> bool:
    """Say whether every entry is finite. A NaN or an infinity always reaches the sum, which is one fast pass; the sum
    of finite entries may overflow, so only where it has are entries looked at one by one."""
    return bool(torch.isfinite(matrix.sum())) or bool(torch.isfinite(matrix).all())


def _factor(hessian: Tensor, columns: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the lower factor of the damped and reordered Hessian, or None where it has none."""
    matrix = hessian.index_select(0, columns).index_select(1, columns).to(dtype)
    matrix.diagonal().add_(added[columns].to(dtype))
    matrix = matrix.mT  # symmetric; column-major storage is factorised in place
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    # A NaN passes through the factorisation without a complaint.
    return matrix if int(info) == 0 and bool(torch.isfinite(matrix.diagonal()).all()) else None


def quantize(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, scale_dtype: str, order: Order = "static-act",
    damp: float = 0.01, block: int = 128, clip: bool | None = None, module: str = "the matrix",
) -> tuple[Codes, Record]:  # fmt: skip
    """Return the codes of one matrix [out, in] and how they were found; arguments as of the two steps it consists of,
    `factorise` and `quantize_with`."""
    weight = working(weight, module)
    group = group_of(weight.shape[1], scheme, module)
    factor = factorise(hessian, order=order, group=group, damp=damp, dtype=weight.dtype, module=module)
    return quantize_with(
        weight, factor, scheme, scale_dtype=scale_dtype, block=block, clip=clip, module=module
    )


def quantize_with(
    weight: Tensor, factor: Factor, scheme: Scheme, *, scale_dtype: str, block: int = 128, clip: bool | None = None,
    known_energy: float | None = None, given: tuple[Tensor, Tensor] | None = None, module: str = "the matrix",
) -> tuple[Codes, Record]:  # fmt: skip
    """Return the codes of one matrix and how they were found.

    Args:
        weight: [out, in], on the device of the factor; any float type.
        factor: of its Hessian.
        scheme: of kind "int".
        scale_dtype: "F16", "BF16" or "F32", what scales are stored in.
        block: columns after which the rest is brought up to date by a product; no effect on the result
            but for rounding.
        clip: search the range of each group; None: up to 3 bits.
        known_energy: tr(W H W') where it is known already: it is the same for every scheme.
        given: (scales, zeros) to use as they are, instead of a grid made from the weights.
        module: for messages.

    Raises:
        InputError: E450, E451, E453 (see `surgeon.quantize.grids`).
    """
    exact = working(weight, module)
    group = group_of(weight.shape[1], scheme, module)
    if weight.shape[1] != len(factor.columns) or factor.group not in (0, group):
        raise ValueError(
            f"{module}: {tuple(weight.shape)} in groups of {group} and a factor made for another"
        )
    clipped = clips(scheme, clip) and given is None
    dead = int(factor.dead.sum())
    with exact_products(), torch.no_grad():
        total = energy(exact, factor.hessian) if known_energy is None else known_energy
        reason = f"the Hessian is not positive definite, even with damping {factor.damp:g}"
        if factor.unit is not None:
            live = exact.masked_fill(factor.dead, 0) if dead else exact
            scales, zeros = given or grid(live, scheme, clip=clipped, scale_dtype=scale_dtype, module=module)
            original = _ordered(live, factor.columns)
            del (
                exact,
                live,
            )  # a matrix of its own where the weights are bfloat16; two of them stay from here on
            codes, error, damped_error = _rounded(original, factor, scales, zeros, scheme.bits, group, block)
            if math.isfinite(damped_error):
                codes = as_codes(codes, scales, zeros, scheme, error / total if total > 0 else 0.0)
                raised = factor.damp != factor.asked
                return codes, Record(
                    "gptq", factor.order, factor.damp, raised, dead, clipped, error, damped_error, total
                )
            reason = "the corrections grew without bound"
        codes = rtn.quantize(weight, scheme, scale_dtype=scale_dtype, clip=clip, module=module)
        codes.loss = relative(codes, weight, factor.hessian, total)
        return codes, Record(
            "rtn", factor.order, factor.damp, True, 0, clips(scheme, clip), codes.loss * total, math.nan, total, reason
        )  # fmt: skip


def _ordered(weight: Tensor, columns: Tensor) -> Tensor:
    """Return a matrix [out, in] as [in, out], inputs in the order of their places.

    Inputs become rows: all that follows then runs along the outputs, which lie side by side.
    """
    result = weight.new_empty(weight.shape[1], weight.shape[0])
    for start in range(0, len(weight), STRIP):
        rows = weight[start : start + STRIP]
        result[:, start : start + len(rows)] = rows.index_select(1, columns).T
    return result


def _rounded(
    original: Tensor, factor: Factor, scales: Tensor, zeros: Tensor, bits: int, group: int, block: int
) -> tuple[Tensor, float, float]:
    """Return codes [out, in] in the order of the model, and the error without and with damping.

    Args:
        original: [in, out], as `_ordered` returns it.
    """
    assert factor.unit is not None
    columns, unit = factor.columns, factor.unit
    work = original.clone()
    scales, zeros = scales.to(original).T.contiguous(), zeros.to(original).T.contiguous()
    groups = columns // group
    codes = torch.empty(original.shape, dtype=torch.uint8, device=original.device)
    change = torch.empty_like(original[:block])
    sweep = runner(original)
    damped_error = from_damping = 0.0
    for stop in range(len(columns), 0, -block):
        start = max(0, stop - block)
        here, moved = slice(start, stop), change[: stop - start]
        own = unit[here, here].contiguous()
        sweep(work[here], original[here], own, scales, zeros, groups[here], bits, codes[here], moved)
        if start:
            work[:start].addmm_(unit[here, :start].T, moved, alpha=-1)
        damped_error += float(_norms(work[here]) @ factor.pivots[here].square())
        from_damping += float(_norms(moved) @ factor.shift[columns[here]])
    restored = codes.index_select(0, torch.argsort(columns)).T.contiguous()
    return restored, max(0.0, damped_error - from_damping), damped_error


def _norms(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row, float64."""
    return rows.square().sum(1, dtype=torch.float64)
