"""Best low-rank approximation and singular-value soft-thresholding through the Gram matrix.

For D [m, n] with n the smaller side, the right singular vectors of D are the eigenvectors of
G = D'D [n, n], and everything that is done to singular values is a product with an n x n matrix:

    rank r:          D V_r V_r'                           V_r = eigenvectors of the r largest eigenvalues
    soft threshold:  D V diag(max(1 - t / s, 0)) V'       s = sqrt(eigenvalues)

G is a sum over rows, in float64, so D is never in memory as a whole. What that costs: squaring
loses singular values below sqrt(eps) = 1.5e-8 of the largest one, which then are noise of that size.
With E the rounding of G, |E| <= c eps |D|_F^2 (c about 1 in practice, m n in theory),

    |D - D V_r V_r'|_F^2  <=  optimum + 2 r |E|,        |soft threshold - exact|  <~  sqrt(n |E|),

that is, nothing at the precision float32 weights have (tests compare with a full SVD).

The eigenvectors come from LAPACK, or for a small share of a large side from a subspace iteration
with Chebyshev filter (Zhou, Saad, Tiago, Chelikowsky 2006) that starts from counter-based random
numbers. That one proves what it gives: with Q its first k >= r Ritz vectors, R = (I - QQ')GQ their
residual and t a bound on the largest eigenvalue of G outside span Q (shown by a Cholesky
factorisation of t I - (I - QQ')G(I - QQ'), which exists only if t is one), the energy it captures is
short of the optimum by at most |R|_F^2 / (theta_r - t). Derivation: for any orthonormal W = Q S + Q_o T
with |T|_F^2 = u, tr(W'GW) <= sum_{i<=r} theta_i - u theta_r + 2 sqrt(u) |R|_F + u t; maximise over u.
Where the bound is not met after a few rounds, LAPACK does it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from surgeon.kernels.crew import Spread, serially
from surgeon.seeds import stream_key, uniform

STRIP = 896
"""Columns of G that one piece of work covers. Part of the results: sums are formed strip by strip."""
PANEL = 512
"""Rows of a product that one piece of work covers."""
SMALL_SIDE = 768
"""Below this side LAPACK takes less than a second and is always used."""
LARGE_SHARE = 0.2
"""From this share of all directions on, iterating costs more than LAPACK's full decomposition."""
TOLERANCE = 1e-4
"""Energy the iteration may miss, as a share of the energy that the best approximation leaves out."""
FLOOR = 1e-8
"""The same as a share of all energy (1e-4 of the norm), for matrices whose rank is low already."""
STEEP = 7.0
"""Logarithm of how far apart one step of the filter may pull them; beyond that the iteration gives up at once."""
DEGREE = 12
"""Products with G in one filter."""
ROUNDS = 4
"""Filters, at most, before LAPACK does it."""
RANGE = 11.0
"""Logarithm of how far a filter may pull directions apart in float32: e^11 = 6e4 of 1.7e7."""
SMALLEST_MATRIX = 8
"""A 3-D tensor with a shorter last or middle axis is the kernel of a convolution, not a stack of matrices."""


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (count, rows, columns) of the matrices a tensor consists of.

    A vector is one row; [experts, rows, columns] is a stack; a kernel [out, in, taps ...] is [out, rest].
    """
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    if len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) >= SMALLEST_MATRIX):
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return 1, shape[0], math.prod(shape[1:])


class GramSum:
    """Sums D'D over panels of rows, in float64 and in the order the panels come.

    Attributes:
        upper: [n, n], complete on and above the diagonal; sums of two parts may be added up.
    """

    def __init__(self, side: int, spread: Spread = serially) -> None:
        self.upper = np.zeros((side, side))
        self._spread = spread
        strips = _strips(side)
        self._tiles = [(a, b) for i, a in enumerate(strips) for b in strips[i:]]

    def add(self, panel: np.ndarray) -> None:
        """Add rows [k, n], float64."""

        def tile(number: int) -> None:
            rows, columns = self._tiles[number]
            self.upper[rows, columns] += panel[:, rows].T @ panel[:, columns]

        if len(panel):
            self._spread(tile, len(self._tiles))

    def matrix(self) -> np.ndarray:
        """Return the symmetric sum [n, n]; the object must not be used afterwards."""
        return mirrored(self.upper)


def mirrored(upper: np.ndarray) -> np.ndarray:
    """Fill the part below the diagonal from the one above it, in place, and return the matrix."""
    strips = _strips(len(upper))
    for i, rows in enumerate(strips):
        for columns in strips[i + 1 :]:
            upper[columns, rows] = upper[rows, columns].T
    return upper


def _strips(side: int) -> list[slice]:
    borders = [*range(0, side, STRIP), side]
    return [slice(a, b) for a, b in itertools.pairwise(borders)]


@dataclass(frozen=True)
class Directions:
    """An orthonormal basis of the strongest directions of D.

    Attributes:
        vectors: [n, r] float64.
        values: [r] squared singular values (of D restricted to them), largest first, >= 0.
        total: |D|_F^2.
        missed: bound on the energy by which the best r directions would exceed these; 0 for LAPACK,
            whose own rounding is below 2 r eps total.
        path: "lapack" or "subspace".
        rounds: of the iteration, including those before it gave up.
    """

    vectors: np.ndarray
    values: np.ndarray
    total: float
    missed: float
    path: str
    rounds: int = 0

    @property
    def energy_kept(self) -> float:
        """Return the captured share of |D|_F^2; 1 for a zero matrix, of which nothing is lost."""
        return min(1.0, float(self.values.sum()) / self.total) if self.total > 0 else 1.0


def eigen(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues (largest first, rounding below 0 cut off) and eigenvectors [n, n] of G."""
    values, vectors = np.linalg.eigh(gram)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def leading(
    gram: np.ndarray,
    rank: int,
    *,
    smallest: bool = False,
    start: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
    method: str = "auto",
    spread: Spread = serially,
) -> Directions:
    """Return the ``rank`` strongest directions of D from G = D'D.

    Args:
        gram: G [n, n] float64, symmetric.
        rank: how many, 0 .. n.
        smallest: return the weakest ones instead (always LAPACK).
        start: [n, any] directions to start the iteration from, for example those of a similar matrix.
        tolerance: see `TOLERANCE`.
        method: "auto", "lapack" or "subspace" (which still falls back to LAPACK where its bound fails).
        spread: who does the pieces of the large products.
    """
    side = len(gram)
    total = float(np.trace(gram))
    if rank == 0 or total <= 0:
        return Directions(np.zeros((side, 0)), np.zeros(0), max(total, 0.0), 0.0, "lapack")
    rounds = 0
    wanted = side >= SMALL_SIDE and rank < LARGE_SHARE * side
    if not smallest and rank < side and (method == "subspace" or (method == "auto" and wanted)):
        found = _iterate(gram, rank, start, tolerance, spread)
        if isinstance(found, Directions):
            return found
        rounds = found
    values, vectors = eigen(gram)
    chosen = slice(side - rank, side) if smallest else slice(0, rank)
    return Directions(
        np.ascontiguousarray(vectors[:, chosen]), values[chosen], total, 0.0, "lapack", rounds
    )  # fmt: skip


