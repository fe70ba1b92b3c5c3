"""From the scales of a site to the tensors that carry them.

What comes out of a norm in 16 bits is rounded: g / s becomes a stored g'. What reads it is therefore multiplied by
t = g / g', the scale that was really applied, not by s; so rounding the gain costs nothing, and what is left is the
rounding of the scaled matrices to their storage type, before they are quantized (and of those that are not quantized).
In bfloat16 that is a relative error of up to 2^-8 for each weight, 1e-6 of the output's energy; rounding to 8 bits costs
30 times as much, to 4 bits thousands of times. Rows of matrices are divided in their storage type: there each weight
takes a rounding of its own, which nothing can take back. Shifts of norms and biases are divided by t and rounded.

A norm that multiplies by 1 + w stores w' = g / s - 1. Near w' = -1 bfloat16 has steps of 2^-8; t makes up for them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.kernels.cast import narrow, widen
from surgeon.quantize.awq_sites import Site
from surgeon.quantize.scaled_view import Factor

FARTHEST = 1.5
"""A gain whose rounding is off by more than this factor is left as it is."""


@dataclass(frozen=True)
class Folded:
    """What folding changes: ``scales`` float32 [width] are those that were really applied."""

    factors: tuple[Factor, ...]
    vectors: dict[str, np.ndarray]
    scales: np.ndarray


def fold(checkpoint: Checkpoint, site: Site, scales: np.ndarray) -> Folded:
    """Return what carries the scales of a site.

    Args:
        scales: float32 [width], above 0; the vector is divided by them.
    """
    scales = np.ascontiguousarray(scales, dtype=np.float32)
    if site.kind == "norm":
        gain, *shifts = (span.tensor for span in site.producers)
        vectors = {}
        vectors[gain], scales = _divided_gain(checkpoint, gain, scales, site.offset)
        for name in shifts:
            code = checkpoint.tensors[name].dtype
            vectors[name] = narrow(_vector(checkpoint, name) / scales, code)
        factors = [Factor(span, scales) for span in site.consumers]
        return Folded(tuple(factors), vectors, scales)
    below = (np.float32(1.0) / scales).astype(np.float32)
    factors = [Factor(span, below) for span in site.producers]
    return Folded((*factors, *(Factor(span, scales) for span in site.consumers)), {}, scales)


def scalable(checkpoint: Checkpoint, site: Site) -> np.ndarray:
    """Return which inputs may be scaled, bool [width]: a gain of 0 has no scale."""
    if site.kind != "norm":
        return np.ones(site.width, dtype=bool)
    return _vector(checkpoint, site.producers[0].tensor) + site.offset != 0


def _divided_gain(
    checkpoint: Checkpoint, name: str, scales: np.ndarray, offset: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored weight of a norm whose gain is divided, and by what it really was, float32."""
    code = checkpoint.tensors[name].dtype
    stored = checkpoint.read(name, 0, checkpoint.tensors[name].elements)
    gain = widen(stored, code).astype(np.float64) + offset
    divided = narrow((gain / scales - offset).astype(np.float64 if code == "F64" else np.float32), code)
    with np.errstate(divide="ignore", invalid="ignore"):
        actual = gain / (widen(divided, code).astype(np.float64) + offset)
        far = actual / scales
    good = np.isfinite(actual) & (far < FARTHEST) & (far > 1 / FARTHEST)
    kept = narrow(widen(stored, code), code)
    return np.where(good, divided, kept), np.where(good, actual, 1.0).astype(np.float32)


def _vector(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return a vector, float64."""
    info = checkpoint.tensors[name]
    return widen(checkpoint.read(name, 0, info.elements), info.dtype).astype(np.float64)
