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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.calibrate.damping import exact_products
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import rtn
from surgeon.quantize.columns import runner, stacked_sweep
from surgeon.quantize.factor import Factor, Order, factorise
from surgeon.quantize.grids import as_codes, clips, grid, group_of, on_whole_zeros, working
from surgeon.quantize.output_error import energy, error

STRIP = 256
"""Outputs that are brought into the order of rounding at once."""


@dataclass(frozen=True)
class Job:
    """A matrix that is ready to be rounded.

    Attributes:
        original: [in, out], as `_ordered` returns it, on a grid of whole zero points.
        factor: with a factorisation.
        scales, zeros: [out, groups], whole zero points.
        bits, group, block: of a code; inputs that share a scale; columns after which the rest is brought up to date.
    """

    original: Tensor
    factor: Factor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    block: int


@dataclass(frozen=True)
class Rounded:
    """What became of a `Job`.

    Attributes:
        codes: uint8 [out, in], inputs in the order of the model.
        error: tr((Q - W) H (Q - W)') on the Hessian as it was given; NaN where it was drawn all the way to its diagonal.
        damped_error: the same on the damped and drawn one.
        change: ||Q - W||^2, of the live weights.
    """

    codes: Tensor
    error: float
    damped_error: float
    change: float


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
        error: tr((Q - W) H (Q - W)') on the undamped Hessian; NaN where that was not asked for.
        damped_error: the same on the damped and drawn one, which is what was minimised; NaN after a fallback.
        energy: tr(W H W'); NaN where that was not asked for.
        fallback: why the matrix was rounded to nearest instead; "" where it was not.
        shrinkage: how far the Hessian was drawn to its diagonal (`surgeon.quantize.shrinkage`).
        change: ||Q - W||^2; NaN after a fallback.
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
    change: float = math.nan


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
        scale_dtype: of `surgeon.quantize.grids.STORED`, what scales are stored in.
        block: columns after which the rest is brought up to date by a product; no effect on the result
            but for rounding.
        clip: search the range of each group; None: up to 3 bits.
        known_energy: tr(W H W') where it is known already: it is the same for every scheme; NaN: errors need not be
            put into proportion, which costs as much as the rounding itself.
        given: (scales, zeros) to use as they are, instead of a grid made from the weights.
        module: for messages.

    Raises:
        InputError: E450, E451, E453 (see `surgeon.quantize.grids`).
    """
    with torch.no_grad():
        total = energy(working(weight, module), factor.hessian) if known_energy is None else known_energy
    job, grids = prepared(
        weight, factor, scheme, scale_dtype=scale_dtype, block=block, clip=clip, given=given, module=module
    )
    made = None if job is None else rounded(job)
    return finished(
        made, grids, weight, factor, scheme, scale_dtype=scale_dtype, clip=clip, given=given is not None,
        total=total, module=module,
    )  # fmt: skip


def prepared(
    weight: Tensor, factor: Factor, scheme: Scheme, *, scale_dtype: str, block: int = 128, clip: bool | None = None,
    given: tuple[Tensor, Tensor] | None = None, module: str = "the matrix",
) -> tuple[Job | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Return a matrix ready to be rounded, and its grid (scales, zeros); nothing where its Hessian has no factor.

    Arguments as of `quantize_with`, which is `finished` of `rounded` of this.
    """
    exact = working(weight, module)
    group = group_of(weight.shape[1], scheme, module)
    if weight.shape[1] != len(factor.columns) or factor.group not in (0, group):
        raise ValueError(
            f"{module}: {tuple(weight.shape)} in groups of {group} and a factor made for another"
        )
    if factor.unit is None:
        return None, None
    with exact_products(), torch.no_grad():
        live = exact.masked_fill(factor.dead, 0) if bool(factor.dead.any()) else exact
        clipped = clips(scheme, clip) and given is None
        scales, zeros = given or grid(live, scheme, clip=clipped, scale_dtype=scale_dtype, module=module)
        moved, whole = on_whole_zeros(live, scales, zeros)
        return Job(_ordered(moved, factor.columns), factor, scales, whole, scheme.bits, group, block), (
            scales,
            zeros,
        )


def finished(
    made: Rounded | None, grids: tuple[Tensor, Tensor] | None, weight: Tensor, factor: Factor, scheme: Scheme, *,
    scale_dtype: str, clip: bool | None = None, given: bool = False, total: float = math.nan,
    module: str = "the matrix",
) -> tuple[Codes, Record]:  # fmt: skip
    """Return codes and record of a matrix that was rounded, or rounded to nearest where that went wrong.

    Args:
        made, grids: the result of its job, and its grid; None where its Hessian has no factor.
        given: the grid was not made from the weights.
        total: tr(W H W'); NaN where errors are not asked for beyond what comes by itself.
    """
    reason = f"the Hessian is not positive definite, even with damping {factor.damp:g}"
    if made is not None and grids is not None:
        if math.isfinite(made.damped_error):
            codes = as_codes(made.codes, *grids, scheme)
            lost, change = made.error, made.change
            if math.isnan(lost) and not math.isnan(total):
                lost = error(codes, weight, factor.hessian)
            codes.loss = _share(lost, total)
            if bool(factor.dead.any()):  # their weights are gone
                change += float(weight[:, factor.dead].float().square().sum(dtype=torch.float64))
            return codes, Record(
                "gptq", factor.order, factor.damp, factor.damp != factor.asked, int(factor.dead.sum()),
                clips(scheme, clip) and not given, lost, made.damped_error, total, shrinkage=factor.k, change=change,
            )  # fmt: skip
        reason = "the corrections grew without bound"
    codes = rtn.quantize(weight, scheme, scale_dtype=scale_dtype, clip=clip, module=module)
    lost = math.nan if math.isnan(total) else error(codes, weight, factor.hessian)
    codes.loss = _share(lost, total)
    return codes, Record(
        "rtn", factor.order, factor.damp, True, 0, clips(scheme, clip), lost, math.nan, total, reason, factor.k
    )  # fmt: skip


def _share(error: float, total: float) -> float:
    return math.nan if math.isnan(total) else error / total if total > 0 else 0.0


def _ordered(weight: Tensor, columns: Tensor) -> Tensor:
    """Return a matrix [out, in] as [in, out], inputs in the order of their places.

    Inputs become rows: all that follows then runs along the outputs, which lie side by side.
    """
    result = weight.new_empty(weight.shape[1], weight.shape[0])
    for start in range(0, len(weight), STRIP):
        rows = weight[start : start + STRIP]
        result[:, start : start + len(rows)] = rows.index_select(1, columns).T
    return result


def rounded(job: Job) -> Rounded:
    """Round one matrix."""
    return rounded_together([job])[0]


def rounded_together(jobs: Sequence[Job], *, stack: bool | None = None) -> list[Rounded]:
    """Round matrices, each with a Hessian of its own; the bits are those of rounding one after the other.

    Args:
        stack: go through the columns of all matrices of one shape at the same time; None: on GPUs, where a step
            costs as much for one matrix as for many. A CPU is faster with one at a time in its cache.
    """
    found: dict[int, Rounded] = {}
    alike: dict[tuple, list[int]] = {}
    for place, job in enumerate(jobs):
        wanted = job.original.device.type != "cpu" if stack is None else stack
        key = (job.original.shape, job.original.dtype, job.bits, job.group, job.block, job.original.device)
        alike.setdefault(key if wanted else (place,), []).append(place)
    for places in alike.values():
        made = _rounded([jobs[place] for place in places])
        found |= dict(zip(places, made, strict=True))
    return [found[place] for place in range(len(jobs))]


def _rounded(jobs: Sequence[Job]) -> list[Rounded]:
    """Round matrices of one shape, block by block: columns of all of them together, products one by one."""
    first = jobs[0]
    originals = [job.original for job in jobs]
    work = [original.clone() for original in originals]
    grids = [
        [part.to(o).T.contiguous() for part in (j.scales, j.zeros)]
        for o, j in zip(originals, jobs, strict=True)
    ]
    groups = [job.factor.columns // job.group for job in jobs]
    codes = [torch.empty(o.shape, dtype=torch.uint8, device=o.device) for o in originals]
    moved = [torch.empty_like(o[: first.block]) for o in originals]
    sums = [torch.zeros(3, dtype=torch.float64, device=o.device) for o in originals]
    with exact_products(), torch.no_grad():
        for stop in range(len(first.original), 0, -first.block):
            start = max(0, stop - first.block)
            here = slice(start, stop)
            units = [_unit(job)[here, here].contiguous() for job in jobs]
            blocks = [
                (w[here], o[here], own, *g, n[here], first.bits, c[here], m[: stop - start])
                for w, o, own, g, n, c, m in zip(
                    work, originals, units, grids, groups, codes, moved, strict=True
                )
            ]
            if len(jobs) == 1:
                runner(first.original)(*blocks[0])
            else:
                stacked_sweep(blocks)
            for place, job in enumerate(jobs):
                change, factor = moved[place][: stop - start], job.factor
                if start:
                    work[place][:start].addmm_(_unit(job)[here, :start].T, change, alpha=-1)
                own = _norms(change)
                sums[place][0] += _norms(work[place][here]) @ factor.pivots[here].square()
                sums[place][1] += own @ factor.shift[factor.columns[here]]
                sums[place][2] += own.sum()
    found = []
    for job, made, total in zip(jobs, codes, sums, strict=True):
        damped_error, added, change = total.tolist()
        factor = job.factor
        lost = max(0.0, damped_error - added) / (1 - factor.k) if factor.k < 1 else math.nan
        restored = made.index_select(0, torch.argsort(factor.columns)).T.contiguous()
        found.append(Rounded(restored, lost, damped_error, change))
    return found


def _unit(job: Job) -> Tensor:
    assert job.factor.unit is not None
    return job.factor.unit


def _norms(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row, float64; summed in the precision of the rows, which is twice as fast."""
    return rows.square().sum(1).double()
