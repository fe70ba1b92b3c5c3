"""Merges whose result is a linear combination of the inputs, with coefficients from inner products.

Spherical interpolation, Karcher mean and Model Stock move vectors within the space that the inputs
span. Everything they do can therefore be done to coefficients, given only the Gram matrix
G_ij = <v_i, v_j>: one reduce pass sums G in float64, a solver turns it into coefficients c, and the
map is y = sum_i c_i x_i, or y = b + sum_i c_i (x_i - b) where the method works on task vectors.

A vector is the whole tensor, or one row (last axis), or one column (along axis 0).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from surgeon.kernels import cast, fused, lanes
from surgeon.merge.task_vectors import added
from surgeon.plan import Block, Operation

COLLINEAR = 1e-12
"""1 - cos^2 below this is a straight line: G carries no more digits, and near antipodes 1 / sin explodes."""


class Solver(Protocol):
    """Coefficients from inner products."""

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        """Return [..., n] coefficients for a Gram matrix [..., n, n] in float64."""
        ...

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        """Return what a report says about one tensor."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Coefficients that need no inner products."""

    values: tuple[float, ...]

    def coefficients(self, gram: np.ndarray) -> np.ndarray:
        return np.array(self.values)

    def facts(self, gram: np.ndarray) -> dict[str, Any]:
        return {}


@dataclass
class Solution:
    """What later passes and the report need.

    Attributes:
        coefficients: [n], or [columns, n].
        identical: every input has the same bits (with them the identity, where it holds, is exact).
    """

    coefficients: np.ndarray
    identical: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Combination(Operation):
    """y = sum_i c_i x_i, or b + sum_i c_i (x_i - b) when ``base`` is set.

    Attributes:
        solver: gives c.
        inputs: which inputs are combined, in the solver's order.
        base: index of the base, when the vectors are differences from it.
        work: storage code inputs and result are rounded to; sums are float32 (float64 for F64).
        vectors: "tensor", "row" or "column".
        identity: equal inputs must come out as they are; off where weights do not sum to 1.
    """

    solver: Solver
    inputs: tuple[int, ...]
    base: int | None
    work: str
    vectors: str = "tensor"
    identity: bool = True

    name = "combination"

    @property
    def unit(self) -> str:  # type: ignore[override]
        return "element" if self.vectors == "tensor" else "row"

    @property
    def scratch(self) -> int:  # type: ignore[override]
        if isinstance(self.solver, Fixed):
            return 16
        coefficients = 0 if self.vectors == "tensor" else 8 + 8 * len(self.inputs)
        return 16 + 8 * len(self.inputs) + coefficients

    def reduces(self) -> int:
        return int(self.vectors != "row" and not isinstance(self.solver, Fixed))

    def _vectors(self, block: Block) -> list[np.ndarray]:
        """Return the vectors' entries in this block: inputs, or their differences from the base."""
        values = [block.value(i, self.work) for i in self.inputs]
        if self.base is None:
            return values
        base = block.value(self.base, self.work)
        return [x - base for x in values]

    def _identical(self, block: Block) -> bool:
        first = block.raw[0]
        return all(
            code == block.codes[0] and np.array_equal(first, other)
            for code, other in zip(block.codes[1:], block.raw[1:], strict=True)
        )

    def reduce(self, step: int, block: Block, carried: Any) -> tuple[_Sums, bool]:
        if self.vectors == "tensor":
            matrix = fused.gram(block, self.inputs, self.base, self.work)
            if matrix is None:
                matrix = whole_gram([v.astype(np.float64, copy=False) for v in self._vectors(block)])
            return _Sums(0, matrix[None]), self._identical(block)
        wide = [v.astype(np.float64, copy=False) for v in self._vectors(block)]
        columns = max(1, math.prod(block.shape[1:]))
        total = _Sums(0, np.zeros((0, len(wide), len(wide))))
        for start, stop in _slices(block.start, block.stop, columns):
            first = start % columns
            width = min(columns, stop - start)
            part = [v[start - block.start : stop - block.start].reshape(-1, width) for v in wide]
            total = total.plus(_Sums(first, gram(part, "rc,rc->c")))
        return total, self._identical(block)

    def merge(self, step: int, left: tuple[_Sums, bool], right: tuple[_Sums, bool]) -> tuple[_Sums, bool]:
        return left[0].plus(right[0]), left[1] and right[1]

    def finish(self, step: int, state: tuple[_Sums, bool], carried: Any, elements: int) -> Solution:
        sums, identical = state
        matrix = sums.matrix[0] if self.vectors == "tensor" else sums.matrix
        facts = self.solver.facts(matrix) if self.vectors == "tensor" else {}
        return Solution(self.solver.coefficients(matrix), identical and self.identity, facts)

    def map(self, block: Block, carried: Solution | None) -> list[np.ndarray]:
        fixed = np.array(self.solver.values) if isinstance(self.solver, Fixed) else None
        if fixed is None and self.vectors == "tensor" and carried is not None and not carried.identical:
            fixed = carried.coefficients
        if fixed is not None and not self._end_point(fixed):
            done = fused.combine(block, self.inputs, self.base, fixed, self.work)
            if done is not None:
                return [done]
        values = [block.value(i, self.work) for i in self.inputs]
        if isinstance(self.solver, Fixed):
            return [self._combine(block, values, np.array(self.solver.values))]
        if self.vectors == "row":
            return [self._rows(block, values)]
        assert carried is not None
        if carried.identical:
            return [values[0]]
        if self.vectors == "tensor":
            return [self._combine(block, values, carried.coefficients)]
        columns = max(1, len(carried.coefficients))
        which = np.arange(block.start, block.stop) % columns
        return [self._combine(block, values, carried.coefficients[which].T)]

    def _rows(self, block: Block, values: list[np.ndarray]) -> np.ndarray:
        columns = block.columns
        if not columns or not values[0].size:
            return values[0]
        wide = [v.astype(np.float64, copy=False).reshape(-1, columns) for v in self._vectors(block)]
        coefficients = np.repeat(self.solver.coefficients(gram(wide)), columns, axis=0)
        result = self._combine(block, values, coefficients.T)
        if self.identity:
            everything = [block.value(i, self.work).reshape(-1, columns) for i in range(len(block.raw))]
            same = np.all([(v == everything[0]).all(axis=1) for v in everything], axis=0)
            result.reshape(-1, columns)[same] = values[0].reshape(-1, columns)[same]
        return result

    def _end_point(self, coefficients: np.ndarray) -> bool:
        """Return whether the result is one of the inputs, or the base, as it is."""
        taken = np.flatnonzero(coefficients)
        return (len(taken) == 0 and self.base is not None) or (
            len(taken) == 1 and coefficients[taken[0]] == 1
        )

    def _combine(self, block: Block, values: list[np.ndarray], coefficients: np.ndarray) -> np.ndarray:
        """Return the combination for coefficients [n], or [n, elements]."""
        if coefficients.ndim == 1 and self._end_point(coefficients):
            # End points keep their exact bits; b + (x - b) would not.
            taken = np.flatnonzero(coefficients)
            if len(taken):
                return values[taken[0]]
            assert self.base is not None
            return block.value(self.base, self.work)
        wide = values[0].dtype.type
        total = np.zeros(values[0].shape, dtype=wide)
        for vector, c in zip(self._vectors(block), coefficients, strict=True):
            total += vector * (wide(c) if np.ndim(c) == 0 else c.astype(wide))
        if self.base is not None:
            total = added(block.value(self.base, self.work), total)
        return cast.round_to(total, self.work)

    def summary(self, carried: Solution | None, measured: np.ndarray | None) -> dict[str, Any] | None:
        return carried.facts or None if carried is not None else None


