"""The door to the compiled kernels: each function returns None where the NumPy path must do it.

Results are bit for bit those of NumPy (tests compare them), so which path ran cannot be seen in the
output. Whether compiled code is used is decided here and nowhere else: numba must be there and able
to keep its cache, and the run must be large enough to pay for loading it (`prepare`).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from surgeon.kernels import lanes, select

WORTH_BYTES = 150_000_000
"""Bytes a run reads for arithmetic, over all passes, from which loading numba (0.5 s) pays."""

_lock = threading.Lock()
_module: ModuleType | None = None
_broken = False
_problem = ""
_forced: bool | None = None
_wanted = False


def enable(on: bool | None) -> None:
    """Force compiled kernels on or off; None returns to deciding by size."""
    global _forced
    _forced = on


def prepare(nbytes: int) -> None:
    """Decide for a run that reads ``nbytes`` for arithmetic (all passes together)."""
    global _wanted
    _wanted = nbytes >= WORTH_BYTES


def problem() -> str:
    """Return why compiled kernels that this run was large enough for are not in use; "" when they are."""
    return _problem


def available() -> bool:
    """Return whether compiled kernels are in use."""
    return _kernels() is not None


def _kernels() -> ModuleType | None:
    global _module, _broken, _problem
    if _forced is False or _broken or not (_forced or _wanted):
        return None
    if _module is None:
        with _lock:
            if _module is None and not _broken:
                try:
                    from surgeon.kernels import compiled
                except Exception as error:  # no numba, or one that cannot write its cache: NumPy does it all
                    _broken, _problem = True, f"{type(error).__name__}: {error}"
                    return None
                _module = compiled
    return _module


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a failure to compile, or to use the cache of compiled code, into "NumPy must do it".

    The kernels themselves raise nothing; a full disk or a damaged cache file must not end a merge.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        global _broken, _problem
        try:
            return function(*arguments)
        except MemoryError:
            raise
        except Exception as error:
            _broken, _problem = True, f"{type(error).__name__}: {error}"
            return None

    return call


def _operands(block: Any, indices: tuple[int, ...], work: str) -> tuple[tuple[np.ndarray, ...], Any] | None:
    """Return the inputs as bits and the shift that widens them, or None for types without a kernel."""
    if work not in {"F32", "BF16"} or block.stop == block.start:
        return None
    raw = [block.raw[i] for i in indices]
    if all(block.codes[i] == "BF16" for i in indices) and all(r.dtype == np.uint16 for r in raw):
        return tuple(np.ascontiguousarray(r) for r in raw), np.uint32(16)
    if work == "BF16" and any(
        block.codes[i] == "BF16" and r.dtype != np.uint16 for i, r in zip(indices, raw, strict=True)
    ):
        return None  # a view that computes: its values are not rounded again
    values = [block.value(i, work) for i in indices]
    return tuple(np.ascontiguousarray(v, dtype=np.float32).view(np.uint32) for v in values), np.uint32(0)


def _result(block: Any, bits: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return what the caller gets, the array the kernel fills, and whether that is bfloat16."""
    count = block.stop - block.start
    if bits and block.target == "BF16":
        out = np.empty(count, np.uint16)
        return out, out, True
    values = np.empty(count, np.float32)
    return values, values.view(np.uint32), False


@_guarded
def nonfinite(raw: np.ndarray, code: str) -> bool | None:
    """Return whether a block holds NaN or Inf; None where NumPy must look."""
    kernels = _module if _forced is not False and not _broken else None  # small data loads nothing
    if kernels is None or code != "BF16" or raw.dtype != np.uint16 or not raw.flags.c_contiguous:
        return None
    return bool(kernels.nonfinite16(raw))


@_guarded
def linear(block: Any, weights: tuple[float, ...], normalize: bool, work: str) -> np.ndarray | None:
    """See `surgeon.merge.methods.linear.Linear.map`."""
    kernels = _kernels()
    operands = _operands(block, tuple(range(len(block.raw))), work) if kernels else None
    if kernels is None or operands is None:
        return None
    single = np.array(weights, dtype=np.float32)
    result, out, packed = _result(block, True)
    kernels.linear(
        operands[0], operands[1], single.astype(np.float64), single.sum(dtype=np.float32), normalize, work == "BF16",
        out, packed,
    )  # fmt: skip
    return result


@_guarded
def delta_histogram(block: Any, other: int, base: int, work: str) -> np.ndarray | None:
    """Return `select.high_histogram` of the magnitudes of one task vector."""
    kernels = _kernels()
    operands = _operands(block, (base, other), work) if kernels else None
    if kernels is None or operands is None:
        return None
    (b, x), shift = operands
    counts = np.zeros((2, select.HIGH_BINS), np.uint32)
    kernels.delta_high(b, x, shift, work == "BF16", counts)
    return (counts[0] + counts[1]).astype(np.int64)


