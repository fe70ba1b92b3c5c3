"""Arrays in one safetensors file, written piece by piece and published only when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header, read_header
from surgeon.errors import EnvironmentFault, InputError, Where

ABOUT = "surgeon.about"
"""The metadata entry with everything but the arrays, as JSON."""


class TensorFile:
    """Writes a file whose tensors are known beforehand, in the order they were named.

    Use as a context: leaving it after everything was written publishes the file under its name, and
    leaving it by an exception removes what was written.

    Args:
        path: the file.
        tensors: name -> (storage code such as "F32", shape).
        about: plain data.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], about: Mapping[str, Any]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {ABOUT: json.dumps(dict(about), sort_keys=True)}}
        self._waiting: list[tuple[str, np.dtype, int]] = []
        position = 0
        for name, (code, shape) in tensors.items():
            carrier = DTYPES[code].carrier
            assert carrier is not None
            size = int(np.prod(shape, dtype=np.int64)) * carrier.itemsize
            header[name] = {
                "dtype": code,
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            position += size
            self._waiting.append((name, carrier, size))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "wb")  # noqa: SIM115  (closed by __exit__)
            self._file.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, name: str, rows: np.ndarray) -> None:
        """Append values to a tensor; tensors come in their order, each in as many pieces as one likes."""
        while self._waiting and self._waiting[0][2] == 0 and self._waiting[0][0] != name:
            self._waiting.pop(0)
        expected, carrier, left = self._waiting[0]
        content = np.ascontiguousarray(rows, dtype=carrier)
        if name != expected or content.nbytes > left:
            raise ValueError(f"{content.nbytes} bytes of {name} where {left} of {expected} are due")
        try:
            self._file.write(content.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise self._failed(error) from error
        self._waiting[0] = (expected, carrier, left - content.nbytes)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            if kind is not None:
                return
            if any(left for _, _, left in self._waiting):
                raise ValueError(f"{self._path.name} is not complete")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self._path)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault("E501", f"cannot write {self._path.name}: {error.strerror}", where=Where(str(self._path)),
                                help="free disk space, or choose another folder for intermediate results")  # fmt: skip


def write(path: Path, arrays: Mapping[str, tuple[str, np.ndarray]], about: Mapping[str, Any]) -> None:
    """Write arrays, name -> (storage code, array), as one file."""
    with TensorFile(
        path, {name: (code, value.shape) for name, (code, value) in arrays.items()}, about
    ) as out:
        for name, (_, value) in arrays.items():
            out.write(name, value)


def find(path: Path, key: str) -> tuple[Header, dict[str, Any]] | None:
    """Return the header and the plain data of a complete file made under ``key``, else None.

    A file that is missing, damaged, or made for something else is one that has to be made again.
    """
    try:
        header = read_header(path)
        about = json.loads(header.metadata[ABOUT])
    except (InputError, KeyError, ValueError, RecursionError):
        return None
    return (header, about) if isinstance(about, dict) and about.get("key") == key else None


def read(header: Header, name: str) -> np.ndarray:
    """Return one tensor of a file."""
    info = header.tensors[name]
    carrier = DTYPES[info.dtype].carrier
    assert carrier is not None
    count = info.nbytes // carrier.itemsize
    return np.fromfile(header.file, dtype=carrier, count=count, offset=info.offset).reshape(info.shape)
