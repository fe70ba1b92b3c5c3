"""LoRE-Merging: an average, and what each model differs from it by, cleaned of its small singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.errors import InputError
from surgeon.kernels import cast, lowrank
from surgeon.kernels.blas import one_thread
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.merge.task_vectors import added
from surgeon.plan import BLOCK_ELEMENTS, Block, Operation

PANEL = 1024
"""Rows (or columns) of the differences that are added to a Gram matrix at once; part of the results."""


@dataclass(frozen=True)
class Parts:
    """The minimiser theta0, delta_1 .. delta_k of one matrix, in terms of the differences from the last model.

    With X = [x_1 - x_k, ..., x_(k-1) - x_k] side by side, [m, (k-1) n]: theta0 = x_k + X mean and
    delta_i = X low[i], where None stands for zero.

    Attributes:
        mean: [(k-1) n, n].
        low: k matrices [(k-1) n, n].
        objective: sum_i |theta0 + delta_i - x_i|^2 / 2 + mu |delta_i|_* after each iteration.
        ranks: singular values above mu, by model.
        iterations: how often theta0 and the deltas were computed.
        energy_kept: sum_i |delta_i|^2 / sum_i |x_i - theta0|^2, 0 where the models are equal.
    """

    mean: np.ndarray
    low: tuple[np.ndarray | None, ...]
    objective: tuple[float, ...]
    ranks: tuple[int, ...]
    iterations: int
    energy_kept: float


def minimise(
    gram: np.ndarray, count: int, mu: float, max_iter: int, tol: float, scale: float, shortcut: bool = True
) -> Parts:
    """Minimise sum_i |theta0 + delta_i - x_i|_F^2 / 2 + mu |delta_i|_* (LoRE-Merging, algorithm 1).

    In turns, from delta = 0: theta0 = mean(x_i - delta_i), delta_i = soft threshold of x_i - theta0. Both
    steps minimise over their block, so the objective never rises. Every iterate is X times a small matrix,
    and all that is needed of X is its Gram matrix.

    Two models need one step: delta_1 = -delta_2 by symmetry, so theta0 stays their average.

    Args:
        gram: X'X [(k-1) n, (k-1) n], float64.
        count: k.
        mu: threshold for singular values.
        max_iter: most iterations, at least 1.
        tol: |change of theta0| / scale below which it ends.
        scale: |mean of the models|_F.
        shortcut: use the closed form for two models.
    """
    side = len(gram) // (count - 1)
    inputs = [_selector(i, count, side) for i in range(count)]
    if count == 2 and shortcut:
        return _two(gram, mu)
    low: list[np.ndarray | None] = [None] * count
    mean, before = inputs[0], None
    objective: list[float] = []
    spectra: list[np.ndarray] = []
    done = 0
    for _ in range(max_iter):
        mean = np.sum([x if d is None else x - d for x, d in zip(inputs, low, strict=True)], axis=0) / count
        if before is not None and _norm(gram, mean - before) <= tol * scale:
            break
        before, spectra = mean, []
        for i, x in enumerate(inputs):
            difference = x - mean
            inner = difference.T @ (gram @ difference)
            shrink, singular = lowrank.shrinkage((inner + inner.T) / 2, mu)
            low[i] = None if shrink is None else difference @ shrink
            spectra.append(singular)
        objective.append(sum(_value(s, mu) for s in spectra))
        done += 1
    return Parts(mean, tuple(low), tuple(objective), _ranks(spectra, mu), done, _kept(spectra, mu))


def _selector(i: int, count: int, side: int) -> np.ndarray:
    """Return the matrix that takes x_i - x_k out of X."""
    chosen = np.zeros(((count - 1) * side, side))
    if i < count - 1:
        chosen[i * side : (i + 1) * side] = np.eye(side)
    return chosen


def _two(gram: np.ndarray, mu: float) -> Parts:
    """x_1 - mean = D/2 and x_2 - mean = -D/2, so delta = +-SVT(D/2), and theta0 does not move."""
    half = np.eye(len(gram)) / 2
    shrink, singular = lowrank.shrinkage(gram / 4, mu)
    low = None if shrink is None else shrink / 2
    spectra = [singular, singular]
    objective = sum(_value(s, mu) for s in spectra)
    low_parts = (low, None if low is None else -low)
    return Parts(half, low_parts, (objective,), _ranks(spectra, mu), 1, _kept(spectra, mu))


def _norm(gram: np.ndarray, coefficients: np.ndarray) -> float:
    """Return |X C|_F."""
    return math.sqrt(max(0.0, float(np.sum(coefficients * (gram @ coefficients)))))


def _value(singular: np.ndarray, mu: float) -> float:
    """Return |y - delta|^2 / 2 + mu |delta|_* for a y with these singular values, delta its soft threshold."""
    above = np.maximum(singular - mu, 0.0)
    return float(np.square(singular - above).sum() / 2 + mu * above.sum())


def _ranks(spectra: list[np.ndarray], mu: float) -> tuple[int, ...]:
    return tuple(int((s > mu).sum()) for s in spectra)


def _kept(spectra: list[np.ndarray], mu: float) -> float:
    total = sum(float(np.square(s).sum()) for s in spectra)
    kept = sum(float(np.square(np.maximum(s - mu, 0.0)).sum()) for s in spectra)
    return kept / total if total > 0 else 0.0


@dataclass
class _Sums:
    """Upper halves of the differences' Gram matrices, for each matrix of the tensor, and |mean of the models|^2."""

    uppers: list[np.ndarray]
    squares: np.ndarray


