"""Counter-based random numbers: the value at an element depends on nothing but its address.

A stream is keyed by (seed, input ordinal, tensor name); element i of it is SplitMix64 of
key + (i + 1) * gamma. So blocks, threads, order and resumption cannot change a draw, which a
sequential generator cannot promise. Reference: Steele, Lea, Flood, "Fast Splittable
Pseudorandom Number Generators", OOPSLA 2014 (the finaliser is Stafford's variant 13).
"""

from __future__ import annotations

import hashlib

import numpy as np

GAMMA = 0x9E3779B97F4A7C15
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, ordinal: int, name: str) -> int:
    """Return the 64-bit key of one input tensor's stream."""
    text = f"{seed}\x00{ordinal}\x00{name}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def uniform(key: int, start: int, stop: int) -> np.ndarray:
    """Return float64 numbers in [0, 1) for elements start..stop-1 of a stream, 53 bits each."""
    counter = np.arange(start + 1, stop + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = counter * np.uint64(GAMMA)
        z += np.uint64(key)
        z ^= z >> np.uint64(30)
        z *= _M1
        z ^= z >> np.uint64(27)
        z *= _M2
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))
