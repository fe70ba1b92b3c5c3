"""Codes for matrices that share their inputs, by GPTQ on the sums over calibration tokens, and what is said about them.

With enough tokens the Hessian is factorised once for all of them. With few it is drawn to its diagonal first
(`surgeon.quantize.shrinkage`); an expert that no token reached is rounded to nearest. With a shift of the target
(`surgeon.quantize.target_shift`) matrices that every token reaches make up for what was quantized before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.matrices import Matrix
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import gptq, rtn, shrinkage, target_shift
from surgeon.quantize.factor import Factor, Order, factorise
from surgeon.quantize.gptq import Record, quantize_with
from surgeon.quantize.grids import working
from surgeon.quantize.moments import Moments
from surgeon.quantize.observing import Inputs
from surgeon.quantize.output_error import energy

COMPARED_ROWS = 256
"""Outputs on which errors are put into proportion, and compared with plain rounding; all would cost as much as GPTQ itself."""

WORKED_ON = 1 << 26
"""Weights quantized at once: GPTQ holds about six float32 copies of them. Outputs do not depend on each other."""

STRIP = 256
"""Outputs looked at at once where a copy of a whole matrix is not wanted."""

PIECE = 1 << 22
"""Weights whose values are made at once."""


@dataclass(frozen=True)
class Options:
    """How matrices are quantized.

    Attributes:
        method: "rtn", or "gptq" for integers.
        order: in which GPTQ rounds inputs (`surgeon.quantize.factor.order_of`).
        damp: its relative damping.
        block: columns after which it brings the rest up to date.
        clip: search the range of each group; None: up to 3 bits.
        true_sequential: inside a layer too each matrix sees what the quantized ones before it give; None: in layers
            with integers of up to 3 bits.
        target_shift: GPTQ aims at the outputs of the original model instead of those of the original matrix.
    """

    method: str
    order: Order = "static-act"
    damp: float = 0.01
    block: int = 128
    clip: bool | None = None
    true_sequential: bool | None = None
    target_shift: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("rtn", "gptq"):
            raise UsageError(
                "E470", f'"{self.method}" is no method of quantizing layer by layer', help="rtn or gptq"
            )
        if self.order not in ("static-act", "group-aware", "none"):
            raise UsageError(
                "E470", f'GPTQ knows no order "{self.order}"', help="static-act, group-aware or none"
            )
        if not self.damp >= 0 or math.isinf(self.damp) or self.block < 1:
            raise UsageError("E470", f"a damping of {self.damp:g} and blocks of {self.block}",
                             help="damping is 0 or more, usually 0.01; a block has at least one column")  # fmt: skip
        if self.target_shift and (self.method != "gptq" or self.true_sequential):
            raise UsageError("E471", "the target shift belongs to GPTQ, layer by layer",
                             help="leave out true-sequential order, or the shift: both make up for the same errors")  # fmt: skip


@dataclass(frozen=True)
class Solved:
    """A quantized matrix and the record of it."""

    matrix: Matrix
    codes: Codes
    record: dict[str, Any]


Read = Callable[[Matrix], Tensor]
"""Gives a matrix [out, in], float32, on the device of its sums."""


def solve(
    matrices: Sequence[tuple[Matrix, Scheme]], inputs: Inputs, read: Read, options: Options, scale_dtype: str
) -> Iterator[Solved]:
    """Yield matrices with the same inputs in their order, quantized to integers by GPTQ.

    Args:
        matrices: of one module's inputs, each with a scheme of kind "int"; equal schemes, and equal groups, lie
            beside each other.
        inputs: sums of that module.
        read: gives weights.
        options: see there.
        scale_dtype: what scales are stored in.

    Raises:
        InputError: E450-E453 (`surgeon.quantize.gptq`); E452 when no token reached a matrix that is for all tokens.
    """
    first = matrices[0][0]
    tokens = inputs.tokens(first.module)
    if not tokens and not first.routed:
        raise InputError(
            "E452", f"no calibration token reached {printable(first.label)}", where=Where(tensor=printable(first.label)),
            help="calibrate with more or other texts, or quantize this matrix with --method rtn",
        )  # fmt: skip
    about: dict[str, Any] = {"tokens": tokens}
    if tokens and not inputs.divided(first.module):
        yield from _by_factor(matrices, inputs.whole(first.module), read, options, scale_dtype, about)
        return
    parts = train, held = inputs.moments(first.module)
    silent = not any(bool(part.hessian.diagonal().any()) for part in parts)
    if not tokens or (first.routed and silent):
        reason = "its inputs are zero for every token" if tokens else "no token reached it"
        for matrix, scheme in matrices:
            yield _unreached(matrix, scheme, read(matrix), scale_dtype, about, reason)
        return
    about = _tokens(about, parts)
    for scheme in dict.fromkeys(scheme for _, scheme in matrices):
        same = [matrix for matrix, its in matrices if its == scheme]
        if train.cross is not None and options.target_shift:
            yield from _few_shifted(same, scheme, train, held, read, options, scale_dtype, about)
        else:
            part = [(matrix, scheme) for matrix in same]
            yield from shrinkage.together([_few(part, inputs, read, options, scale_dtype)])[0]


def together(
    groups: Sequence[Sequence[tuple[Matrix, Scheme]]],
    inputs: Inputs,
    read: Read,
    options: Options,
    scale_dtype: str,
) -> list[list[Solved]]:
    """Return what `solve` yields for each of several groups, which `batchable` says yes to: rounded at the same time."""
    return shrinkage.together([_few(group, inputs, read, options, scale_dtype) for group in groups])


def batchable(group: Sequence[tuple[Matrix, Scheme]], inputs: Inputs, options: Options) -> bool:
    """Say whether matrices with the same inputs may be solved beside others: those of an expert that tokens reach."""
    first = group[0][0]
    if not first.routed or not inputs.tokens(first.module) or options.target_shift:
        return False
    alike = len({scheme for _, scheme in group}) == 1
    return alike and any(bool(part.hessian.diagonal().any()) for part in inputs.moments(first.module))


def effective(parts: Sequence[Moments]) -> float:
    """Return the effective number of tokens of sums that were taken apart."""
    squares, fourths = (sum(getattr(part, name) for part in parts) for name in ("squares", "fourths"))
    return squares**2 / fourths if fourths else 0.0


def _by_factor(
    matrices: Sequence[tuple[Matrix, Scheme]], whole: Moments, read: Read, options: Options, scale_dtype: str,
    about: dict[str, Any],
) -> Iterator[Solved]:  # fmt: skip
    """Quantize with the Hessian as it is, factorised once."""
    factor: Factor | None = None
    for matrix, scheme in matrices:
        group = gptq.group_of(matrix.columns, scheme, matrix.label)
        if factor is None or factor.group not in (0, group):
            factor = None  # the one before is as large as the Hessian
            factor = factorise(
                whole.hessian, order=options.order, group=group, damp=options.damp, module=matrix.label
            )
        weight = working(read(matrix), matrix.label)
        amount = 1.0 if options.target_shift and whole.cross is not None else None
        codes, record = _quantized(weight, factor, scheme, whole, options, scale_dtype, matrix.label, amount)
        yield Solved(
            matrix, codes, _record(weight, codes, record, whole.hessian, options, scale_dtype, about, amount)
        )


def _tokens(about: dict[str, Any], parts: Sequence[Moments]) -> dict[str, Any]:
    return about | {"effective_tokens": round(effective(parts), 3)}


def _few(
    group: Sequence[tuple[Matrix, Scheme]], inputs: Inputs, read: Read, options: Options, scale_dtype: str
) -> shrinkage.Task[list[Solved]]:
    """Quantize matrices with the same inputs and one scheme with a Hessian from few tokens, as a task."""
    first, scheme = group[0]
    train, held = inputs.moments(first.module)
    about = _tokens({"tokens": inputs.tokens(first.module)}, (train, held))
    weights = [read(matrix) for matrix, _ in group]
    how = shrinkage.How(
        scheme, scale_dtype, options.order, options.damp, options.block, options.clip, first.label
    )
    choice = yield from shrinkage.choosing(weights, train, held, how)
    whole = train.merged(held).hessian
    results = yield from shrinkage.coding(weights, whole, choice, how)
    about |= {"shrinkage_by": choice.how}
    return [
        Solved(matrix, codes, _record(weight, codes, record, whole, options, scale_dtype, about, None))
        for (matrix, _), weight, (codes, record) in zip(group, weights, results, strict=True)
    ]


def _few_shifted(
    matrices: Sequence[Matrix], scheme: Scheme, train: Moments, held: Moments, read: Read,
    options: Options, scale_dtype: str, about: dict[str, Any],
) -> Iterator[Solved]:  # fmt: skip
    weights = [working(read(matrix), matrix.label) for matrix in matrices]
    order, damp, block, clip, label = (
        options.order,
        options.damp,
        options.block,
        options.clip,
        matrices[0].label,
    )
    choice = shrinkage.choose(
        weights, train, held, scheme, scale_dtype=scale_dtype, order=order, damp=damp, block=block, clip=clip, module=label
    )  # fmt: skip
    whole = train.merged(held)
    amount, _ = target_shift.choose_amount(
        weights, train, held, scheme, scale_dtype=scale_dtype, k=choice.k, order=order, damp=damp, block=block, clip=clip,
        module=label,
    )  # fmt: skip
    group = gptq.group_of(len(whole.hessian), scheme, label)
    factor = factorise(whole.hessian, order=order, group=group, damp=damp, k=choice.k, module=label)
    about = about | {"shrinkage_by": choice.how}
    for matrix, weight in zip(matrices, weights, strict=True):
        codes, record = _quantized(weight, factor, scheme, whole, options, scale_dtype, matrix.label, amount)
        yield Solved(
            matrix, codes, _record(weight, codes, record, whole.hessian, options, scale_dtype, about, amount)
        )


def _quantized(
    weight: Tensor, factor: Factor, scheme: Scheme, whole: Moments, options: Options, scale_dtype: str, label: str,
    amount: float | None,
) -> tuple[Codes, Record]:  # fmt: skip
    """Quantize a matrix, a range of outputs after the other where it is very large."""
    step = max(1, WORKED_ON // weight.shape[1])
    found: list[tuple[Codes, Record]] = []
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        if amount:
            assert whole.cross is not None
            target = target_shift.shifted(rows, whole.cross, factor, amount)
        else:
            target = rows
        codes, record = quantize_with(
            target, factor, scheme, scale_dtype=scale_dtype, block=options.block, clip=options.clip,
            known_energy=math.nan, module=label,
        )  # fmt: skip
        found.append((codes, replace(record, error=math.nan, change=math.nan) if amount else record))
    return _joined(found)


def _joined(found: Sequence[tuple[Codes, Record]]) -> tuple[Codes, Record]:
    """Return the ranges of a matrix as one."""
    if len(found) == 1:
        return found[0]
    parts, records = [codes for codes, _ in found], [record for _, record in found]
    sums = {
        name: math.fsum(getattr(record, name) for record in records)
        for name in ("error", "damped_error", "change")
    }
    arrays = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")
    )
    worst = next((record for record in records if record.fallback), records[0])
    codes, scales, zeros = arrays
    return Codes(parts[0].scheme, codes, scales, zeros), replace(worst, **sums)


def _unreached(
    matrix: Matrix, scheme: Scheme, weight: Tensor, scale_dtype: str, about: dict[str, Any], reason: str
) -> Solved:
    codes = rtn.quantize(weight, scheme, scale_dtype=scale_dtype, clip=True, module=matrix.label)
    error = weight_error(by_rows(codes), weight)
    return Solved(
        matrix, codes, about | {"method": "rtn", "clipped": True, "fallback": reason, "weight_error": error}
    )


def _record(
    weight: Tensor, codes: Codes, record: Record, hessian: Tensor, options: Options, scale_dtype: str,
    about: dict[str, Any], amount: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return what is said of a matrix, as plain data; errors of outputs are those of some rows, the same for both methods."""
    rows = (
        torch.linspace(0, len(weight) - 1, min(len(weight), COMPARED_ROWS), device=weight.device)
        .round()
        .long()
    )
    some = weight.index_select(0, rows).float()
    plain = rtn.quantize(some, codes.scheme, scale_dtype=scale_dtype, clip=options.clip)
    at = rows.cpu().numpy()
    made = Codes(codes.scheme, codes.codes[at], codes.scales[at], codes.zeros[at])
    everything = energy(some, hessian)
    error, rounding = (
        max(0.0, energy(torch.from_numpy(one.values()).to(some).sub_(some), hessian)) / everything if everything > 0 else 0.0
        for one in (made, plain)
    )  # fmt: skip
    size = math.fsum(float(part.square().sum(1).sum(dtype=torch.float64)) for part in weight.split(STRIP))
    change = record.change / size if size > 0 else 0.0
    found: dict[str, Any] = about | {
        "method": record.method,
        "error": error,
        "rounding_error": rounding,
        "rounding_rows": len(rows),
        "damp": record.damp,
        "escalated": record.escalated,
        "dead_inputs": record.dead,
        "clipped": record.clipped,
        "shrinkage": record.shrinkage,
        "weight_error": weight_error(by_rows(codes), weight) if math.isnan(change) else change,
    }
    if record.fallback:
        found["fallback"] = record.fallback
    if amount is not None:
        found["target_shift"] = amount
    return found


def by_rows(codes: Codes) -> Iterator[np.ndarray]:
    """Yield what codes stand for, float32 [rows, in], a range of outputs after the other."""
    step = max(1, PIECE // codes.codes.shape[1])
    for start in range(0, len(codes.codes), step):
        rows = slice(start, start + step)
        yield Codes(codes.scheme, codes.codes[rows], codes.scales[rows], codes.zeros[rows]).values()


def pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a matrix [out, in] a range of rows after the other."""
    step = max(1, PIECE // values.shape[1])
    for start in range(0, len(values), step):
        yield values[start : start + step]


def weight_error(rows: Iterable[np.ndarray], weight: Tensor) -> float:
    """Return |Q - W|^2 / |W|^2 for the rows of Q [out, in], given range after range; 0 where W is zero."""
    start, error = 0, 0.0
    for values in rows:
        here = weight[start : start + len(values)]
        error += float((torch.from_numpy(values).to(here) - here).square().sum(dtype=torch.float64))
        start += len(values)
    total = math.fsum(float(part.square().sum(1).sum(dtype=torch.float64)) for part in weight.split(STRIP))
    return error / total if total > 0 else 0.0
