"""Reinforced Agent Merging."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgeon.kernels import cast
from surgeon.merge.method import Binding, Method, Parameter
from surgeon.merge.task_vectors import added
from surgeon.plan import Block, Operation

EPSILON = Parameter(
    "epsilon", "float", "an entry counts as changed above this difference", default=1e-5, low=0.0
)


@dataclass(frozen=True)
class Ram(Operation):
    """y = b + sum_i d_i f / max(c, 1) over changed entries; c = number of models that changed the entry.

    f is 1, or with ``boost`` (RAM+) 1 + r min(shared_i / unique_i, alpha) on entries only model i changed.
    """

    base: int
    others: tuple[int, ...]
    epsilon: float
    work: str
    boost: tuple[float, float] | None = None  # r, alpha

    name = "ram"

    @property
    def scratch(self) -> int:  # type: ignore[override]
        return 16 + 6 * len(self.others)

    def reduces(self) -> int:
        return int(self.boost is not None)

    def _changes(self, block: Block) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Return the task vectors, which entries each changed, and how many models changed an entry."""
        base = block.value(self.base, self.work)
        deltas = [cast.round_to(block.value(i, self.work) - base, self.work) for i in self.others]
        limit = self._limit(base.dtype)
        changed = [np.abs(d) > limit for d in deltas]
        count = np.zeros(base.shape, dtype=np.int32)
        for mask in changed:
            count += mask
        return deltas, changed, count

    def _limit(self, dtype: np.dtype):
        return cast.round_to(np.array([self.epsilon], dtype=dtype), self.work)[0]

    def reduce(self, step: int, block: Block, carried: None) -> np.ndarray:
        _, changed, count = self._changes(block)
        single = count == 1
        return np.array(
            [[np.count_nonzero(m & ~single), np.count_nonzero(m & single)] for m in changed], np.int64
        )

    def finish(self, step: int, state: np.ndarray, carried: None, elements: int) -> np.ndarray:
        assert self.boost is not None
        r, alpha = self.boost
        shared, unique = state[:, 0].astype(np.float32), state[:, 1].astype(np.float32)
        ratio = shared / np.maximum(unique, np.float32(max(self.epsilon, 1e-30)))
        return np.float32(1) + np.float32(r) * np.clip(ratio, np.float32(0), np.float32(alpha))

    def map(self, block: Block, carried: np.ndarray | None) -> list[np.ndarray]:
        deltas, changed, count = self._changes(block)
        base = block.value(self.base, self.work)
        wide = base.dtype.type
        total = np.zeros(base.shape, dtype=wide)
        divisor = np.maximum(count, 1).astype(wide)
        for i, (delta, mask) in enumerate(zip(deltas, changed, strict=True)):
            part = cast.round_to(np.where(mask, delta, wide(0)) / divisor, self.work)
            if carried is not None:
                part = np.where(count == 1, part * wide(carried[i]), part)
            total += part
        if carried is not None:  # the float32 factor leaves mergekit's result in float32
            return [added(base, total)]
        return [cast.round_to(added(base, cast.round_to(total, self.work)), self.work)]


def bind(b: Binding) -> Operation:
    assert b.base is not None
    return Ram(b.base, b.others, float(b.shared["epsilon"]), b.work)


METHOD = Method(
    name="ram",
    title="Reinforced Agent Merging",
    summary="Averages what several models changed, keeps in full what only one changed.",
    bind=bind,
    base="required",
    models=(2, None),
    parameters=(EPSILON,),
    reference="arXiv 2601.13572",
    page="""An entry counts as changed by a model if it moved by more than epsilon. Entries changed by one model take its whole
change, entries changed by several take the mean of their changes, all others stay as in the base.""",
)
