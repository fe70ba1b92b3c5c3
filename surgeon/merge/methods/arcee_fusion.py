"""Arcee Fusion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.kernels import cast, select
from surgeon.merge.method import Binding, Method
from surgeon.merge.task_vectors import added
from surgeon.plan import Block, Operation

EPSILON = 1e-8  # added to probabilities before the logarithm
QUANTILES = (0.25, 0.5, 0.75)


@dataclass
class Facts:
    """Ranks, then values, of the quartiles; the threshold made of them."""

    ranks: list[select.Rank] = field(default_factory=list)
    threshold: float = 0.0
    counted: int = 0


@dataclass(frozen=True)
class ArceeFusion(Operation):
    """y = b + d [importance >= median + 1.5 (q3 - q1)], d = x - b, importance = |d| KL(softmax x || softmax b).

    The divergence is that of the row. Quartiles are exact order statistics at floor(q (N - 1)),
    where mergekit samples a million entries at random.
    """

    base: int
    other: int
    work: str

    name = "arcee_fusion"
    unit = "row"
    scratch = 72

    def reduces(self) -> int:
        return 2

    def _importance(self, block: Block) -> np.ndarray:
        columns = block.columns
        b, x = block.value(self.base, self.work), block.value(self.other, self.work)
        wide = b.dtype.type
        distance = cast.round_to(np.abs(x - b), self.work)
        if not b.size:
            return distance
        p, q = (self._softmax(v.reshape(-1, columns)) for v in (x, b))
        if self.work in {"BF16", "F16"}:  # every step rounds, and so may make a divergence negative
            ratio = cast.round_to(np.log(cast.round_to(p / q, self.work)), self.work)
            terms = cast.round_to(p * ratio, self.work)
            divergence = cast.round_to(
                terms.sum(axis=1, keepdims=True, dtype=np.float64).astype(wide), self.work
            )
        else:
            divergence = np.maximum((p * np.log(p / q)).sum(axis=1, keepdims=True), 0).astype(wide)
        return cast.round_to((distance.reshape(-1, columns) * divergence).reshape(-1), self.work)

    def _softmax(self, rows: np.ndarray) -> np.ndarray:
        wide = rows.astype(np.float64, copy=False)
        e = np.exp(wide - wide.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
        if self.work not in {"BF16", "F16"}:
            return p + EPSILON  # in float64: with float32 the divergence of a light fine-tune is all rounding
        p = cast.round_to(p.astype(np.float32), self.work)
        # In float16 a small probability is 0 even after adding epsilon; the smallest number keeps ln finite.
        return np.maximum(cast.round_to(p + np.float32(EPSILON), self.work), np.float32(2.0**-24))

    def _keys(self, importance: np.ndarray) -> np.ndarray:
        """Return 31-bit keys that order like the importance; 16-bit types have a bit to spare for the sign."""
        if self.work not in {"BF16", "F16"}:
            return select.keys(importance)
        raw = cast.narrow(importance, self.work).view(np.uint16).astype(np.uint32)
        ordered = np.where(raw & 0x8000, np.uint32(0xFFFF) - raw, raw + np.uint32(0x8000))
        return ordered << np.uint32(select.LOW_BITS)

    def _value(self, key: int) -> float:
        if self.work not in {"BF16", "F16"}:
            return float(np.array([key], np.uint32).view(np.float32)[0])
        ordered = key >> select.LOW_BITS
        raw = ordered - 0x8000 if ordered & 0x8000 else 0xFFFF - ordered
        bits = np.array([raw], np.uint16)
        return float(cast.widen(bits if self.work == "BF16" else bits.view(np.float16), self.work)[0])

    def reduce(self, step: int, block: Block, carried: Facts | None) -> Any:
        key = self._keys(self._importance(block))
        if step == 0:
            return select.high_histogram(key)
        assert carried is not None
        where = (block.position, block.ordinal)
        return [[(where, *select.low_counts(key, rank))] for rank in carried.ranks]

    def merge(self, step: int, left: Any, right: Any) -> Any:
        return left + right if step == 0 else [a + b for a, b in zip(left, right, strict=True)]

    def finish(self, step: int, state: Any, carried: Facts | None, elements: int) -> Facts:
        if step == 0:
            # The entry at index i from below is the (N - i)-th largest.
            wanted = [elements - int(q * (elements - 1)) for q in QUANTILES] if elements else []
            return Facts([select.locate(state, k, exact=True) for k in wanted])
        assert carried is not None
        if not carried.ranks:
            return carried
        wide = np.float64 if self.work == "F64" else np.float32
        q1, median, q3 = (
            wide(self._value(select.resolve(rank, pieces).key))
            for rank, pieces in zip(carried.ranks, state, strict=True)
        )

        def rounded(value) -> Any:
            return cast.round_to(np.array([value], dtype=wide), self.work)[0]

        carried.threshold = float(rounded(median + rounded(wide(1.5) * rounded(q3 - q1))))
        return carried

    def map(self, block: Block, carried: Facts) -> list[np.ndarray]:
        b, x = block.value(self.base, self.work), block.value(self.other, self.work)
        importance = self._importance(block)
        if self.work == "F64":  # the quartiles were taken of float32 keys
            importance = importance.astype(np.float32)
        delta = cast.round_to(x - b, self.work)
        # mergekit's float32 mask leaves its result in float32; the output's own type rounds it.
        return [added(b, np.where(importance >= carried.threshold, delta, delta.dtype.type(0)))]

    def measure(self, block: Block, results: list[np.ndarray], carried: Facts) -> np.ndarray:
        importance = self._importance(block).astype(np.float32, copy=False)
        return np.array(
            [importance.size, np.count_nonzero(importance >= carried.threshold)], dtype=np.float64
        )

    def summary(self, carried: Facts | None, measured: np.ndarray | None) -> dict[str, Any] | None:
        if carried is None or measured is None:
            return None
        return {"threshold": carried.threshold, "elements": float(measured[0]), "kept": float(measured[1])}


def bind(b: Binding) -> Operation:
    assert b.base is not None
    return ArceeFusion(b.base, b.others[0], b.work)


METHOD = Method(
    name="arcee_fusion",
    title="Arcee Fusion",
    summary="Takes over only the entries whose change stands out within its tensor.",
    bind=bind,
    base="required",
    models=(2, 2),
    reference="Arcee AI 2025 (mergekit arcee_fusion)",
    page="""Importance of an entry = |x - b| times the divergence between the softmax of its row in the two models. Entries with
importance of at least median + 1.5 (q3 - q1) become the other model's, all else stays as in the base.

Quartiles are exact and deterministic (mergekit samples tensors above a million entries). The result has the type the
configuration announces (mergekit writes float32; --mergekit-quirks does, too).""",
)
