"""Compiled versions of the hot loops; each returns None where the NumPy path must do it.

Filled by `surgeon.kernels.compiled` when numba is usable and the job is large enough for its
start-up cost. Results are bit-identical to the NumPy paths (tests compare them).
"""

from __future__ import annotations


def linear(raw, codes, weights, normalize, work):
    return None


def delta_histogram(block, other, base, work):
    return None


def delta_low_counts(block, other, base, work, bins):
    return None


def task_vectors(operation, block, facts):
    return None
