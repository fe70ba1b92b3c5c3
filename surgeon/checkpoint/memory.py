"""A Checkpoint over tensors that are already in memory, and a writer that keeps its result there.

NumPy arrays and torch tensors are taken as they are, without a copy where their layout allows
it; torch is never imported here, only the one that made the tensors is used. bfloat16 travels
as its bits.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header, TensorInfo, printable
from surgeon.errors import InputError

_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items()}


def is_torch(value: Any) -> bool:
    """Say whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class MemoryCheckpoint:
    """Tensors by name as one Checkpoint; it has neither a folder nor a config."""

    def __init__(self, label: str, state: Mapping[str, Any]) -> None:
        self.label = label
        self.folder: Path | None = None
        self.config: dict[str, Any] | None = None
        self.headers: tuple[Header, ...] = ()
        self.tensors: Mapping[str, TensorInfo]
        self._flat: dict[str, np.ndarray] = {}
        infos: dict[str, TensorInfo] = {}
        for number, (name, value) in enumerate(state.items()):
            code, array = _bits(label, name, value)
            flat = array.reshape(-1)
            flat.flags.writeable = False
            self._flat[name] = flat
            infos[name] = TensorInfo(name, code, tuple(array.shape), Path(label), number, flat.nbytes)
        self.tensors = infos

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._flat[name][start:stop]

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._flat[name].view(np.uint8)[start:stop]

    def granularity(self, name: str) -> int:
        return 1


def _bits(label: str, name: str, value: Any) -> tuple[str, np.ndarray]:
    """Return the storage code and a contiguous array of carrier values that shares memory if it can."""
    if is_torch(value):
        torch = sys.modules["torch"]
        kind = str(value.dtype).removeprefix("torch.")
        value = value.detach().cpu().contiguous()
        array = (value.view(torch.int16) if kind == "bfloat16" else value).numpy() if kind in _CODES else None
    else:
        array = value if isinstance(value, np.ndarray) else None
        kind = array.dtype.name if array is not None else type(value).__name__
    if array is None or kind not in _CODES:
        raise InputError("E307", f"{printable(name)} of {label} is {kind}, which is neither a plain array nor a tensor",
                         help="give numpy arrays or torch tensors of floats, integers or booleans")  # fmt: skip
    carrier = DTYPES[_CODES[kind]].carrier
    assert carrier is not None
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # A view of its own, so that making it read-only leaves the caller's array alone.
    return _CODES[kind], array.view(carrier)


class MemoryWriter:
    """Takes the bytes the engine writes and gives them back as arrays or tensors.

    Args:
        as_torch: make torch tensors; else NumPy arrays (bfloat16 as ml_dtypes has it, when that is
            where the inputs came from).
        bfloat16: dtype of bfloat16 arrays, None to give float32 instead.
    """

    def __init__(self, outputs: list[Any], as_torch: bool, bfloat16: np.dtype | None = None) -> None:
        self._outputs = {o.name: o for o in outputs}
        self._bytes = {o.name: np.empty(o.nbytes, dtype=np.uint8) for o in outputs}
        self._as_torch = as_torch
        self._bfloat16 = bfloat16

    def write(self, name: str, offset: int, data: np.ndarray) -> int:
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._bytes[name][offset : offset + content.size] = content
        return 0

    def state(self) -> dict[str, Any]:
        """Return the finished tensors in the order of the plan."""
        return {name: self._tensor(output, self._bytes[name]) for name, output in self._outputs.items()}

    def _tensor(self, output: Any, content: np.ndarray) -> Any:
        carrier = DTYPES[output.dtype].carrier
        assert carrier is not None
        if output.dtype == "BF16":
            if self._as_torch:
                torch = sys.modules["torch"]
                return torch.from_numpy(content.view(np.int16).reshape(output.shape)).view(torch.bfloat16)
            if self._bfloat16 is not None:
                return content.view(self._bfloat16).reshape(output.shape)
            from surgeon.kernels.cast import widen

            return widen(content.view(carrier), "BF16").reshape(output.shape)
        array = content.view(np.dtype(_NAMES[output.dtype])).reshape(output.shape)
        return sys.modules["torch"].from_numpy(array) if self._as_torch else array
