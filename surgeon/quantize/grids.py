"""Grids of whole numbers for groups of weights: scales and zero points, and rounding to them.

A code u in 0 .. n, n = 2^bits - 1, stands for (u - zero) * scale; every output row has one (scale, zero) for each
``group`` consecutive inputs. Symmetric: scale = 2 max|w| / n and zero = (n + 1) / 2, so that the largest positive weight
lies half a step above the last code. Asymmetric: from min(w, 0) to max(w, 0), so that zero is representable.

Files of llama.cpp have no zero points: an asymmetric group stores its smallest value m in float16, a multiple of the scale
or not. Then the range is min(w) to max(w), and "zero" is the fraction -m / scale. Their symmetric groups have the scale
-e / 2^(bits - 1), e the weight largest in magnitude, with its sign: code 0 is e itself, and steps are shorter than above.

Scales are rounded to the type they will be stored in before any code is computed: the error that is reported is
that of the file. Clipping tries the scale times 1.00, 0.99 .. 0.20 and keeps what leaves the smallest sum of squared
errors, as the search in the code of GPTQ does (Frantar et al. 2022, 2210.17323; there with exponent 2.4).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.formats.scheme import Codes, Scheme

STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "GGML": torch.float16}
"""Types scales are stored in; GGML: in float16, and so is the smallest value of an asymmetric group."""

SMALLEST = 1e-8
"""No scale is smaller: codes are quotients by it."""

SUBNORMAL = 2.0**-21
"""No scale of a file of llama.cpp is smaller in magnitude: float16 has three binary digits left there. ggml flushes none to zero."""

FINEST = 2.0**14
"""Steps in the magnitude of a smallest value stored in float16, at most."""

SHRUNK = tuple(1 - step / 100 for step in range(81))
"""Parts of the full range that clipping tries."""

PIECE = 1 << 17
"""Weights worked on at a time: a few float32 copies of a piece stay in the second-level cache."""

BITS = range(2, 9)


def clips(scheme: Scheme, clip: bool | None) -> bool:
    """Return whether to search for a smaller range: as asked, else for codes of up to 3 bits."""
    return scheme.bits <= 3 if clip is None else clip


def group_of(columns: int, scheme: Scheme, module: str = "the matrix") -> int:
    """Return how many inputs share a scale.

    Raises:
        InputError: E450 the inputs are not a multiple of the group.
    """
    if scheme.kind != "int" or scheme.bits not in BITS:
        raise ValueError(f"{scheme} is not a grid of 2 to 8 bits")
    group = scheme.group if scheme.group > 0 else columns
    if columns % group == 0:
        return group
    fits = [size for size in (128, 64, 32, 16) if columns % size == 0]
    raise InputError(
        "E450", f"{printable(module)} has {columns} inputs, which is not a multiple of the group size {group}",
        where=Where(tensor=printable(module)),
        help=f"use --group-size {fits[0] if fits else -1}" + ("" if fits else ", one scale a row"),
    )  # fmt: skip


def working(weight: Tensor, module: str = "the matrix") -> Tensor:
    """Return a weight matrix in the precision of the computation: float64 stays, all else becomes float32.

    Raises:
        InputError: E451 it holds a NaN or an infinity.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if not finite(weight):
        raise InputError(
            "E451", f"{printable(module)} holds a NaN or an infinity", where=Where(tensor=printable(module)),
            help="the checkpoint is damaged: surgeon verify names every such tensor",
        )  # fmt: skip
    return weight


def finite(matrix: Tensor) -> bool:
    """Say whether every entry is finite. A NaN or an infinity always reaches the sum, which is one fast pass; the sum
    of finite entries may overflow, so only where it has are entries looked at one by one."""
    return bool(torch.isfinite(matrix.sum())) or bool(torch.isfinite(matrix).all())


