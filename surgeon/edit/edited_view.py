"""A model some of whose matrices have a direction taken out, and some of whose biases are shifted.

    linear  W [out, in]:  W <- W - w * write (read' W)        Conv1D, embedding  W [in, out]:  W <- W - w * (W read) write'

With write = read = v a unit vector this is (I - w v v') W. Behind a norm with gain g, write = v / g and
read = g o v take v out of what comes out of the norm (`behind_norm`). Arithmetic is float32 with float64 sums.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo
from surgeon.kernels.cast import round_to, widen

CHUNK_ELEMENTS = 1 << 20
"""Elements summed at once, at fixed places: how a tensor is read cannot change a bit."""
SMALLEST_GAIN = 1e-6
"""Channels whose gain is below this share of the largest pass nothing on; they are left alone."""


@dataclass(frozen=True)
class Projection:
    """What is taken out of one matrix.

    Attributes:
        read: float64 [out], what is looked for.
        write: float64 [out], what is taken away where it is found; read . write = 1.
        strength: w; 1 takes all of it.
        output_axis: the axis of the outputs in the stored tensor.
        inputs: bool [in], which inputs' columns change; None = all.
        bias: the tensor is a bias [out].
    """

    read: np.ndarray
    write: np.ndarray
    strength: float
    output_axis: int
    inputs: np.ndarray | None = None
    bias: bool = False

    def identity(self) -> str:
        found = hashlib.sha256(repr((self.strength, self.output_axis, self.bias)).encode())
        for part in (self.read, self.write, self.inputs):
            found.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
        return found.hexdigest()


def straight(vector: np.ndarray, strength: float, output_axis: int, inputs: np.ndarray | None = None, bias: bool = False) -> Projection:  # fmt: skip
    """Return (I - w v v') for a unit vector."""
    return Projection(vector, vector, strength, output_axis, inputs, bias)


def behind_norm(vector: np.ndarray, gain: np.ndarray, strength: float, output_axis: int, inputs: np.ndarray | None = None) -> Projection:  # fmt: skip
    """Return the projection that takes ``vector`` out of the output of a norm with ``gain`` that follows.

    What leaves the norm is g o c / rms(c), so v . (g o c) has to vanish: c -= w (v / g) ((g o v) . c). Dividing
    v by g alone would leave more of the direction than there was.
    """
    passing = np.abs(gain) > SMALLEST_GAIN * np.abs(gain).max(initial=0.0)
    write = np.where(passing, vector / np.where(passing, gain, 1.0), 0.0)
    read = np.where(passing, gain * vector, 0.0)
    total = float(read @ write)  # below 1 where channels are left alone
    return Projection(read, write / total if total else write, strength, output_axis, inputs)


class EditedView:
    """A Checkpoint: ``model`` with projections, shifts of biases, new biases and another config.

    Args:
        model: what is edited.
        projections: tensor -> what is taken out.
        shifts: bias -> float64 [out] that is added to it.
        additions: name -> (values, storage code) of a tensor the model lacks.
        config: config.json of the result; None = the model's.
        label: for messages.
    """

    def __init__(
        self,
        model: Checkpoint,
        projections: Mapping[str, Projection],
        *,
        shifts: Mapping[str, np.ndarray] | None = None,
        additions: Mapping[str, tuple[np.ndarray, str]] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._model = model
        self.projections = dict(projections)
        self.shifts = dict(shifts or {})
        self.additions = dict(additions or {})
        self.label = model.label
        self.folder: Path | None = model.folder
        self.config = model.config if config is None else config
        self.headers = model.headers
        self.adapter_folder = getattr(model, "adapter_folder", None)
        self.tensors: dict[str, TensorInfo] = dict(model.tensors)
        for name, (values, code) in self.additions.items():
            width = values.size * DTYPES[code].bits // 8
            self.tensors[name] = TensorInfo(name, code, values.shape, Path(model.label), 0, width)
        self._lock = threading.Lock()
        self._found: dict[str, np.ndarray] = {}
        self.identity = self._identify()

    def _identify(self) -> str:
        digest = hashlib.sha256(b"edited view 1\0" + str(getattr(self._model, "identity", "")).encode())
        for name, projection in sorted(self.projections.items()):
            digest.update(f"p {name} {projection.identity()}".encode())
        for name, shift in sorted(self.shifts.items()):
            digest.update(f"s {name} ".encode() + np.ascontiguousarray(shift, np.float64).tobytes())
        for name, (values, code) in sorted(self.additions.items()):
            digest.update(f"a {name} {code} ".encode() + np.ascontiguousarray(values, np.float64).tobytes())
        return digest.hexdigest()

    def changed(self) -> list[str]:
        """Return the tensors that are not the model's own, sorted."""
        return sorted({*self.projections, *self.shifts, *self.additions})

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        if name in self.projections or name in self.shifts or name in self.additions:
            return True
        inner = getattr(self._model, "computed", None)
        return inner is not None and inner(name)

    def granularity(self, name: str) -> int:
        if name in self.additions:
            return 1
        own = self._model.granularity(name)
        return math.lcm(own, self.tensors[name].shape[-1]) if name in self.projections else own

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on."""
        inner = getattr(self._model, "memory", None)
        own = 0 if inner is None or name in self.additions else inner(name)
        return own + (24 * CHUNK_ELEMENTS if name in self.projections else 0)

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        inner = getattr(self._model, "kept_bytes", None)
        return 0 if inner is None or name in self.additions else inner(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is computed; it has no stored bytes")
        return self._model.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop): stored values where nothing changes, else float32 (float64 for F64)."""
        if name in self.additions:
            return self.additions[name][0].reshape(-1)[start:stop].astype(np.float32)
        if name in self.shifts:
            values = self._values(name, start, stop)
            return (values + self.shifts[name][start:stop]).astype(values.dtype)
        projection = self.projections.get(name)
        if projection is None:
            return self._model.read(name, start, stop)
        if projection.bias:
            whole = self._values(name, 0, self.tensors[name].elements)
            along = projection.strength * float(projection.read @ whole) * projection.write
            return (whole - along).astype(whole.dtype)[start:stop]
        columns = self.tensors[name].shape[-1]
        first, last = start // columns, -(-stop // columns)
        rows = self._values(name, first * columns, last * columns).reshape(-1, columns)
        edited = self._edited(name, projection, rows, first)
        return edited.reshape(-1)[start - first * columns : stop - first * columns]

    def _values(self, name: str, start: int, stop: int) -> np.ndarray:
        return widen(self._model.read(name, start, stop), self.tensors[name].dtype)

    def _edited(self, name: str, projection: Projection, rows: np.ndarray, first: int) -> np.ndarray:
        """Return edited rows; ``first`` is the number of the first in the tensor, matrices of a stack one after another."""
        shape = self.tensors[name].shape
        numbers = np.arange(first, first + len(rows))
        if projection.output_axis == len(shape) - 1:  # a row is one input's output
            along = projection.strength * (rows.astype(np.float64) @ projection.read)
            if projection.inputs is not None:
                along = np.where(projection.inputs[numbers % shape[-2]], along, 0.0)
            return rows - (along[:, None] * projection.write).astype(rows.dtype)
        height = shape[-2]
        parts = projection.strength * self.coefficients(name)
        scale = projection.write[numbers % height]
        return rows - (scale[:, None] * parts[numbers // height]).astype(rows.dtype)

    def coefficients(self, name: str) -> np.ndarray:
        """Return read' W, float64 [matrices, in], zero for inputs that stay; one pass over the tensor, remembered."""
        with self._lock:
            if name not in self._found:
                projection = self.projections[name]
                found = along(self._model, name, projection.read, projection.output_axis)
                self._found[name] = (
                    found if projection.inputs is None else np.where(projection.inputs, found, 0.0)
                )
            return self._found[name]


def along(
    checkpoint: Checkpoint, name: str, vector: np.ndarray, output_axis: int, code: str | None = None
) -> np.ndarray:
    """Return vector' W: the part of every input's output along a vector, float64 [matrices, in].

    Args:
        name: a matrix [out, in] or [in, out], or a stack of them.
        vector: float64 [out].
        output_axis: axis of the outputs.
        code: storage type the values are rounded to first; None takes them as they are read.
    """
    info = checkpoint.tensors[name]
    height, columns = info.shape[-2:]
    count = info.elements // (height * columns)
    right = output_axis == len(info.shape) - 1
    found = np.zeros((count, height if right else columns))
    step = max(1, CHUNK_ELEMENTS // columns)
    for matrix in range(count):
        for first in range(0, height, step):
            last = min(first + step, height)
            origin = (matrix * height + first) * columns
            values = widen(checkpoint.read(name, origin, origin + (last - first) * columns), info.dtype)
            if code is not None:
                values = round_to(values, code)
            rows = values.astype(np.float64).reshape(-1, columns)
            if right:
                found[matrix, first:last] = rows @ vector
            else:
                found[matrix] += vector[first:last] @ rows
    return found
