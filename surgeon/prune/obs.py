"""Optimal brain surgeon for whole structures: which input columns of a matrix go, and what the others become.

For a matrix W0 [out, in] and H = mean of x x' over its inputs, removing columns R and giving the others
K their best values leaves the error tr((W - W0) H (W - W0)'). The best values are

    W_K = W0_K + W0_R H[R, K] H[K, K]^-1   ( = W0 H[:, K] H[K, K]^-1 )

with the damped H (`surgeon.calibrate.damping`). Minimising the damped error is the same as a ridge towards W0, so
keeping every column returns W0. The order is greedy: the unit whose removal costs least goes, the others take
over its work, and so on (ZipLM, arXiv 2302.04089, section 3.1; OBC, arXiv 2208.11580, section 4).

`removal_order` keeps G = W'W and P = H^-1. Removing column s changes them by

    P <- P - q q'                  q = P[s] / sqrt(P_ss)
    G <- G - h q' - q h'           h = G[s] / sqrt(P_ss) - G_ss / (2 P_ss) q

and raises the damped error by G_ss / P_ss. The diagonals are kept exact at every step, rows are computed
when they are needed, and the matrices are brought up to date by products every `BLOCK` steps or so. The same goes
for D = W - W0, whose norm separates the undamped error from the damping's share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.damping import exact_products
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.prune.closed_form import columns_of, mask_of, remaining_error
from surgeon.prune.obs_state import State, Unstable

BLOCK = 128
"""Removals, at least, between two products that bring the matrices up to date."""

SHRINK = 0.8
"""Removed rows and columns are dropped when fewer than this part of them is left."""

FLOAT64_ORDER = 1024
"""Up to this many columns the order is found in float64 at once."""

CHECKED = (0.5, 0.25, 0.1)
"""Parts of the columns left at which the tracked error is compared with the closed form."""

TOLERANCE = 0.01
"""Disagreement of tracked and exact error, relative, at which float32 is given up."""


@dataclass(frozen=True)
class Order:
    """In which order units go.

    Attributes:
        order: int32 [units], first to go first; with ``groups`` int32 [units of a group, groups].
        errors: float64 [steps + 1], ||(W - W0) X||^2 / ||W0 X||^2 after each step, on the undamped Hessian.
        damp: relative damping that was used, after escalation.
        escalated: the damping had to be raised.
        dead: input columns that were never active.
        precision: "float32" or "float64".
        checks: (steps, tracked error, error in closed form) where both were computed.
    """

    order: np.ndarray
    errors: np.ndarray
    damp: float
    escalated: bool
    dead: int
    precision: str
    checks: tuple[tuple[int, float, float], ...]


def removal_order(
    weight: Tensor,
    hessian: Tensor,
    size: int = 1,
    *,
    groups: int | None = None,
    damp: float = 1e-2,
    module: str = "the matrix",
    precision: str | None = None,
    check: bool = True,
) -> Order:
    """Return the order in which units of ``size`` consecutive input columns go.

    Args:
        weight: W0, float32 [out, in]; on the CPU or a GPU.
        hessian: mean of x x', float32 or float64 [in, in], undamped; same device.
        size: columns of a unit; in is a multiple of it.
        groups: every step removes one unit of each of so many equal ranges of units; None removes one.
        damp: relative damping, raised when the Hessian cannot be inverted.
        module: for messages.
        precision: "float32" or "float64"; None chooses by size and goes over to float64 when float32
            disagrees with the closed form by more than one part in a hundred.
        check: compare with the closed form.

    Raises:
        InputError: E313 the Hessian is not finite, E314 it cannot be inverted, E315 it lost its
            positive definiteness on the way.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns) or columns % (size * (groups or 1)):
        raise ValueError(
            f"{columns} columns, Hessian {tuple(hessian.shape)}, units of {size}, groups {groups}"
        )
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise InputError("E313", f"the Hessian of {printable(module)} is not finite",
                         where=Where(tensor=printable(module)),
                         help="the model overflows on the calibration text: calibrate in bfloat16 or float32")  # fmt: skip
    tries = [precision] if precision else ["float64"] if columns <= FLOAT64_ORDER else ["float32", "float64"]
    with exact_products(), torch.no_grad():
        for number, name in enumerate(tries):
            last = number == len(tries) - 1
            try:
                found, total = _attempt(weight, hessian, size, groups, damp, module, name, last)
            except Unstable as error:
                if not last:
                    continue
                raise InputError("E315", f"the Hessian of {printable(module)} is not positive definite ({error})",
                                 where=Where(tensor=printable(module)),
                                 help="use more calibration samples, or a larger --damp") from None  # fmt: skip
            if not check:
                return found
            found = _checked(found, weight, hessian, size, module, total)
            if last or all(_agree(tracked, exact) for _, tracked, exact in found.checks):
                return found
    raise AssertionError("no precision was tried")


