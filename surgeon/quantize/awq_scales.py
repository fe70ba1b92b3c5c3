"""Choosing the scales of one site: the power of the activations whose scaling leaves the smallest output error.

    s_j = mean|x_j|^r,   s <- s / sqrt(max s * min s),   r in {0, 1/20 .. 19/20}

and of these the one that minimises tr(D H D') with D = Q(W s) / s - W, the matrices rounded to nearest: inputs that are
large get more of the grid's resolution. Lin et al. 2023 (AWQ, arXiv 2306.00978, section 3.2, equations 4 and 5). There
the error is that of a block's output on stored activations; here it comes from second moments H, so nothing is kept
but these. Where several matrices read one vector, the relative errors of their parts (queries, keys, gates ...) count
alike, and experts within a part by their outputs before the gates.

Matrices are rounded as they will be, up to 3 bits with clipped ranges: under clipping other exponents are best. The
search looks at a sample of rows, which are independent given H; what it finds is accepted only if the error of all rows
becomes smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.formats.scheme import Scheme
from surgeon.quantize.grids import STORED, clips, grid, group_of, nearest, on_whole_zeros
from surgeon.quantize.output_error import energy

STEPS = 20
"""Exponents that are tried: 0, 1/20 .. 19/20."""
SMALLEST = 1e-4
"""Inputs smaller than this part of the largest count as that large: scales stay within four decimal places."""
ROWS = 512
"""Rows of all matrices of one part that the search looks at; an eighth of it where ranges are searched too."""
FEWEST_ROWS = 16
"""Rows of each matrix it looks at in any case."""


@dataclass(frozen=True)
class Reader:
    """One matrix that reads the vector.

    Attributes:
        part: what it is; errors are relative within a part.
        weight: [rows, in], float32.
        hessian: [in, in], sum of x x' over its tokens.
        scheme: of kind "int".
        code: storage code the scaled weights are rounded to before they are quantized.
        module: for messages.
    """

    part: str
    weight: Tensor
    hessian: Tensor
    scheme: Scheme
    code: str
    module: str


@dataclass(frozen=True)
class Found:
    """Scales [in] and the exponent they came from; ones and 0 where nothing is gained."""

    exponent: float
    scales: Tensor


def proposals(magnitude: Tensor, live: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield (r, scales float32 [in]), without scaling first.

    Args:
        magnitude: mean |x| of each input, float64 [in].
        live: bool [in], inputs that may be scaled; the others keep 1.
    """
    size = magnitude.double().clamp(min=SMALLEST * float(magnitude.max()))
    for step in range(STEPS):
        scales = torch.ones(len(size), dtype=torch.float64)
        if step and bool(live.any()):
            powers = size[live] ** (step / STEPS)
            scales[live] = powers / (powers.max() * powers.min()).sqrt()
        yield step / STEPS, scales.float()


def search(
    readers: Sequence[Reader], magnitude: Tensor, live: Tensor, scale_dtype: str, clip: bool | None = None
) -> Found:
    """Return the scales that leave the smallest error.

    Args:
        readers: every quantized matrix that reads the vector.
        magnitude, live: see `proposals`.
        scale_dtype: storage code of the grids' scales.
        clip: whether ranges are searched; None: up to 3 bits.
    """
    total = _totals(readers)
    best, smallest = None, math.inf
    for exponent, scales in proposals(magnitude, live):
        found = error(readers, scales, scale_dtype, clip=clip, total=total)
        if best is None or found < smallest:  # a NaN is never smaller
            best, smallest = Found(exponent, scales), found
    assert best is not None
    return best


def error(
    readers: Iterable[Reader], scales: Tensor, scale_dtype: str, *, clip: bool | None = None,
    total: dict[str, float] | None = None,
) -> float:  # fmt: skip
    """Return the relative output error of quantized matrices, the mean over their parts.

    Args:
        readers: the matrices; each is asked for once, so a generator keeps one at a time in memory.
        scales: float32 [in].
        clip: see `search`.
        total: tr(W H W') of each part, where it is known.
    """
    lost: dict[str, float] = {}
    held: dict[str, float] = {}
    for one in readers:
        rounded = _rounded(one, scales.to(one.weight.device), scale_dtype, clip)
        lost[one.part] = lost.get(one.part, 0.0) + energy(rounded.sub_(one.weight), one.hessian)
        if total is None:
            held[one.part] = held.get(one.part, 0.0) + energy(one.weight, one.hessian)
    held = held if total is None else total
    shares = [lost[part] / held[part] if held[part] > 0 else 0.0 for part in sorted(lost)]
    return sum(shares) / len(shares) if shares else 0.0


def sampled(weight: Tensor, matrices: int, clipped: bool) -> Tensor:
    """Return the rows of a matrix that the search looks at.

    Args:
        weight: [out, in].
        matrices: how many its part has.
        clipped: whether ranges are searched, which takes eighty roundings instead of one.
    """
    count = max(FEWEST_ROWS, (ROWS // 8 if clipped else ROWS) // max(1, matrices))
    if len(weight) <= count:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, count).round().long()].contiguous()


def _totals(readers: Iterable[Reader]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in readers:
        total[one.part] = total.get(one.part, 0.0) + energy(one.weight, one.hessian)
    return total


def _rounded(one: Reader, scales: Tensor, scale_dtype: str, clip: bool | None) -> Tensor:
    """Return Q(W s) / s, [rows, in]; infinities where the storage type overflows."""
    weight = one.weight * scales
    if one.code in ("F16", "BF16"):
        weight = weight.to(STORED[one.code]).float()
    if not bool(torch.isfinite(weight).all()):
        return torch.full_like(weight, math.inf)
    group = group_of(weight.shape[1], one.scheme, one.module)
    steps, zeros = grid(
        weight, one.scheme, clip=clips(one.scheme, clip), scale_dtype=scale_dtype, module=one.module
    )
    weight, whole = on_whole_zeros(weight, steps, zeros)
    steps, zeros, whole = steps[:, :, None], zeros[:, :, None].float(), whole[:, :, None].float()
    codes = nearest(weight.reshape(len(weight), -1, group), steps, whole, one.scheme.bits)
    return codes.sub_(zeros).mul_(steps).reshape(weight.shape).div_(scales)
