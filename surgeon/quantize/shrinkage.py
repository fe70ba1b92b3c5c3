"""Hessians from few tokens, drawn to their diagonal.

With fewer tokens than inputs GPTQ fits the tokens it has seen and is worse than rounding to nearest on others.
H_k = (1 - k) H + k diag(H) goes from GPTQ (k = 0) to rounding to nearest (k = 1: inputs are tied to none). k is chosen
on samples held out, for all matrices with the same inputs together; k = 1 is among the choices, so what was chosen is
never worse there than rounding to nearest on the same grid. The codes are then made with all tokens.
Where nothing can be held out, k = (in / (tokens + in))^2. Tokens are counted as `surgeon.quantize.moments` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surgeon.calibrate.damping import dead_inputs
from surgeon.formats.scheme import Codes, Scheme
from surgeon.quantize import rtn
from surgeon.quantize.gptq import Order, Record, factorise, quantize_with
from surgeon.quantize.grids import clips, grid, group_of, round_to_grid, working
from surgeon.quantize.moments import Moments
from surgeon.quantize.output_error import energy, relative

MENU = (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)
ENOUGH = 4
"""Effective tokens for each input from which the Hessian is taken as it is."""

FEW = 8
"""Effective tokens held out below which chance decides among k: none under the closed form is tried then."""


@dataclass(frozen=True)
class Choice:
    """How far a Hessian is drawn to its diagonal.

    Attributes:
        k: 0 not at all, 1 all the way.
        how: "enough tokens", "hold-out", "closed form" or "no tokens".
        count: effective number of tokens, all samples.
        errors: for each k that was tried, sum over the matrices of tr((Q - W) H (Q - W)') on the samples held out.
    """

    k: float
    how: Literal["enough tokens", "hold-out", "closed form", "no tokens"]
    count: float
    errors: dict[float, float]


def closed_form(inputs: int, count: float) -> float:
    """Return k from the number of inputs and the effective number of tokens: 1 for none, 0 for very many."""
    return (inputs / (count + inputs)) ** 2


def shrunk(hessian: Tensor, k: float) -> Tensor:
    """Return (1 - k) H + k diag(H); the argument itself for k = 0."""
    if k == 0:
        return hessian
    result = hessian * (1 - k)
    result.diagonal().copy_(hessian.diagonal())
    return result


def choose(
    weights: Sequence[Tensor], train: Moments, held: Moments, scheme: Scheme, *, scale_dtype: str,
    order: Order = "static-act", damp: float = 0.01, block: int = 128, clip: bool | None = None,
    menu: Sequence[float] = MENU, module: str = "the matrix",
) -> Choice:  # fmt: skip
    """Return how far to draw the Hessian of matrices that share their inputs to its diagonal.

    Args:
        weights: matrices [out, in].
        train: sums over three quarters of the samples.
        held: sums over the others (`surgeon.quantize.moments.held_out`).
        menu: values of k to try; where few tokens are held out (`FEW`), those from the closed form on, and it.
        scheme, scale_dtype, order, damp, block, clip, module: as `surgeon.quantize.gptq.quantize` will get them.
    """
    inputs = len(train.hessian)
    whole = train.merged(held)
    count = whole.count
    if count == 0:
        return Choice(1.0, "no tokens", 0.0, {})
    if count >= ENOUGH * inputs:
        return Choice(0.0, "enough tokens", count, {})
    if not train.hessian.diagonal().any() or not held.hessian.diagonal().any():
        return Choice(closed_form(inputs, count), "closed form", count, {})
    dead = dead_inputs(whole.hessian)
    group = group_of(inputs, scheme, module)
    # The grid is the same for every k: rounding to nearest differs from the others in nothing else.
    live = [working(weight, module).masked_fill(dead, 0) for weight in weights]
    grids = [
        grid(weight, scheme, clip=clips(scheme, clip), scale_dtype=scale_dtype, module=module)
        for weight in live
    ]
    least = closed_form(inputs, count)
    tried = menu if held.count >= FEW else sorted({least, *(k for k in menu if k >= least)})
    errors = {}
    for k in tried:
        if k == 1:
            found = [round_to_grid(weight, *made, scheme) for weight, made in zip(live, grids, strict=True)]
        else:
            factor = factorise(
                shrunk(train.hessian, k), order=order, group=group, damp=damp, dead=dead, module=module
            )
            found = [
                quantize_with(
                    weight, factor, scheme, scale_dtype=scale_dtype, block=block, given=made, known_energy=1.0, module=module
                )[0]
                for weight, made in zip(live, grids, strict=True)
            ]  # fmt: skip
        errors[k] = sum(_error(codes, weight, held) for codes, weight in zip(found, live, strict=True))
    return Choice(min(errors, key=lambda k: (errors[k], -k)), "hold-out", count, errors)


def quantize(
    weights: Sequence[Tensor], train: Moments, held: Moments, scheme: Scheme, *, scale_dtype: str,
    order: Order = "static-act", damp: float = 0.01, block: int = 128, clip: bool | None = None,
    module: str = "the matrix",
) -> tuple[list[tuple[Codes, Record]], Choice]:  # fmt: skip
    """Choose k, then quantize all matrices with all tokens; arguments as of `choose`.

    Without a token all are rounded to nearest. Errors are on the Hessian of all tokens as it is, not as it was drawn.
    """
    choice = choose(
        weights, train, held, scheme, scale_dtype=scale_dtype, order=order, damp=damp, block=block, clip=clip,
        module=module,
    )  # fmt: skip
    if choice.how == "no tokens":
        clipped = clips(scheme, clip)
        unknown = float("nan")
        record = Record(
            "rtn", order, damp, False, 0, clipped, unknown, unknown, unknown, "no token reached it", 1.0
        )
        return [
            (rtn.quantize(weight, scheme, scale_dtype=scale_dtype, clip=clip, module=module), record)
            for weight in weights
        ], choice
    whole = train.merged(held).hessian
    group = group_of(len(whole), scheme, module)
    factor = factorise(shrunk(whole, choice.k), order=order, group=group, damp=damp, module=module)
    results = []
    for weight in weights:
        total = energy(working(weight, module), whole)
        codes, record = quantize_with(
            weight, factor, scheme, scale_dtype=scale_dtype, block=block, clip=clip, known_energy=total, module=module
        )  # fmt: skip
        if choice.k:
            codes.loss = relative(codes, weight, whole, total)
            record = replace(record, error=codes.loss * total, shrinkage=choice.k)
        results.append((codes, record))
    return results, choice


def _error(codes: Codes, weight: Tensor, moments: Moments) -> float:
    """Return tr((Q - W) H (Q - W)')."""
    return energy(torch.from_numpy(codes.values()).to(weight) - weight, moments.hessian)
