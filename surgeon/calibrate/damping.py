"""Making a Hessian safe to invert: inputs that never fired, damping, and what to do when that is not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where

ESCALATIONS = 4
"""Times the damping is multiplied by ten before a module is given up."""

SMALLEST = 1e-5
"""What a damping of zero becomes when it must be raised."""


def dead_inputs(hessian: Tensor) -> Tensor:
    """Return which inputs were zero for every token, bool [in]."""
    return hessian.diagonal() == 0


def shift(diagonal: Tensor, damp: float) -> Tensor:
    """Return what damping adds to the diagonal of a Hessian, float64 [in], from that diagonal [in].

    Live inputs get ``damp`` times the mean diagonal of live inputs. A dead input gets that mean itself
    besides: it is tied to nothing then, and the mean is not diluted by it.
    """
    diagonal = diagonal.double()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    return mean * (damp + dead.double())


def damped(hessian: Tensor, damp: float) -> Tensor:
    """Return a Hessian [in, in] with damping added, in its own precision; the argument stays as it is."""
    copy = hessian.clone()
    copy.diagonal().add_(shift(hessian.diagonal(), damp).to(copy.dtype))
    return copy


def escalated(damp: float) -> Iterator[float]:
    """Yield the relative damping of each attempt: as given, then ten times more each time."""
    yield damp
    for attempt in range(1, ESCALATIONS + 1):
        yield max(damp, SMALLEST) * 10**attempt


def factorise(
    fill: Callable[[float], Tensor], damp: float, module: str, *, escalate: bool = True
) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor of a damped matrix, and the damping it took.

    Args:
        fill: makes the damped matrix for a relative damping; it is overwritten. Column-major storage
            (``matrix.T`` contiguous) is factorised in place.
        damp: relative damping to begin with.
        module: for the message.
        escalate: raise the damping; else give up at once.

    Raises:
        InputError: E314 four times the damping x10 were not enough.
    """
    relative = damp
    for relative in escalated(damp) if escalate else (damp,):
        matrix = fill(relative)
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, info))
        # A NaN passes through the factorisation without a complaint.
        if int(info) == 0 and bool(torch.isfinite(matrix.diagonal()).all()):
            return matrix, relative
    raise InputError(
        "E314", f"the Hessian of {printable(module)} is not positive definite, even with damping {relative:g}",
        where=Where(tensor=printable(module)),
        help="use more or longer calibration samples, or a larger --damp",
    )  # fmt: skip


@contextmanager
def exact_products() -> Iterator[None]:
    """Keep float32 products in float32: TF32 and bfloat16 shortcuts lose the eigenvalues that count."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