@dataclass
class _Result:
    """What the map multiplies the differences with, by matrix; None where they are zero."""

    coefficients: list[np.ndarray | None]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Lore(Operation):
    """y = theta0 + lam * sum_i w_i delta_i for every matrix of a tensor; the mean for a vector.

    A tall matrix goes through in blocks of rows. Wide ones and stacks of matrices are held whole: their
    small side is the one that blocks would cut.
    """

    count: int
    weights: tuple[float, ...]
    mu: float
    lam: float
    max_iter: int
    tol: float
    work: str
    shape: tuple[int, ...]

    name = "lore"

    @property
    def is_vector(self) -> bool:
        return len(self.shape) < 2 or math.prod(self.shape) == 0

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices, their rows and columns."""
        return lowrank.matrices(self.shape)

    @property
    def streams(self) -> bool:
        """Whether blocks of rows are enough."""
        return len(self.shape) == 2 and self.shape[0] >= self.shape[1]

    @property
    def is_plain_average(self) -> bool:
        """Whether the parts cancel: theta0 = mean(x) - mean(delta), and delta_1 = -delta_2 for two models."""
        first = self.weights[0]
        if any(w != first for w in self.weights):
            return self.count == 2 and self.lam == 0
        return self.count == 2 or abs(self.lam * first * self.count - 1) < 1e-12

    @property
    def unit(self) -> str:  # type: ignore[override]
        return "element" if self.is_vector else "row" if self.streams else "whole"

    @property
    def scratch(self) -> int:  # type: ignore[override]
        wide = 8 if self.work == "F64" else 4
        blocks = wide * (self.count + 1) + 8
        if self.is_vector:
            return blocks
        count, rows, columns = self.matrices
        side = min(rows, columns)
        stacked = (self.count - 1) * side
        sums = 2 * 8 * count * stacked * stacked  # one in work and one waiting to be merged, for each thread
        solving = 8 * (2 * self.count * stacked * side + 5 * side * side)
        held = math.prod(self.shape) if not self.streams else min(BLOCK_ELEMENTS, math.prod(self.shape))
        panel = 8 * PANEL * stacked
        return blocks + -(-(sums + solving + panel) // max(1, held))

    def reduces(self) -> int:
        return 0 if self.is_vector or self.is_plain_average else 1

    def _differences(self, block: Block) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the last model and the others' differences from it."""
        values = block.values(self.work)
        return values[-1], [x - values[-1] for x in values[:-1]]

    def _matrix(self, flat: np.ndarray, index: int) -> np.ndarray:
        """Return one matrix of a block with its short side as columns, as a view."""
        count, rows, columns = self.matrices
        if self.streams:
            return flat.reshape(-1, columns)
        matrix = flat.reshape(count, rows, columns)[index]
        return matrix if rows >= columns else matrix.T

    def reduce(self, step: int, block: Block, carried: Any) -> _Sums:
        last, differences = self._differences(block)
        uppers, squares = [], np.zeros(self.matrices[0])
        with one_thread():
            for index in range(len(squares)):
                parts = [self._matrix(d, index) for d in differences]
                uppers.append(_upper_gram(parts))
                if self.count > 2:  # only the iteration asks when it has converged
                    squares[index] = _mean_square(self._matrix(last, index), parts)
        return _Sums(uppers, squares)

    def merge(self, step: int, left: _Sums, right: _Sums) -> _Sums:
        for into, more in zip(left.uppers, right.uppers, strict=True):
            into += more
        return _Sums(left.uppers, left.squares + right.squares)

    def finish(self, step: int, state: _Sums, carried: Any, elements: int) -> _Result:
        coefficients: list[np.ndarray | None] = []
        found: list[Parts] = []
        with one_thread():
            for gram, square in zip(map(lowrank.mirrored, state.uppers), state.squares, strict=True):
                if not math.isfinite(float(np.trace(gram))):
                    raise InputError("E322", "lore cannot decompose a matrix with NaN or Inf",
                                     help="--ignore copies the tensor instead")  # fmt: skip
                if not gram.any():
                    coefficients.append(None)  # equal models: theta0 is the model, every delta 0
                    continue
                parts = minimise(gram, self.count, self.mu, self.max_iter, self.tol, math.sqrt(square))
                found.append(parts)
                mixed = parts.mean
                for weight, low in zip(self.weights, parts.low, strict=True):
                    if low is not None and weight:
                        mixed = mixed + (self.lam * weight) * low
                coefficients.append(mixed)
        return _Result(coefficients, self._facts(found))

    def _facts(self, found: list[Parts]) -> dict[str, Any]:
        """Return iterations, how many singular values are above mu by model (of a stack the mean), and energy."""
        count = max(1, len(found))
        ranks = [sum(p.ranks[i] for p in found) / count for i in range(self.count)]
        return {
            "iterations": max((p.iterations for p in found), default=0),
            "rank": [int(r) if r.is_integer() else round(r, 1) for r in ranks],
            "rank_of": min(self.matrices[1:]),
            "low_rank_energy": sum(p.energy_kept for p in found) / count,
        }

    def map(self, block: Block, carried: _Result | None) -> list[np.ndarray]:
        last, differences = self._differences(block)
        if carried is None:
            change = np.zeros_like(last)
            for d in differences:
                change += d
            return [cast.round_to(added(last, change / change.dtype.type(self.count)), self.work)]
        change = np.zeros_like(last)
        with one_thread():
            for index, coefficients in enumerate(carried.coefficients):
                if coefficients is None:
                    continue
                side = coefficients.shape[1]
                target = self._matrix(change, index)
                narrow = coefficients.astype(last.dtype)
                for i, d in enumerate(differences):
                    target += self._matrix(d, index) @ narrow[i * side : (i + 1) * side]
        return [cast.round_to(added(last, change), self.work)]

    def summary(self, carried: _Result | None, measured: np.ndarray | None) -> dict[str, Any] | None:
        if self.is_vector:
            return None
        facts = {} if carried is None else carried.facts
        return {**facts, "plain_average": True} if self.is_plain_average else facts


