"""The matrices an order of removal is found with: the inverse Hessian, W'W and W - W0 of the columns that are left."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.calibrate.damping import dead_inputs, factorise, shift
from surgeon.prune.closed_form import CHUNK, copy_part


class Unstable(Exception):
    """float32 was not enough."""


class State:
    """P and G of the columns that are left, in one storage (row s is [P[s], G[s]]), and D.

    Attributes:
        matrices: [m, 2, m] view of the storage.
        change: D, [out, m].
        index: int64 [m], which columns these are.
        first: numbers of the units that are dead altogether and go before everything else.
        damping: what was added to the diagonal of live inputs.
        relative: the same, relative to the mean diagonal.
        total: tr(W0 H W0').
        raised, moved: damped error and ||W - W0||^2 after each step, without the free ones.
    """

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        damp: float,
        module: str,
        dtype: torch.dtype,
        size: int,
        *,
        escalate: bool,
    ) -> None:
        dead = dead_inputs(hessian)
        self.dead = int(dead.sum())
        gone = dead.reshape(-1, size).all(1)
        # All dead: nothing is known, and the order is that of numbers.
        self.first = gone.nonzero().flatten().tolist() if not bool(gone.all()) else []
        stay = ~gone.repeat_interleave(size) if self.first else torch.ones_like(dead)
        self.index = stay.nonzero().flatten()
        self.raised: list[float] = []
        self.moved: list[float] = []
        count = len(self.index)
        self._flat = torch.empty(2 * count * count, dtype=dtype, device=weight.device)
        added = {}

        def fill(relative: float) -> Tensor:
            added["shift"] = shift(hessian.diagonal(), relative)
            square = self._flat[: count * count].view(count, count)
            copy_part(hessian, self.index, self.index, square)
            square.diagonal().add_(added["shift"][self.index].to(dtype))
            return square.T  # symmetric: this only says "column-major", which LAPACK works on in place

        factor, self.relative = factorise(fill, damp, module, escalate=escalate)
        torch.cholesky_inverse(factor, out=factor)
        live = added["shift"][~dead]
        self.damping = float(live[0]) if len(live) else 0.0
        self._spread(count)
        self._weight, self._dead = weight, dead
        columns = self.original(self.index)
        self.matrices[:, 1].addmm_(columns.T, columns, beta=0)
        self.total = self._energy(hessian)
        self.change = torch.zeros_like(columns)

    @property
    def count(self) -> int:
        return len(self.index)

    def original(self, columns: Tensor) -> Tensor:
        """Return columns of W0 [out, columns]; those of dead inputs are zero, as they cost nothing."""
        found = self._weight[:, columns].to(self._flat.dtype)
        return found.masked_fill(self._dead[columns], 0) if bool(self._dead[columns].any()) else found

    def _energy(self, hessian: Tensor) -> float:
        """Return tr(W0 H W0') = sum of G o H; dead inputs have no part in it."""
        total, whole = 0.0, self.count == len(hessian)
        step = max(1, CHUNK // len(hessian))
        for start in range(0, self.count, step):
            rows = slice(start, start + step)
            own = hessian[rows] if whole else hessian[self.index[rows]].index_select(1, self.index)
            total += float((own * self.matrices[rows, 1]).sum(dtype=torch.float64))
        return total

    def _spread(self, count: int) -> None:
        """Move the rows of a [m, m] matrix at the start of the storage to their places in [m, 2, m]."""
        self.matrices = self._flat.view(count, 2, count)
        step = max(1, CHUNK // count)
        for end in range(count, 0, -step):  # from the last: no row is overwritten before it has moved
            start = max(0, end - step)
            rows = self._flat[start * count : end * count].clone()
            self.matrices[start:end, 0] = rows.view(-1, count)

    def shrink(self, keep: Tensor) -> None:
        """Keep these rows and columns [m'], ascending, moving them to the front of the same storage."""
        count = len(keep)
        smaller = self._flat[: 2 * count * count].view(count, 2, count)
        step = max(1, CHUNK // (2 * self.count))
        for start in range(0, count, step):  # from the first: new places never lie behind old ones
            rows = self.matrices[keep[start : start + step]]
            # gather takes a tenth of the time of index_select along the last axis
            torch.gather(rows, 2, keep.expand(len(rows), 2, count), out=smaller[start : start + step])
        self.matrices = smaller
        self.change = torch.gather(self.change, 1, keep.expand(len(self.change), count))
        self.index = self.index[keep]