@_guarded
def delta_low_counts(
    block: Any, other: int, base: int, work: str, bins: list[int]
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Return `select.low_counts` of the magnitudes of one task vector, for each bin."""
    kernels = _kernels()
    operands = _operands(block, (base, other), work) if kernels else None
    if kernels is None or operands is None:
        return None
    (b, x), shift = operands
    found = []
    for wanted in bins:
        counts = np.zeros(1 << select.LOW_BITS, np.uint32)
        if wanted >= 0:
            kernels.delta_low(b, x, shift, work == "BF16", np.uint32(wanted), counts)
        present = np.flatnonzero(counts)
        found.append((present.astype(np.uint16), counts[present].astype(np.int64)))
    return found


def _limits(operation: Any, block: Any, facts: Any, i: int, kernels: ModuleType):
    """Return mode, limits and starting phases of one task vector's mask, see `compiled._mask`."""
    limits = np.zeros(9, np.int64)
    phases = np.zeros(2, np.int64)
    density = operation.densities[i]
    if operation.sparsifier == "none" or density >= 1:
        return kernels.KEEP, limits, phases
    if density <= 0:
        return kernels.DROP, limits, phases
    if operation.sparsifier == "random":
        limits[7] = np.array([operation.keys[i]], np.uint64).view(np.int64)[0]
        limits[8] = math.ceil(density * (1 << 53))  # a draw k / 2^53 is below density iff k is below this
        return kernels.RANDOM, limits, phases
    if operation.sparsifier == "magprune":
        return kernels.RANKED, limits, phases
    outer, inner = facts.thresholds[i]
    where = (block.position, block.ordinal)
    if outer.nothing or (inner is not None and inner.everything):
        return kernels.DROP, limits, phases
    if outer.everything:
        limits[:3] = 0, 1, 1
    else:
        limits[:3] = outer.key, outer.quota, outer.ties
        phases[0] = outer.before[where] * outer.quota % outer.ties
    if inner is None or inner.nothing:
        return (kernels.KEEP if outer.everything else kernels.ABOVE), limits, phases
    limits[3:6] = inner.key, inner.quota, inner.ties
    if not outer.everything and outer.key == inner.key:
        limits[6] = 1
        number = outer.before[where] * outer.quota // outer.ties
        phases[1] = number * inner.quota % outer.quota
    else:
        phases[1] = inner.before[where] * inner.quota % inner.ties
    return kernels.BAND, limits, phases


@_guarded
def ranked_keep(operation: Any, block: Any, i: int) -> np.ndarray | None:
    """Return the mask of DELLA's drop by rank for one task vector."""
    kernels = _kernels()
    if kernels is None or block.columns < 2:
        return None
    operands = _operands(block, (operation.base, operation.others[i]), operation.work)
    if operands is None:
        return None
    (b, x), shift = operands
    density, epsilon = operation.densities[i], operation.epsilons[i]
    keep = np.empty(block.stop - block.start, np.bool_)
    kernels.ranked_keep(
        b, x, shift, operation.work == "BF16", block.columns, block.start, np.uint64(operation.keys[i]),
        density - epsilon, 2 * epsilon / (block.columns - 1), keep,
    )  # fmt: skip
    return keep


@_guarded
def delta_l1(operation: Any, block: Any, facts: Any, i: int) -> tuple[float, float] | None:
    """Return sum |d| and sum |M d| of one task vector in lane order."""
    kernels = _kernels()
    operands = _operands(block, (operation.base, operation.others[i]), operation.work) if kernels else None
    if kernels is None or operands is None:
        return None
    (b, x), shift = operands
    mode, limits, phases = _limits(operation, block, facts, i, kernels)
    ranked = np.empty(0, np.bool_)
    if mode == kernels.RANKED:
        found = ranked_keep(operation, block, i)
        if found is None:
            return None
        ranked = found
    before, after = np.zeros(lanes.LANES), np.zeros(lanes.LANES)
    kernels.delta_l1(
        b, x, shift, operation.work == "BF16", mode, block.start, limits, phases, ranked, before, after
    )
    return float(lanes.collapse(before)), float(lanes.collapse(after))


@_guarded
def task_vectors(operation: Any, block: Any, facts: Any, bits: bool = True) -> np.ndarray | None:
    """See `surgeon.merge.task_vectors.TaskVectors.map`; ``bits`` allows the output's own type."""
    kernels = _kernels()
    operands = _operands(block, (operation.base, *operation.others), operation.work) if kernels else None
    if kernels is None or operands is None:
        return None
    arrays, shift = operands
    count = len(operation.others)
    found = [_limits(operation, block, facts, i, kernels) for i in range(count)]
    modes = np.array([mode for mode, _, _ in found], np.int64)
    ranked = np.empty((count, 0), np.bool_)
    if (modes == kernels.RANKED).any():
        ranked = np.empty((count, block.stop - block.start), np.bool_)
        for i in np.flatnonzero(modes == kernels.RANKED):
            keep = ranked_keep(operation, block, int(i))
            if keep is None:
                return None
            ranked[i] = keep
    weights = np.array([operation._scalar(w) for w in operation.weights], np.float32)
    scales = np.array([operation._scalar(operation._rescaling(i, facts)) for i in range(count)], np.float32)
    result, out, packed = _result(block, bits)
    kernels.task_vectors(
        arrays, shift, operation.work == "BF16", modes, block.start, np.stack([x for _, x, _ in found]),
        np.stack([x for _, _, x in found]), ranked, scales, weights, operation.elect, operation.normalize,
        operation._total_weight(weights), np.float32(operation.lam), out, packed,
    )  # fmt: skip
    return result


@_guarded
def gram(block: Any, inputs: tuple[int, ...], base: int | None, work: str) -> np.ndarray | None:
    """Return the Gram matrix [n, n] of inputs (or their differences from ``base``) in lane order."""
    kernels = _kernels()
    indices = inputs if base is None else (*inputs, base)
    operands = _operands(block, indices, work) if kernels else None
    if kernels is None or operands is None:
        return None
    n = len(inputs)
    sums = np.zeros((n * (n + 1) // 2, lanes.LANES))
    kernels.gram(*operands, work == "BF16", base is not None, sums)
    result = np.empty((n, n))
    upper = np.triu_indices(n)
    result[upper] = result.T[upper] = lanes.collapse(sums)
    return result


@_guarded
def combine(
    block: Any, inputs: tuple[int, ...], base: int | None, coefficients: np.ndarray, work: str
) -> np.ndarray | None:
    """Return sum_i c_i x_i, or b + sum_i c_i (x_i - b), for one coefficient per input."""
    kernels = _kernels()
    indices = inputs if base is None else (*inputs, base)
    operands = _operands(block, indices, work) if kernels else None
    if kernels is None or operands is None:
        return None
    result, out, packed = _result(block, True)
    kernels.combine(*operands, work == "BF16", base is not None, coefficients.astype(np.float32), out, packed)
    return result


@_guarded
def variance_histogram(operation: Any, block: Any) -> np.ndarray | None:
    """Return SCE's histogram of variances, with the number of non-zero ones after it."""
    kernels = _kernels()
    operands = _operands(block, (operation.base, *operation.others), operation.work) if kernels else None
    if kernels is None or operands is None:
        return None
    histogram = np.zeros(select.HIGH_BINS + 1, np.int64)
    kernels.variance_count(*operands, operation.work == "BF16", -1, histogram, np.zeros(1, np.uint32))
    return histogram


@_guarded
def variance_low_counts(operation: Any, block: Any, wanted: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return `select.low_counts` of SCE's variances."""
    kernels = _kernels() if wanted >= 0 else None
    operands = _operands(block, (operation.base, *operation.others), operation.work) if kernels else None
    if kernels is None or operands is None:
        return None
    counts = np.zeros(1 << select.LOW_BITS, np.uint32)
    kernels.variance_count(*operands, operation.work == "BF16", wanted, np.zeros(1, np.int64), counts)
    present = np.flatnonzero(counts)
    return present.astype(np.uint16), counts[present].astype(np.int64)


def _selection(operation: Any, block: Any, facts: Any, kernels: ModuleType):
    """Return mode, limits and starting phases of SCE's mask, or None where nothing is selected."""
    limits, phases = np.zeros(9, np.int64), np.zeros(2, np.int64)
    if operation.topk >= 1:
        return kernels.KEEP, limits, phases
    threshold = facts.threshold if facts is not None else None
    if operation.topk <= 0 or threshold is None or threshold.nothing:
        return None
    if threshold.everything:
        return kernels.KEEP, limits, phases
    limits[:3] = threshold.key, threshold.quota, threshold.ties
    phases[0] = threshold.before[block.position, block.ordinal] * threshold.quota % threshold.ties
    return kernels.ABOVE, limits, phases


@_guarded
def selected_squares(operation: Any, block: Any, facts: Any) -> np.ndarray | None:
    """Return the sum of squares of each of SCE's selected task vectors, in lane order."""
    kernels = _kernels()
    chosen = _selection(operation, block, facts, kernels) if kernels else None
    operands = _operands(block, (operation.base, *operation.others), operation.work) if chosen else None
    if kernels is None or chosen is None or operands is None:
        return None
    sums = np.zeros((len(operation.others), lanes.LANES))
    kernels.selected_squares(*operands, operation.work == "BF16", *chosen, sums)
    return lanes.collapse(sums)


@_guarded
def elected_mean(
    operation: Any, block: Any, facts: Any, weights: np.ndarray, tiny: np.float32
) -> np.ndarray | None:
    """See `surgeon.merge.methods.sce.Sce.map`."""
    kernels = _kernels()
    chosen = _selection(operation, block, facts, kernels) if kernels else None
    operands = _operands(block, (operation.base, *operation.others), operation.work) if chosen else None
    if kernels is None or chosen is None or operands is None:
        return None
    result, out, packed = _result(block, True)
    kernels.elected_mean(
        *operands,
        operation.work == "BF16",
        *chosen,
        weights.astype(np.float32),
        np.float32(tiny),
        out,
        packed,
    )
    return result