@dataclass
class _Sums:
    """Gram matrices [m, n, n] of the vectors numbered ``first`` .. ``first + m - 1``."""

    first: int
    matrix: np.ndarray

    def plus(self, other: _Sums) -> _Sums:
        if self.first == other.first and self.matrix.shape == other.matrix.shape:
            return _Sums(self.first, self.matrix + other.matrix)
        begin = min(self.first, other.first)
        end = max(self.first + len(self.matrix), other.first + len(other.matrix))
        total = np.zeros((end - begin, *self.matrix.shape[1:]))
        for part in (self, other):
            total[part.first - begin : part.first - begin + len(part.matrix)] += part.matrix
        return _Sums(begin, total)


def _slices(start: int, stop: int, columns: int) -> list[tuple[int, int]]:
    """Cut a block where slices of axis 0 (``columns`` elements) begin: a partial one, whole ones, a partial one."""
    first, last = -(-start // columns) * columns, stop // columns * columns
    borders = sorted({start, min(max(first, start), stop), max(min(last, stop), start), stop})
    return list(itertools.pairwise(borders))


def gram(vectors: list[np.ndarray], sums: str = "rc,rc->r") -> np.ndarray:
    """Return G [m, n, n] of n float64 arrays [rows, columns], one for each row (or column: ``rc,rc->c``).

    einsum adds in a fixed order; a threaded BLAS need not.
    """
    n = len(vectors)
    result = np.empty((vectors[0].shape["rc".index(sums[-1])], n, n))
    for i in range(n):
        for j in range(i, n):
            result[:, i, j] = result[:, j, i] = np.einsum(sums, vectors[i], vectors[j])
    return result


def whole_gram(vectors: list[np.ndarray]) -> np.ndarray:
    """Return G [n, n] of n flat float64 arrays, in lane order."""
    n = len(vectors)
    result = np.empty((n, n))
    for i in range(n):
        for j in range(i, n):
            result[i, j] = result[j, i] = lanes.total(vectors[i] * vectors[j])
    return result


def norms(matrix: np.ndarray) -> np.ndarray:
    """Return the vectors' lengths [..., n]."""
    return np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))


def cosine(matrix: np.ndarray, tiny: float, i: int = 0, j: int = 1) -> np.ndarray:
    """Return cos(v_i, v_j); a vector not longer than ``tiny`` counts as having length 1, as in mergekit."""
    length = norms(matrix)
    length = np.where(length > tiny, length, 1.0)
    return np.clip(matrix[..., i, j] / (length[..., i] * length[..., j]), -1.0, 1.0)


def slerp_coefficients(cos: np.ndarray, t: float, straight: np.ndarray) -> np.ndarray:
    """Return [..., 2]: sin((1-t) a)/sin a and sin(t a)/sin a, or 1-t and t where ``straight``."""
    angle = np.arccos(np.where(straight, 0.0, cos))
    sine = np.sin(angle)
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    if t in {0.0, 1.0}:  # sin(a) / sin(a) is 1 whatever rounding says
        first, second = np.full_like(first, 1.0 - t), np.full_like(second, t)
    return np.stack([first, second], axis=-1)


def length(matrix: np.ndarray, coefficients: np.ndarray) -> float:
    """Return |sum_i c_i v_i|, 0 where only the rounding of G is left of it."""
    square = float(coefficients @ matrix @ coefficients)
    noise = 1e-15 * float(np.abs(coefficients) @ np.abs(matrix) @ np.abs(coefficients))
    return math.sqrt(square) if square > noise else 0.0