def _agree(tracked: float, exact: float) -> bool:
    return abs(tracked - exact) <= TOLERANCE * exact + 1e-6


def _checked(found: Order, weight: Tensor, hessian: Tensor, size: int, module: str, total: float) -> Order:
    """Return the order with exact errors beside the tracked ones at a few levels."""
    steps = len(found.order)
    checks = []
    for part in CHECKED:
        removed = steps - round(part * steps)
        if not 0 < removed < steps or total == 0:
            continue
        mask = mask_of(columns_of(found.order[removed:], size), weight.shape[1], weight.device)
        exact = remaining_error(weight, hessian, mask, found.damp, module, total) / total
        checks.append((removed, float(found.errors[removed]), exact))
    return replace(found, checks=tuple(checks))


def _attempt(
    weight: Tensor,
    hessian: Tensor,
    size: int,
    groups: int | None,
    damp: float,
    module: str,
    precision: str,
    last: bool,
) -> tuple[Order, float]:
    """Return the order found in one precision, unchecked, and tr(W0 H W0').

    Damping is raised only in the ``last`` precision: what float32 cannot invert, float64 often can.
    """
    try:
        state = State(weight, hessian, damp, module, getattr(torch, precision), size, escalate=last)
    except InputError:
        if last:
            raise
        raise Unstable("it cannot be factorised") from None
    if size == 1 and groups is None:
        order = _single(state)
    else:
        order = _units(state, size, groups)
    errors = np.zeros(len(order) + 1)
    if state.total:
        # What was minimised holds the damping's share, lambda ||W - W0||^2.
        undamped = np.array(state.raised) - state.damping * np.array(state.moved)
        errors[len(order) - len(undamped) + 1 :] = np.maximum(undamped, 0) / state.total
        errors[-1] = 1.0
    relative = state.relative
    return Order(order, errors, relative, relative != damp, state.dead, precision, ()), state.total


