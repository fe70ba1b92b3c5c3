"""A checkpoint whose token-indexed tensors are seen in the merged vocabulary's row order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import TensorInfo
from surgeon.merge.aligned_rows import AlignedRows, VocabularyPlan


class AlignedView:
    """One model under a vocabulary plan; everything else is passed through.

    Args:
        key: the model's key in the plan.
        inner: the checkpoint as stored.
        aligned: tensor name -> shared `AlignedRows`.
        plan: the vocabulary plan.
    """

    def __init__(
        self, key: str, inner: Checkpoint, aligned: Mapping[str, AlignedRows], plan: VocabularyPlan
    ) -> None:
        self._key = key
        self._inner = inner
        self._aligned = {name: rows for name, rows in aligned.items() if name in inner.tensors}
        self.label = inner.label
        self.folder = inner.folder
        self.config = inner.config
        self.headers = inner.headers
        digest = hashlib.sha256(getattr(inner, "identity", "").encode())
        digest.update(plan.row_maps[key].source.tobytes() if key in plan.row_maps else b"")
        digest.update(repr((plan.rows, sorted(plan.overrides.items()), plan.base, plan.pad_from)).encode())
        self.identity = digest.hexdigest()
        self.tensors: dict[str, TensorInfo] = dict(inner.tensors)
        for name in self._aligned:
            info = inner.tensors[name]
            self.tensors[name] = replace(info, shape=(plan.rows, *info.shape[1:]))

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        rows = self._aligned.get(name)
        if rows is None:
            return self._inner.read(name, start, stop)
        return rows.elements(self._key, name, start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self._aligned:
            raise AssertionError(f"{name} is rearranged; it has no stored bytes")
        return self._inner.read_bytes(name, start, stop)

    def granularity(self, name: str) -> int:
        rows = self._aligned.get(name)
        return rows.cols if rows is not None else self._inner.granularity(name)

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._inner, "computed", None)
        return name in self._aligned or (inner is not None and inner(name))


def align_models(
    opened: Mapping[str, Checkpoint], plan: VocabularyPlan, names: Mapping[str, list[str]], rounding: str
) -> dict[str, Checkpoint]:
    """Wrap every model whose rows move.

    Args:
        opened: key -> checkpoint.
        plan: from `surgeon.merge.vocabulary.plan_vocabulary`.
        names: key -> its token-indexed tensors.
        rounding: "F32", or the type in which mergekit would average rows.
    """
    tensors = list(dict.fromkeys(n for found in names.values() for n in found))
    aligned: dict[str, AlignedRows] = {}

    def read(key: str, name: str, start: int, stop: int) -> np.ndarray:
        return opened[key].read(name, start, stop)

    for name in tensors:
        owners = [key for key in opened if name in names.get(key, [])]
        sizes = {opened[key].tensors[name].shape[0] for key in owners}
        if all(plan.is_identity(rows) for rows in sizes):
            continue
        columns = prod(opened[owners[0]].tensors[name].shape[1:])
        aligned[name] = AlignedRows(plan, read, max(1, columns), models=owners, rounding=rounding)
    if not aligned:
        return dict(opened)
    views: dict[str, Checkpoint] = {}
    for key, checkpoint in opened.items():
        views[key] = AlignedView(key, checkpoint, aligned, plan)
    return views