def _upper_gram(parts: list[np.ndarray]) -> np.ndarray:
    """Return X'X in float64, on and above the diagonal, for X = the parts [m, n] side by side."""
    total = lowrank.GramSum(parts[0].shape[1] * len(parts))
    for first in range(0, parts[0].shape[0], PANEL):
        total.add(np.hstack([p[first : first + PANEL] for p in parts]).astype(np.float64))
    return total.upper


def _mean_square(last: np.ndarray, parts: list[np.ndarray]) -> float:
    """Return |mean of the models|^2, given the last one and the others' differences from it."""
    total = 0.0
    for first in range(0, last.shape[0], PANEL):
        rows = slice(first, first + PANEL)
        mean = last[rows] + np.sum([p[rows] for p in parts], axis=0, dtype=np.float64) / (len(parts) + 1)
        total += float(np.square(mean).sum())
    return total


def bind(b: Binding) -> Operation:
    weights = tuple(float(each["weight"]) for each in b.each)
    return Lore(
        b.count, weights, float(b.shared["mu"]), float(b.shared["lambda"]), int(b.shared["max_iter"]),
        float(b.shared["tol"]), b.work, tuple(b.shape),
    )  # fmt: skip


METHOD = Method(
    name="lore",
    title="LoRE-Merging",
    summary="Averages, and adds back what of each model's difference from the average is of low rank.",
    bind=bind,
    base="ignored",
    models=(2, None),
    parameters=(
        Parameter("weight", "float", "factor of this model's low-rank part", per_model=True, default=1.0),
        Parameter(
            "mu", "float", "how much singular values are lowered; those below go", default=0.01, low=0.0
        ),
        Parameter("lambda", "float", "factor of the sum of the low-rank parts", default=1.0),
        Parameter("max_iter", "int", "most iterations (three models and more)", default=20, low=1),
        Parameter(
            "tol",
            "float",
            "relative change of the average below which it has converged",
            default=1e-5,
            low=0.0,
        ),
    ),
    reference="LoRE-Merging, arXiv 2502.10749",
    page="""Minimises sum_i |t + d_i - x_i|^2 / 2 + mu |d_i|_* over the average t and the low-rank parts d_i, matrix by
matrix (|.|_* = sum of singular values), and gives y = t + lambda * sum_i weight_i d_i. Vectors are averaged. No base.

Two models: t is their plain average and d_1 = -d_2, the soft threshold of half their difference. With EQUAL weights the
two cancel and y is the plain average, whatever mu and lambda are. For a long/short pair give the model whose strength is
to be kept weight 1 and the other 0: y = average + lambda * SVT(half the difference); or mix freely.

mu is in units of singular values. The report gives, by tensor, how many of how many (rank, rank_of) are above it: where
that is nearly all, mu hardly does anything, and where it is 0 the result is the average.

Not done here: the squared nuclear norm that the paper prints (its algorithm thresholds by mu as above), and electing
signs among the d_i.""",
)