def _single(state: State) -> np.ndarray:
    """Remove column by column; return the order."""
    order: list[int] = list(state.first)
    alive = torch.ones(state.count, dtype=state.matrices.dtype, device=state.matrices.device)
    while state.count:
        steps = min(max(BLOCK, state.count // 64), int(alive.sum()))
        with _one_thread(state.matrices):
            picked, pending = _pick(state, alive, steps)
        order += state.index[picked].tolist()
        q, h = pending[:, 0], pending[:, 1]
        _move(state, picked, q)
        left = int(alive.sum())
        if not left:
            break
        state.matrices[:, 0].addmm_(q.T, q, alpha=-1)
        state.matrices[:, 1].addmm_(torch.cat([q, h]).T, torch.cat([h, q]), alpha=-1)
        if left < SHRINK * state.count:
            state.shrink(alive.nonzero().flatten())
            alive = torch.ones_like(alive[:left])
    return np.array(order, dtype=np.int32)


def _pick(state: State, alive: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Remove ``steps`` columns without touching the matrices.

    Returns:
        Their places int64 [steps], and [steps, 2, m] vectors q and h that bring P and G up to date.
        ``alive`` [m] is brought up to date, and so is the error.
    """
    rows, count = state.matrices, state.count
    pending = torch.empty(steps, 2, count, dtype=rows.dtype, device=rows.device)
    flat, q, h = pending.view(steps, -1), pending[:, 0], pending[:, 1]
    gone = alive == 0
    p_diagonal = rows[:, 0].diagonal().masked_fill(gone, 1)
    g_diagonal = rows[:, 1].diagonal().masked_fill(gone, math.inf)
    scores = torch.empty_like(alive)
    error = state.raised[-1] if state.raised else 0.0
    picked: list[int] = []
    for step in range(steps):
        s = int(torch.div(g_diagonal, p_diagonal, out=scores).argmin())
        row = rows[s]
        if step:
            before = pending[:step, :, s].T.contiguous()
            row = torch.addmv(row.reshape(-1), flat[:step].T, before[0], alpha=-1).view(2, count)
            row[1].addmv_(q[:step].T, before[1], alpha=-1)
        ps, gs = row[:, s].tolist()
        if not (ps > 0 and math.isfinite(gs)):
            raise Unstable(f"its inverse has {ps:g} on the diagonal")
        error += max(gs, 0.0) / ps
        state.raised.append(error)
        picked.append(s)
        torch.mul(row * alive, ps**-0.5, out=pending[step])
        h[step].add_(q[step], alpha=-gs / (2 * ps))
        p_diagonal.addcmul_(q[step], q[step], value=-1)
        g_diagonal.addcmul_(q[step], h[step], value=-2)
        alive[s] = 0
        p_diagonal[s] = 1
        g_diagonal[s] = math.inf
    return torch.tensor(picked, device=rows.device), pending


def _move(state: State, picked: Tensor, q: Tensor) -> None:
    """Bring D up to date after steps with vectors q [steps, m], and note ||D||^2 after each.

    D <- D - Y q with Y[:, k] = W[:, s_k] / sqrt(P_ss) at its step, so that W[:, s] = Y q[:, s].
    """
    own = state.original(state.index[picked]).add_(state.change[:, picked])
    triangle = q[:, picked]  # upper: a column that has gone has no part in later steps
    y = torch.linalg.solve_triangular(triangle, own, upper=True, left=False)
    products = (y.T @ y).double() * (q @ q.T).double()
    grown = products.tril().sum(1) + products.tril(-1).sum(1)
    grown -= 2 * (y * (state.change @ q.T)).sum(0, dtype=torch.float64)
    before = state.moved[-1] if state.moved else 0.0
    state.moved += (before + grown.cumsum(0)).tolist()
    state.change.addmm_(y, q, alpha=-1)


def _units(state: State, size: int, groups: int | None) -> np.ndarray:
    """Remove blocks of columns; with ``groups`` one of each group a step, the cheapest first."""
    number = (state.index[::size] // size).tolist()  # unit at each place
    total = len(number) + len(state.first)
    group_of = {unit: unit // (total // groups) if groups else 0 for unit in (*number, *state.first)}
    free = {group: [unit for unit in state.first if group_of[unit] == group] for group in range(groups or 0)}
    order: list[list[int]] = [] if groups else [[unit] for unit in state.first]
    alive = torch.ones(len(number), dtype=torch.bool, device=state.matrices.device)
    error = moved = 0.0
    for _ in range(total // groups if groups else len(number)):
        taken = {group: units.pop(0) for group, units in free.items() if units}
        while len(taken) < (groups or 1):
            allowed = torch.tensor([group_of[unit] not in taken for unit in number], device=alive.device)
            place, score, inverse = _cheapest(state, size, alive, allowed)
            error += max(score, 0.0)
            moved += _remove_block(state, slice(place * size, (place + 1) * size), inverse)
            alive[place] = False
            taken[group_of[number[place]]] = number[place]
        order.append([taken[group] for group in sorted(taken)])
        state.raised.append(error)
        state.moved.append(moved)
        left = int(alive.sum())
        if left and left < SHRINK * len(alive):
            state.shrink(alive.repeat_interleave(size).nonzero().flatten())
            number = [unit for unit, stays in zip(number, alive.tolist(), strict=True) if stays]
            alive = torch.ones_like(alive[:left])
    found = np.array(order, dtype=np.int32)
    return found if groups else found[:, 0]


def _cheapest(state: State, size: int, alive: Tensor, allowed: Tensor) -> tuple[int, float, Tensor]:
    """Return the place of the cheapest unit, its cost tr(P_SS^-1 G_SS), and P_SS^-1 [size, size]."""
    units = len(alive)
    blocks = [
        state.matrices[:, part].view(units, size, -1).unfold(2, size, size).diagonal(dim1=0, dim2=2)
        for part in range(2)
    ]
    p, g = (block.movedim(-1, 0).to(torch.float64, copy=True) for block in blocks)
    p[~alive] = torch.eye(size, dtype=p.dtype, device=p.device)
    factor, info = torch.linalg.cholesky_ex(p)
    if bool((info != 0).any()):
        raise Unstable("a block of its inverse has a negative eigenvalue")
    inverse = torch.cholesky_inverse(factor)
    scores = (inverse * g.transpose(1, 2)).sum((1, 2)).masked_fill(~(alive & allowed), math.inf)
    place = int(scores.argmin())
    score = float(scores[place])
    if not math.isfinite(score):
        raise Unstable("the cost of a removal is not a number")
    return place, score, inverse[place]


def _remove_block(state: State, block: slice, inverse: Tensor) -> float:
    """Remove a block of columns; return by how much ||D||^2 grows."""
    p, g, d = state.matrices[:, 0], state.matrices[:, 1], state.change
    rows = inverse.to(p.dtype) @ p[block]
    own = state.original(state.index[block]) + d[:, block]
    step = own @ rows
    growth = float(step.mul(step - 2 * d).sum(dtype=torch.float64))
    d -= step
    half = g[block] - g[block, block] @ rows / 2
    p.addmm_(p[block].T.clone(), rows, alpha=-1)
    g.addmm_(half.T, rows, alpha=-1).addmm_(rows.T, half, alpha=-1)
    # What rounding leaves in removed rows and columns would grow from step to step.
    for matrix in (p, g):
        matrix[block] = 0
        matrix[:, block] = 0
    d[:, block] = 0
    return growth


@contextmanager
def _one_thread(like: Tensor) -> Iterator[None]:
    """Run on one thread: handing thousands of tiny steps to several costs more than the steps."""
    if like.device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
