"""A model whose tensors are multiplied by factors along their axes while they are read, rounded to their storage type."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import narrow, widen
from surgeon.quantize.awq_sites import Span

CHUNK_ELEMENTS = 1 << 20
"""Elements that are widened at once."""


@dataclass(frozen=True)
class Factor:
    """What a range of a tensor is multiplied by: float32 [span.length]."""

    span: Span
    values: np.ndarray


class ScaledView:
    """A Checkpoint: ``model`` with some tensors multiplied, and some vectors replaced.

    Values are rounded once, to the type a tensor is stored in: what a quantizer reads here, and what is written of
    tensors that stay as they are, is the same. Every element depends on itself and its factors only, so it does
    not matter in which pieces a tensor is read.

    Args:
        model: a model of plain numbers.
        factors: what is multiplied; factors of one tensor apply in their order.
        vectors: tensor [n] -> values in its own type, instead of the model's.

    Attributes:
        identity: digest of the model's identity and of everything that changes it.
    """

    def __init__(
        self, model: Checkpoint, factors: Sequence[Factor], vectors: Mapping[str, np.ndarray]
    ) -> None:
        self._model = model
        self.label = model.label
        self.folder = model.folder
        self.config = model.config
        self.headers = model.headers
        self.adapter_folder = getattr(model, "adapter_folder", None)
        self.tensors: dict[str, TensorInfo] = dict(model.tensors)
        self._vectors = dict(vectors)
        self._factors: dict[str, list[Factor]] = {}
        digest = hashlib.sha256(f"scaled view 2 {getattr(model, 'identity', '')}\0".encode())
        for factor in factors:
            _check(factor, self.tensors[factor.span.tensor])
            self._factors.setdefault(factor.span.tensor, []).append(factor)
            digest.update(repr(factor.span).encode() + np.ascontiguousarray(factor.values).tobytes())
        for name, values in sorted(self._vectors.items()):
            info = self.tensors[name]
            if (
                values.shape != info.shape
                or values.dtype != DTYPES[info.dtype].carrier
                or name in self._factors
            ):
                raise ValueError(f"{name} is {info.dtype} {info.shape}, not {values.dtype} {values.shape}")
            digest.update(f"{name}\0".encode() + values.tobytes())
        self.identity = digest.hexdigest()

    def changed(self) -> list[str]:
        """Return the tensors that are not the model's own, sorted."""
        return sorted({*self._factors, *self._vectors})

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        if name in self._factors or name in self._vectors:
            return True
        inner = getattr(self._model, "computed", None)
        return inner is not None and inner(name)

    def granularity(self, name: str) -> int:
        if name in self._vectors:
            return 1
        own = self._model.granularity(name)
        return math.lcm(own, self.tensors[name].shape[-1]) if name in self._factors else own

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on."""
        inner = getattr(self._model, "memory", None)
        own = 0 if inner is None or name in self._vectors else inner(name)
        return own + (16 * CHUNK_ELEMENTS if name in self._factors else 0)

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        inner = getattr(self._model, "kept_bytes", None)
        return 0 if inner is None or name in self._vectors else inner(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is computed; it has no stored bytes")
        return self._model.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor, in the type it is stored in.

        Raises:
            InputError: E487 a value does not fit into float16.
        """
        if name in self._vectors:
            return self._vectors[name][start:stop].copy()
        if name not in self._factors:
            return self._model.read(name, start, stop)
        carrier = DTYPES[self.tensors[name].dtype].carrier
        assert carrier is not None
        found = np.empty(stop - start, dtype=carrier)
        columns = self.tensors[name].shape[-1]
        step = max(1, CHUNK_ELEMENTS // columns) * columns
        for place in range(start - start % columns, stop, step):
            first, last = max(place, start), min(place + step, stop)
            found[first - start : last - start] = self._scaled(name, first, last)
        return found

    def _scaled(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        columns = info.shape[-1]
        first, last = start // columns, -(-stop // columns)
        values = np.ones((last - first) * columns, dtype=np.float64 if info.dtype == "F64" else np.float32)
        inside = slice(start - first * columns, stop - first * columns)
        values[inside] = widen(self._model.read(name, start, stop), info.dtype)
        rows = values.reshape(-1, columns)
        numbers = np.arange(first, last)
        for factor in self._factors[name]:
            _multiply(rows, numbers, info.shape, factor)
        found = narrow(values[inside], info.dtype)
        if info.dtype == "F16" and not bool(np.isfinite(found).all()):
            raise InputError(
                "E487", f"{printable(name)} is scaled beyond the range of float16", where=Where(tensor=printable(name)),
                help="start from weights in bfloat16 or float32, or use a method that scales nothing",
            )  # fmt: skip
        return found


def _multiply(rows: np.ndarray, numbers: np.ndarray, shape: tuple[int, ...], factor: Factor) -> None:
    """Multiply rows of a tensor, whose ``numbers`` count through all matrices of a stack, in place."""
    span = factor.span
    inside = slice(span.start, span.start + span.length)
    if span.axis == len(shape) - 1:
        if span.expert is None:
            rows[:, inside] *= factor.values
            return
        # A stacked bias [experts, channels] has one row for each expert, a stacked matrix a block of rows.
        height = shape[1] if len(shape) == 3 else 1
        mine = np.flatnonzero(numbers // height == span.expert)
        if len(mine):
            rows[mine[0] : mine[-1] + 1, inside] *= factor.values  # an expert's rows lie together
        return
    height = shape[span.axis]
    within = numbers % height
    touched = (within >= inside.start) & (within < inside.stop)
    if span.expert is not None:
        touched &= numbers // height == span.expert
    rows[touched] *= factor.values[within[touched] - span.start, None]


def _check(factor: Factor, info: TensorInfo) -> None:
    span = factor.span
    if not 0 <= span.axis < len(info.shape) or len(info.shape) - span.axis > 2:
        raise ValueError(
            f"{span.tensor} of {len(info.shape)} axes has no rows or columns along axis {span.axis}"
        )
    fits = span.start + span.length <= info.shape[span.axis] and (span.expert or 0) < info.shape[0]
    if factor.values.shape != (span.length,) or factor.values.dtype != np.float32 or not fits:
        raise ValueError(f"{span} of {info.shape} and factors {factor.values.dtype} {factor.values.shape}")
    if not (np.isfinite(factor.values).all() and (factor.values > 0).all()):
        raise ValueError(f"factors of {span.tensor} that are not above 0 and finite")
