"""SCE: select, calculate, erase."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.kernels import cast, fused, lanes, select
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.merge.task_vectors import added
from surgeon.plan import Block, Operation

TINY_TOTAL = 1e-6
TINY_DIVISOR = 1e-6


@dataclass
class Facts:
    """What the reduce passes learned."""

    rank: select.Rank = field(default_factory=lambda: select.Rank(0))
    threshold: select.Threshold | None = None
    weights: np.ndarray | None = None
    adaptive: bool = True


@dataclass(frozen=True)
class Sce(Operation):
    """d_i = S (x_i - b) with S the topk entries of largest variance across models; a_i = mean d_i^2 / sum.

    s = sign of sum_i d_i (0 counts as +); y = b + sum_i [sign d_i = s] a_i d_i / sum_i [sign d_i = s] a_i
    """

    base: int
    others: tuple[int, ...]
    topk: float
    work: str

    name = "sce"

    @property
    def scratch(self) -> int:  # type: ignore[override]
        return 40 + 4 * len(self.others)

    def _selects(self) -> bool:
        return 0 < self.topk < 1

    def reduces(self) -> int:
        return 3 if self._selects() else 1

    def _stage(self, step: int) -> str:
        return ("high", "low", "squares")[step] if self._selects() else "squares"

    def _deltas(self, block: Block) -> list[np.ndarray]:
        base = block.value(self.base, self.work)
        return [cast.round_to(block.value(i, self.work) - base, self.work) for i in self.others]

    def _variance_keys(self, deltas: list[np.ndarray]) -> np.ndarray:
        """Return keys of the variance across models (Welford's recurrence in float64, as in torch)."""
        mean = np.zeros(deltas[0].shape)
        square = np.zeros(deltas[0].shape)
        for count, delta in enumerate(deltas, start=1):
            step = delta - mean
            mean += step / count
            square += step * (delta - mean)
        square /= len(deltas)
        wide = square.astype(deltas[0].dtype)
        return select.keys(cast.round_to(wide, self.work))

    def _selected(self, block: Block, facts: Facts | None) -> list[np.ndarray]:
        deltas = self._deltas(block)
        if self.topk >= 1:
            return deltas
        if self.topk <= 0:
            return [np.zeros_like(d) for d in deltas]
        assert facts is not None and facts.threshold is not None
        mask = select.keep_mask(self._variance_keys(deltas), facts.threshold, (block.position, block.ordinal))
        return [np.where(mask, d, d.dtype.type(0)) for d in deltas]

    def reduce(self, step: int, block: Block, carried: Facts | None) -> Any:
        stage = self._stage(step)
        if stage == "squares":
            done = fused.selected_squares(self, block, carried)
            if done is not None:
                return done
            squares = [cast.round_to(np.square(d), self.work) for d in self._selected(block, carried)]
            return np.array([lanes.total(s.astype(np.float64)) for s in squares])
        if stage == "high":
            done = fused.variance_histogram(self, block)
            if done is not None:
                return done
        elif carried is not None:
            pair = fused.variance_low_counts(self, block, carried.rank.bin)
            if pair is not None:
                return [((block.position, block.ordinal), *pair)]
        key = self._variance_keys(self._deltas(block))
        if stage == "high":
            return np.append(select.high_histogram(key), np.count_nonzero(key))
        assert carried is not None
        return [((block.position, block.ordinal), *select.low_counts(key, carried.rank))]

    def finish(self, step: int, state: Any, carried: Facts | None, elements: int) -> Facts:
        facts = carried or Facts()
        stage = self._stage(step)
        if stage == "high":
            facts.rank = select.locate(state[:-1], int(int(state[-1]) * self.topk))
        elif stage == "low":
            facts.threshold = select.resolve(facts.rank, state)
        else:
            facts.weights, facts.adaptive = self._weights(state, elements)
        return facts

    def _weights(self, sums: np.ndarray, elements: int) -> tuple[np.ndarray, bool]:
        wide = np.float64 if self.work == "F64" else np.float32
        means = cast.round_to((sums / max(1, elements)).astype(wide), self.work)
        total = cast.round_to(means.sum(keepdims=True, dtype=wide), self.work)[0]
        if abs(total) < TINY_TOTAL:
            return cast.round_to(np.full(len(means), 1.0 / len(means), dtype=wide), self.work), False
        return cast.round_to(means / total, self.work), True

    def map(self, block: Block, carried: Facts) -> list[np.ndarray]:
        assert carried.weights is not None
        limit = cast.round_to(np.array([TINY_DIVISOR], dtype=np.float32), self.work)[0]
        done = fused.elected_mean(self, block, carried, carried.weights, limit)
        if done is not None:
            return [done]
        deltas = self._selected(block, carried)
        base = block.value(self.base, self.work)
        wide = base.dtype.type
        total = np.zeros(base.shape, dtype=wide)
        for delta in deltas:
            total += delta
        positive = cast.round_to(total, self.work) >= 0
        mixed = np.zeros(base.shape, dtype=wide)
        divisor = np.zeros(base.shape, dtype=wide)
        for delta, weight in zip(deltas, carried.weights.astype(wide), strict=True):
            agrees = np.where(positive, delta > 0, delta < 0)
            mixed += np.where(agrees, cast.round_to(delta * weight, self.work), wide(0))
            divisor += np.where(agrees, weight, wide(0))
        tiny = cast.round_to(np.array([TINY_DIVISOR], dtype=wide), self.work)
        divisor = np.maximum(cast.round_to(divisor, self.work), tiny)
        mixed = cast.round_to(cast.round_to(mixed, self.work) / divisor, self.work)
        return [cast.round_to(added(base, mixed), self.work)]

    def summary(self, carried: Facts | None, measured: np.ndarray | None) -> dict[str, Any] | None:
        """Report the weights, and when light fine-tunes switched the adaptive ones off."""
        if carried is None or carried.weights is None:
            return None
        return {"weights": [float(w) for w in carried.weights], "adaptive": carried.adaptive}


def bind(b: Binding) -> Operation:
    assert b.base is not None
    return Sce(b.base, b.others, float(b.shared["select_topk"]), b.work)


METHOD = Method(
    name="sce",
    title="SCE",
    summary="Keeps entries where the models disagree most, weights models by the size of their change.",
    bind=bind,
    base="required",
    models=(2, None),
    parameters=(
        Parameter("select_topk", "float", "fraction of the entries kept, by variance across models", default=1.0,
                  low=0.0, high=1.0),
        Parameter("int8_mask", "bool", "no effect; accepted from mergekit YAML", default=False, inert=True),
    ),
    reference="Wan et al. 2024, FuseChat, arXiv 2408.07990",
    page="""Selects the select_topk share (of the entries that vary at all) with the largest variance across models, weights each
model by the mean square of its selected task vector, elects the sign of the sum at every entry and averages the
agreeing ones.

When the mean squares sum to less than 1e-6 (root mean square changes below 7e-4 for two models) all weights are equal;
the report says so. With one model the variance is 0 everywhere: select_topk below 1 gives the base.""",
)  # fmt: skip