def shrinkage(gram: np.ndarray, threshold: float) -> tuple[np.ndarray | None, np.ndarray]:
    """Return F [n, n] such that D F is D with every singular value lowered by ``threshold``, at least to 0.

    This is the minimiser of |X - D|_F^2 / 2 + threshold * |X|_* (Cai, Candes, Shen 2010). All singular
    values above the threshold are needed, and how many those are is not known before: LAPACK computes
    them all, unless |D|_F <= threshold shows that none is.

    Returns:
        F, None where it is zero; and the singular values of D that are known, largest first (with
        None, only their root sum of squares).
    """
    total = float(np.trace(gram))
    if total <= threshold * threshold:
        return None, np.array([math.sqrt(max(total, 0.0))])
    values, vectors = eigen(gram)
    singular = np.sqrt(values)
    count = int((singular > threshold).sum())
    if count == 0:
        return None, singular
    kept = vectors[:, :count]
    return (kept * (1.0 - threshold / singular[:count])) @ kept.T, singular


def _product(matrix: np.ndarray, vectors: np.ndarray, spread: Spread) -> np.ndarray:
    """Return matrix @ vectors, a panel of rows at a time."""
    result = np.empty((len(matrix), vectors.shape[1]), dtype=np.result_type(matrix, vectors))

    def panel(number: int) -> None:
        rows = slice(number * PANEL, (number + 1) * PANEL)
        np.matmul(matrix[rows], vectors, out=result[rows])

    spread(panel, -(-len(matrix) // PANEL))
    return result


def transposed_product(vectors: np.ndarray, matrix: np.ndarray, spread: Spread = serially) -> np.ndarray:
    """Return vectors' @ matrix for [m, k] and [m, n], a strip of columns at a time."""
    result = np.empty((vectors.shape[1], matrix.shape[1]), dtype=np.result_type(matrix, vectors))
    turned = np.ascontiguousarray(vectors.T)

    def strip(number: int) -> None:
        columns = slice(number * STRIP, (number + 1) * STRIP)
        result[:, columns] = turned @ matrix[:, columns]

    spread(strip, -(-matrix.shape[1] // STRIP))
    return result


@dataclass
class _Ritz:
    """Approximate eigenpairs, largest first: vectors [n, l], values [l], residuals G q - theta q [n, l]."""

    vectors: np.ndarray
    values: np.ndarray
    residuals: np.ndarray


def _rayleigh_ritz(gram: np.ndarray, vectors: np.ndarray, spread: Spread) -> _Ritz:
    basis = np.linalg.qr(vectors.astype(np.float64, copy=False))[0]
    image = _product(gram, basis, spread)
    inner = basis.T @ image
    values, turn = np.linalg.eigh((inner + inner.T) / 2)
    values, turn = values[::-1], np.ascontiguousarray(turn[:, ::-1])
    vectors = _product(basis, turn, spread)
    residuals = _product(image, turn, spread) - vectors * values
    return _Ritz(vectors, values, residuals)


def _filtered(narrow: np.ndarray, ritz: _Ritz, rank: int, spread: Spread) -> np.ndarray:
    """Return a Chebyshev filter of G applied to the Ritz vectors: small on [0, theta_l], growing fast above.

    In float32. Where the spectrum is steep, a high degree would drown the directions near theta_r in
    the rounding of the first ones: the degree is then split, with new orthonormal bases in between.
    """
    steep, half, top = _steepness(ritz, rank)
    degree = min(DEGREE, max(2, int(RANGE / steep)) if steep > 0 else DEGREE)
    vectors = ritz.vectors
    for part in range(-(-DEGREE // degree)):
        if part:
            vectors = np.linalg.qr(vectors)[0]
        vectors = _chebyshev(narrow, vectors.astype(np.float32, copy=False), degree, half, top, spread)
    return vectors


def _steepness(ritz: _Ritz, rank: int) -> tuple[float, float, float]:
    """Return by what power of e a degree pulls theta_1 and theta_r apart, theta_l / 2, and theta_1 in its terms."""
    half = max(float(ritz.values[-1]), 1e-30 * float(ritz.values[0]), 1e-300) / 2
    top = max(float(ritz.values[0]) / half - 1.0, 1.0 + 1e-6)
    last = max(float(ritz.values[rank - 1]) / half - 1.0, 1.0)
    return math.acosh(top) - math.acosh(last), half, top


def _chebyshev(
    narrow: np.ndarray, vectors: np.ndarray, degree: int, half: float, top: float, spread: Spread
) -> np.ndarray:
    """Return T_degree(G / half - 1) X, scaled by its value at ``top`` so that nothing overflows."""
    scale = 1.0 / top
    before = vectors
    now = (_product(narrow, before, spread) / np.float32(half) - before) * np.float32(scale)
    for _ in range(degree - 1):
        following = 1.0 / (2.0 * top - scale)
        step = _product(narrow, now, spread)
        step *= np.float32(2 * following / half)
        step -= np.float32(2 * following) * now
        step -= np.float32(following * scale) * before
        before, now, scale = now, step, following
    return now


def _iterate(gram, rank: int, start, tolerance: float, spread: Spread) -> Directions | int:
    """Return certified directions, or the number of rounds after which there were none."""
    side = len(gram)
    total = float(np.trace(gram))
    size = min(side, rank + max(32, rank // 4))
    vectors = _starting_vectors(side, size, start)
    norm = total / side
    narrow = (gram / norm).astype(np.float32)  # eigenvalues of order 1: float32 cannot overflow
    vectors = _product(narrow, np.linalg.qr(_product(narrow, vectors, spread))[0], spread)
    for done in range(1, ROUNDS + 1):
        ritz = _rayleigh_ritz(gram, vectors, spread)
        missed = _missed(gram, ritz, rank, total, tolerance, spread)
        if missed is not None:
            values = np.maximum(ritz.values[:rank], 0.0)
            return Directions(
                np.ascontiguousarray(ritz.vectors[:, :rank]), values, total, missed, "subspace", done
            )  # fmt: skip
        if _steepness(ritz, rank)[0] > STEEP:
            return done
        if done < ROUNDS:
            scaled = _Ritz(ritz.vectors, ritz.values / norm, ritz.residuals)
            vectors = _filtered(narrow, scaled, rank, spread)
    return ROUNDS


def _starting_vectors(side: int, size: int, start: np.ndarray | None) -> np.ndarray:
    """Return [side, size] float32: what is given, filled up with random columns."""
    given = 0 if start is None else min(size, start.shape[1])
    count = side * (size - given)
    fresh = uniform(stream_key(0, 0, "low-rank directions"), 0, count) - 0.5
    result = np.empty((side, size), dtype=np.float32)
    if start is not None and given:
        result[:, :given] = start[:, :given]
    result[:, given:] = fresh.reshape(side, size - given)
    return result


def _missed(gram, ritz: _Ritz, rank: int, total: float, tolerance: float, spread: Spread) -> float | None:
    """Return a proven bound on the missed energy if it is small enough, else None."""
    left = max(total - float(ritz.values[:rank].sum()), 0.0)
    if left <= FLOOR * total:  # whatever is missed is part of what is left
        return left
    allowed = max(tolerance * left, FLOOR * total)
    squares = np.cumsum(np.square(ritz.residuals).sum(axis=0))
    last = float(ritz.values[rank - 1])
    # Of all k >= rank the one with the best outlook; beyond k the next Ritz value is the largest known.
    outside = 0.9 * ritz.values[rank:] + 0.1 * last
    gaps = last - outside
    bounds = np.where(gaps > 0, squares[rank - 1 : -1] / np.where(gaps > 0, gaps, 1.0), np.inf)
    if not len(bounds) or bounds.min() > allowed:
        return None
    best = int(bounds.argmin())
    if not _nothing_above(gram, ritz, rank + best, float(outside[best]), spread):
        return None
    return float(bounds[best])


def _nothing_above(gram, ritz: _Ritz, count: int, bound: float, spread: Spread) -> bool:
    """Say whether every eigenvalue of G outside the first ``count`` Ritz vectors is below ``bound``."""
    q, r = ritz.vectors[:, :count], ritz.residuals[:, :count]
    # (I - QQ')G(I - QQ') = G - Q (theta Q' + R') - R Q'
    outside = _product(np.hstack([q, r]), np.vstack([(q * ritz.values[:count] + r).T, q.T]), spread)
    outside -= gram
    outside[np.diag_indices(len(outside))] += bound
    try:
        np.linalg.cholesky(outside)
    except np.linalg.LinAlgError:
        return False
    return True