def grid(
    weight: Tensor, scheme: Scheme, *, clip: bool, scale_dtype: str, importance: Tensor | None = None,
    module: str = "the matrix",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the scales and zero points of a matrix.

    Args:
        weight: [out, in], float32 (any other float type is converted; float64 is kept).
        scheme: of kind "int"; in is a multiple of its group.
        clip: search for the range that leaves the least squared error, instead of the whole one.
        scale_dtype: of `STORED`, what scales are stored in.
        importance: [in], weight of an input's squared error in that search (mean of its squared activations).
        module: for messages.

    Returns:
        scales [out, groups] in the precision of the computation, already rounded to ``scale_dtype``;
        zeros uint8 [out, groups], or in the precision of the computation where smallest values are stored.

    Raises:
        InputError: E450 (`group_of`), E451 (`working`), E453 a scale is beyond ``scale_dtype``.
    """
    weight = working(weight, module)
    group = group_of(weight.shape[1], scheme, module)
    scales = weight.new_empty(weight.shape[0], weight.shape[1] // group)
    free = scale_dtype == "GGML" and not scheme.symmetric
    zeros = torch.empty(scales.shape, dtype=weight.dtype if free else torch.uint8, device=weight.device)
    if importance is not None:
        importance = importance.to(weight).reshape(-1, group)
    for rows in _pieces(weight):
        part = weight[rows].reshape(-1, scales.shape[1], group)
        low, high = part.amin(2), part.amax(2)
        if not free:
            low.clamp_(max=0)
            high.clamp_(min=0)
        if clip:
            found = _searched(part, low, high, scheme, scale_dtype, importance)
        else:
            found = _fitted(low, high, scheme, scale_dtype)
        scales[rows], zeros[rows] = found[0], found[1].to(zeros.dtype)
    if not bool(torch.isfinite(scales).all() and torch.isfinite(zeros).all()):
        raise InputError(
            "E453", f"{printable(module)} needs scales beyond the range of {'F16' if scale_dtype == 'GGML' else scale_dtype}",
            where=Where(tensor=printable(module)),
            help="keep this matrix as it is, or store scales in bfloat16",
        )  # fmt: skip
    return scales, zeros


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Return the codes nearest to weights, as floats; all arguments broadcast. Ties go to the even multiple."""
    return torch.clamp_((weight / scales).round_().add_(zeros), 0, 2**bits - 1)


def on_whole_zeros(weight: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and zero points that have the same codes and the same errors on a grid of whole zero points.

    A fraction of a zero point moves all values of its group alike, so weights moved the other way are as far from them.

    Args:
        weight: [out, in].
        scales, zeros: [out, groups], as `grid` makes them.
    """
    if not zeros.is_floating_point():
        return weight, zeros
    whole = zeros.floor()
    moved = weight.reshape(len(weight), zeros.shape[1], -1) + ((zeros - whole) * scales)[..., None]
    return moved.reshape(weight.shape), whole


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Codes:
    """Return the nearest codes of a matrix [out, in] on a grid [out, groups] as `grid` makes it."""
    weight = working(weight)
    group = group_of(weight.shape[1], scheme)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in _pieces(weight):
        part, whole = on_whole_zeros(weight[rows], scales[rows], zeros[rows])
        part = part.reshape(-1, scales.shape[1], group)
        found = nearest(part, scales[rows, :, None], whole[..., None], scheme.bits)
        codes[rows] = found.reshape(-1, weight.shape[1]).to(torch.uint8)
    return as_codes(codes, scales, zeros, scheme)


def as_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, loss: float = float("nan")
) -> Codes:
    """Return codes [out, in] and their grid as what formats pack."""
    return Codes(scheme, codes.cpu().numpy(), scales.float().cpu().numpy(), zeros.cpu().numpy(), loss)


def _pieces(weight: Tensor) -> Iterator[slice]:
    """Yield ranges of rows. A GPU takes more at once: its cost is in the launches."""
    elements = PIECE if weight.device.type == "cpu" else PIECE << 7
    step = max(1, elements // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _fitted(
    low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: str, part: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points (as floats) of groups from ``low`` <= 0 to ``high`` >= 0, shrunk to ``part``."""
    top = 2**scheme.bits - 1
    if scale_dtype == "GGML":
        return (_fitted_to_extreme if scheme.symmetric else _fitted_freely)(low, high, top, part)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    stored = STORED[scale_dtype]
    # A subnormal scale has few digits left, and some readers flush it to zero.
    floor = max(SMALLEST, torch.finfo(stored).tiny)
    scales = (span * (part / top)).clamp_(min=floor).to(stored).to(low.dtype)
    scales = torch.where(span == 0, 1.0, scales)
    if scheme.symmetric:
        return scales, torch.full_like(scales, (top + 1) // 2)
    return scales, (low * -part / scales).round_().clamp_(0, top)


def _fitted_to_extreme(low: Tensor, high: Tensor, top: int, part: float) -> tuple[Tensor, Tensor]:
    """As `_fitted` for symmetric groups of llama.cpp, whose scale has the sign that gives their largest weight the code 0."""
    half = (top + 1) // 2
    size = torch.maximum(-low, high).mul_(part / half).clamp_(min=SUBNORMAL).to(torch.float16).to(low.dtype)
    scales = torch.where(high > -low, -size, size)
    return scales, torch.full_like(scales, half)


def _fitted_freely(low: Tensor, high: Tensor, top: int, part: float) -> tuple[Tensor, Tensor]:
    """As `_fitted` for groups that store their smallest value in float16, shrunk towards their middle.

    The scale is fitted to what the rounded smallest value leaves to reach.
    """
    cut = (high - low) * ((1 - part) / 2)
    smallest = (low + cut).to(torch.float16).to(low.dtype)
    # Steps finer than the smallest value's own digits gain nothing and would need zero points of many digits.
    floor = (smallest.abs() / FINEST).clamp_(min=SUBNORMAL)
    scales = torch.maximum((high - cut - smallest) / top, floor).to(torch.float16).to(low.dtype)
    return scales, -smallest / scales


def _searched(
    part: Tensor, low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: str, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `_fitted` for the weights ``part`` [rows, groups, group], with the best of `SHRUNK` for each group."""
    best, space = None, torch.empty_like(part)
    scales, zeros = _fitted(low, high, scheme, scale_dtype)
    smallest = 1.0 if importance is None else importance.amin(1)
    for fraction in SHRUNK:
        tried, middle = _fitted(low, high, scheme, scale_dtype, fraction)
        if best is not None and not bool((_clipped(low, high, tried, scheme) * smallest < best).any()):
            break  # what is cut off at the ends alone is worse, and only grows from here
        total = _squared_error(part, tried[..., None], middle[..., None], scheme, importance, space)
        if best is None:
            best = total
            continue
        better = total < best
        best = torch.where(better, total, best)
        scales, zeros = torch.where(better, tried, scales), torch.where(better, middle, zeros)
    return scales, zeros


def _squared_error(
    part: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, importance: Tensor | None, space: Tensor
) -> Tensor:
    """Return the sum of squared errors of each group. As `nearest`, in fewer passes: the search spends its time here."""
    top = 2**scheme.bits - 1
    torch.div(part, scales, out=space)
    if scheme.symmetric:
        space.round_().clamp_(-((top + 1) // 2), top // 2)
    else:
        whole = zeros.floor()
        space.add_(zeros - whole).round_().add_(whole).clamp_(0, top).sub_(zeros)
    torch.addcmul(part, space, scales, value=-1, out=space).square_()
    return (space if importance is None else space.mul_(importance)).sum(2)


def _clipped(low: Tensor, high: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return a bound from below of the squared error of the extremes alone."""
    if scheme.symmetric:
        beyond = torch.maximum(-low, high) - 2 ** (scheme.bits - 1) * scales.abs()
        return beyond.clamp_(min=0).square_()
    # The grid is shorter than the span by so much, shared by the two ends in some way: at best in halves.
    beyond = (high - low) - (2**scheme.bits - 1) * scales
    return beyond.clamp_(min=0).square_() / 2
