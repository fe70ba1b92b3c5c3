"""A model whose difference from the base is cut to low rank, or scaled, while it is read.

    y = b + f * lowrank_r(x - b)        r = floor(rank * min(rows, columns))

Any merge method can then be given y in the place of x. Cutting the rank is the data-free part of
Twin-Merging (Lu et al. 2024, arXiv 2406.15479) as "Unlocking Efficient Long-to-Short LLM Reasoning
with Model Merging" (arXiv 2503.20641) uses it; factors by layer come from layer scores.

What has no rows and columns (norms, biases, a gate with one output) keeps its whole difference. Fused
experts [experts, rows, columns] are cut one by one; the kernel of a convolution is the matrix
[out, everything else].

Tall and square matrices are projected row by row: (x - b) V V', with V from the Gram matrix of the
columns, a sum over rows. For wide ones V V' would be larger than the matrix; they are held in
memory while U and C = U'(x - b) are computed, and read as U C. More than half of the rank is
kept by taking the rest away, so that the factors stay small and rank 1 is the model itself.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.kernels import lowrank
from surgeon.kernels.blas import one_thread
from surgeon.kernels.cast import nonfinite, widen
from surgeon.kernels.crew import Crew, Spread
from surgeon.merge import align
from surgeon.merge.task_vectors import added

CHUNK_ELEMENTS = 1 << 18
"""Elements that are projected together, at fixed places: how a tensor is read cannot change a bit."""
PANEL_ELEMENTS = 1 << 21
"""Elements that are added to a Gram matrix at once; also part of the results."""
KEPT_TENSORS = 3
"""Tensors whose factors are kept: the engine works on two at a time, and one is on its way out."""


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor: ``count`` matrices [rows, columns] cut to ``rank``, None = not cut."""

    base: str
    factor: float
    count: int = 1
    rows: int = 0
    columns: int = 0
    rank: int | None = None

    @property
    def whole_rank(self) -> int:
        return min(self.rows, self.columns)

    @property
    def removes(self) -> bool:
        """Whether the weakest directions are taken away instead of the strongest kept."""
        return self.rank is not None and 2 * self.rank > self.whole_rank

    @property
    def directions(self) -> int:
        assert self.rank is not None
        return self.whole_rank - self.rank if self.removes else self.rank

    @property
    def tall(self) -> bool:
        return self.rows >= self.columns

    @property
    def chunk_rows(self) -> int:
        return max(1, min(self.rows, CHUNK_ELEMENTS // max(1, self.columns)))


@dataclass(frozen=True)
class _Factors:
    """``left`` U [rows, k] and ``right`` C = U'D [k, columns]; for a tall matrix only ``right`` = V' [k, columns]."""

    left: np.ndarray | None
    right: np.ndarray


@dataclass(frozen=True)
class _Measured:
    """Energies |x - b|^2 of one matrix: all of it, what is kept, what a better choice could add at most."""

    total: float
    kept: float
    missed: float
    path: str


class _Slot:
    """The factors of one matrix: not begun, being computed by one thread and its helpers, or done."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.crew: Crew | None = None
        self.factors: _Factors | None = None


class DeltaView:
    """A Checkpoint: ``model`` with its difference from ``base`` cut to low rank and multiplied by a factor.

    Args:
        model: what is changed.
        base: same names and shapes. A tensor it lacks has no difference to change and is passed on as
            it is; the head of a model whose base ties its embeddings is compared with the embedding.
        rank: share of the rank to keep, above 0 and up to 1; None or 1 = all.
        factor: tensor name -> what its difference is multiplied by; None = 1.
        label: name for messages; default the model's.

    ``headers`` are the model's alone: a merge of differences has the base among its inputs anyway.

    Raises:
        UsageError: E232 the rank is out of range, or a factor is not a finite number.
    """

    def __init__(
        self,
        model: Checkpoint,
        base: Checkpoint,
        *,
        rank: float | None = None,
        factor: Callable[[str], float] | None = None,
        label: str | None = None,
    ) -> None:
        if rank is not None and not 0 < rank <= 1:
            raise UsageError(
                "E232", f"the share of the rank to keep is {rank:g}", help="it must be in (0, 1]"
            )
        self._model = model
        self._base = base
        self.label = label or model.label
        self.folder = model.folder
        self.config = model.config
        self.headers = model.headers
        self.adapter_folder = getattr(model, "adapter_folder", None)
        self.tensors: dict[str, TensorInfo] = dict(model.tensors)
        self._changes: dict[str, _Change] = {}
        for name, info in self.tensors.items():
            change = self._change(name, info, rank, 1.0 if factor is None else float(factor(name)))
            if change is not None:
                self._changes[name] = change
        self.identity = self._identify(rank)
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, dict[int, _Slot]] = OrderedDict()
        self._measured: dict[str, dict[int, _Measured]] = {}

    def _change(self, name: str, info: TensorInfo, rank: float | None, factor: float) -> _Change | None:
        """Return what is to be done with a tensor, None when it stays as it is."""
        if not math.isfinite(factor):
            raise UsageError(
                "E232", f"the factor of {printable(name)} is {factor}", help="factors are finite numbers"
            )
        partner = self._partner(name)
        if partner is None or DTYPES[info.dtype].family != "float" or not info.elements:
            return None
        count, rows, columns = lowrank.matrices(info.shape)
        kept = (
            None
            if rank is None or rank == 1 or min(rows, columns) <= 1
            else math.floor(rank * min(rows, columns) + 1e-9)
        )
        if kept is None:
            return _Change(partner, factor) if factor != 1 else None
        return _Change(partner, factor, count, rows, columns, kept)

    def _partner(self, name: str) -> str | None:
        """Return the base's tensor that ``name`` is compared with, None if it has none."""
        if name in self._base.tensors:
            return name
        tied = align.is_tied(self._base) and name == align.head_name(self._model.tensors)
        return align.embedding_name(self._base.tensors) if tied else None

    def _identify(self, rank: float | None) -> str:
        digest = hashlib.sha256(b"delta view 1\0")
        for part in (getattr(self._model, "identity", ""), getattr(self._base, "identity", "")):
            digest.update(part.encode() + b"\0")
        for header in self._base.headers:
            digest.update(header.sha256.encode() + b"\0")
        digest.update(repr((rank, sorted(self._changes.items()))).encode())
        return digest.hexdigest()

    @property
    def dropped(self) -> list[str]:
        """Tensors whose whole difference goes because the share of their rank is below one direction."""
        return [name for name, change in self._changes.items() if change.rank == 0]

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._model, "computed", None)
        return name in self._changes or (inner is not None and inner(name))

    def granularity(self, name: str) -> int:
        change = self._changes.get(name)
        if change is None:
            return self._model.granularity(name)
        if change.rank is None:
            return math.lcm(self._model.granularity(name), self._base.granularity(change.base))
        return change.chunk_rows * change.columns

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on, at their peak.

        Two tensors are worked on at a time, and the factors of `KEPT_TENSORS` are kept.
        """
        change = self._changes.get(name)
        if change is None or not change.rank:
            return 0
        side, other = change.whole_rank, max(change.rows, change.columns)
        wide = self._bytes_per_value(name)
        factors = change.directions * (side if change.tall else side + other) * wide * change.count
        panel = max(PANEL_ELEMENTS, side) * (8 + 3 * wide)
        # G, its copy and eigenvectors inside LAPACK with a work space of 2 n^2 (Tools: dsyevd).
        work = 5 * 8 * side * side + panel + (0 if change.tall else side * other * wide)
        return work + factors

    def kept_bytes(self, name: str) -> int:
        """Return the bytes of a tensor's factors, which stay in memory a while."""
        change = self._changes.get(name)
        if change is None or not change.rank:
            return 0
        span = change.columns if change.tall else change.rows + change.columns
        return change.directions * span * self._bytes_per_value(name) * change.count

    def _bytes_per_value(self, name: str) -> int:
        codes = {self.tensors[name].dtype, self._base.tensors[self._changes[name].base].dtype}
        return 8 if "F64" in codes else 4

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is computed; it has no stored bytes")
        return self._model.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop): stored values where nothing changes, else float32 (float64 for F64).

        Raises:
            InputError: E342 the base's tensor has another shape.
        """
        change = self._changes.get(name)
        if change is None:
            return self._model.read(name, start, stop)
        self._check_shape(name, change)
        if change.rank is None:
            base, delta = self._delta(name, change, start, stop)
            return added(base, delta * delta.dtype.type(change.factor))
        parts = [self._chunk(name, change, *place) for place in _chunks(change, start, stop)]
        if not parts:
            return self._delta(name, change, start, start)[0]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_shape(self, name: str, change: _Change) -> None:
        here, there = self.tensors[name].shape, self._base.tensors[change.base].shape
        if here != there:
            raise InputError(
                "E342", f"{printable(name)} has shape {list(here)} in {self.label}, {list(there)} in {self._base.label}",
                where=Where(tensor=printable(name)), help="only checkpoints of one architecture and size can be merged",
            )  # fmt: skip

    def _delta(self, name: str, change: _Change, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (b, x - b) of a range, 1-D, in float32 or float64."""
        base = widen(self._base.read(change.base, start, stop), self._base.tensors[change.base].dtype)
        value = widen(self._model.read(name, start, stop), self.tensors[name].dtype)
        wide = np.float64 if self._bytes_per_value(name) == 8 else np.float32
        base, value = base.astype(wide, copy=False), value.astype(wide, copy=False)
        return base, value - base

    def _chunk(self, name: str, change: _Change, index: int, row: int, start: int, stop: int) -> np.ndarray:
        """Return [start, stop) out of the chunk that begins at ``row`` of matrix ``index``."""
        last = min(row + change.chunk_rows, change.rows)
        origin = (index * change.rows + row) * change.columns
        base, delta = self._delta(name, change, origin, origin + (last - row) * change.columns)
        if change.rank == 0:
            return base[start - origin : stop - origin]
        factors = self._factors(name, change, index)
        delta = delta.reshape(-1, change.columns)
        with one_thread():
            if factors.left is None:
                part = (delta @ factors.right.T) @ factors.right
            else:
                part = factors.left[row:last] @ factors.right
        if change.removes:
            part = delta - part
        if change.factor != 1:
            part *= part.dtype.type(change.factor)
        return added(base, part.reshape(-1))[start - origin : stop - origin]

    def _factors(self, name: str, change: _Change, index: int) -> _Factors:
        """Return a matrix's factors, computed by the first who asks with the help of those who wait."""
        slot = self._slot(name, index)
        while True:
            with slot.lock:
                if slot.factors is not None:
                    return slot.factors
                crew, mine = slot.crew, slot.crew is None
                if crew is None:
                    crew = slot.crew = Crew()
            if not mine:
                crew.assist()
                continue  # done, or the owner failed and this thread is the next to try
            try:
                with one_thread():
                    found = self._compute(name, change, index, crew.spread)
                with slot.lock:
                    slot.factors = found
                return found
            finally:
                with slot.lock:
                    slot.crew = None
                crew.close()

    def _slot(self, name: str, index: int) -> _Slot:
        with self._lock:
            slots = self._slots.setdefault(name, {})
            self._slots.move_to_end(name)
            for old in list(self._slots)[:-KEPT_TENSORS]:
                if all(s.crew is None for s in self._slots[old].values()):
                    del self._slots[old]
            return slots.setdefault(index, _Slot())

    def _compute(self, name: str, change: _Change, index: int, spread: Spread) -> _Factors:
        total = lowrank.GramSum(change.whole_rank, spread)
        whole = None
        if change.tall:
            for panel in self._panels(name, change, index):
                total.add(panel.astype(np.float64))
        else:
            whole = self._held(name, change, index)
            width = max(1, PANEL_ELEMENTS // change.rows)
            for first in range(0, change.columns, width):
                total.add(np.ascontiguousarray(whole[:, first : first + width].T, dtype=np.float64))
        gram = total.matrix()
        if not math.isfinite(float(np.trace(gram))):
            raise self._not_finite(name, change)
        found = lowrank.leading(gram, change.directions, smallest=change.removes, spread=spread)
        kept = 1 - found.energy_kept if change.removes and found.total > 0 else found.energy_kept
        self._record(name, index, found, kept)
        wide = np.float64 if self._bytes_per_value(name) == 8 else np.float32
        vectors = found.vectors.astype(wide)
        if whole is None:
            return _Factors(None, np.ascontiguousarray(vectors.T))
        return _Factors(vectors, lowrank.transposed_product(vectors, whole, spread))

    def _not_finite(self, name: str, change: _Change) -> InputError:
        """Say whose NaN or Inf makes a decomposition impossible."""
        guilty, step = [], 1 << 20
        for checkpoint, tensor in ((self._model, name), (self._base, change.base)):
            info = checkpoint.tensors[tensor]
            ranges = ((a, min(a + step, info.elements)) for a in range(0, info.elements, step))
            if any(nonfinite(checkpoint.read(tensor, *r), info.dtype) is not None for r in ranges):
                guilty.append(checkpoint.label)
        return InputError(
            "E321", f"{' and '.join(guilty) or self.label} has NaN or Inf in {printable(name)}, whose rank cannot be cut",
            where=Where(str(self.tensors[name].file), tensor=printable(name)),
            help=f"the file is damaged or the training diverged; --ignore '{printable(name)}' leaves the tensor out",
        )  # fmt: skip

    def _held(self, name: str, change: _Change, index: int) -> np.ndarray:
        """Return x - b of one matrix as a whole, [rows, columns]."""
        wide = np.float64 if self._bytes_per_value(name) == 8 else np.float32
        whole, row = np.empty((change.rows, change.columns), wide), 0
        for panel in self._panels(name, change, index):
            whole[row : row + len(panel)] = panel
            row += len(panel)
        return whole

    def _panels(self, name: str, change: _Change, index: int) -> Iterator[np.ndarray]:
        step = max(1, PANEL_ELEMENTS // change.columns)
        for row in range(0, change.rows, step):
            first = (index * change.rows + row) * change.columns
            last = first + min(step, change.rows - row) * change.columns
            yield self._delta(name, change, first, last)[1].reshape(-1, change.columns)

    def _record(self, name: str, index: int, found: lowrank.Directions, kept: float) -> None:
        with self._lock:
            self._measured.setdefault(name, {})[index] = _Measured(
                found.total, kept * found.total, found.missed, found.path
            )

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return what was found out while reading, by tensor: ranks, share of |x - b|^2 kept, path.

        ``missed`` bounds the energy by which the best choice of directions would exceed the one
        made, as a share of |x - b|^2.
        """
        result: dict[str, dict[str, Any]] = {}
        with self._lock:
            for name in sorted(self._measured):
                parts = [self._measured[name][i] for i in sorted(self._measured[name])]
                total = sum(p.total for p in parts)
                change = self._changes[name]
                result[name] = {
                    "rank": change.rank, "of": change.whole_rank, "matrices": len(parts),
                    "energy_kept": sum(p.kept for p in parts) / total if total > 0 else 1.0,
                    "missed": sum(p.missed for p in parts) / total if total > 0 else 0.0,
                    "path": "+".join(sorted({p.path for p in parts})),
                }  # fmt: skip
        return result


def _chunks(change: _Change, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range at the fixed chunks: (matrix, first row of the chunk, first element, last element)."""
    while start < stop:
        index, inside = divmod(start, change.rows * change.columns)
        row = inside // change.columns // change.chunk_rows * change.chunk_rows
        last = min(row + change.chunk_rows, change.rows)
        end = min(stop, (index * change.rows + last) * change.columns)
        yield index, row, start, end
        start = end
