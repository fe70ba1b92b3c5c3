"""Matrices of a GGUF file that are quantized: where their blocks come from, and what they stand for.

rows = stored(view)                     blocks that were computed before and lie in safetensors files
rows = rounded(checkpoint, types)       weights rounded while they are written, without data
Dequantized(checkpoint, rows)           the model those files compute, as plain numbers: the reference
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import TensorInfo
from surgeon.formats import gguf_blocks
from surgeon.kernels.cast import widen


class Rows(Protocol):
    """A matrix [out, in] in blocks.

    Attributes:
        kind: its type, such as Q4_0.
        identity: of what the blocks follow from, for digests.
    """

    @property
    def kind(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the blocks of rows [start, stop), uint8 [rows, bytes of a row]."""
        ...


@dataclass(frozen=True)
class StoredRows:
    """Blocks that lie in a tensor of bytes, named by `gguf_blocks.stored_name`."""

    checkpoint: Checkpoint
    tensor: str
    kind: str

    @property
    def identity(self) -> str:
        return f"{getattr(self.checkpoint, 'identity', '')}\0{self.tensor}"

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self.checkpoint.tensors[self.tensor].shape[1]
        return self.checkpoint.read(self.tensor, start * size, stop * size).reshape(-1, size)


@dataclass(frozen=True)
class RoundedRows:
    """Weights that ggml's own algorithm rounds while they are read."""

    checkpoint: Checkpoint
    tensor: str
    kind: str
    threads: int = 1

    @property
    def identity(self) -> str:
        return f"{self.kind}\0{self.tensor}"

    def read(self, start: int, stop: int) -> np.ndarray:
        info = self.checkpoint.tensors[self.tensor]
        columns = info.shape[1]
        raw = self.checkpoint.read(self.tensor, start * columns, stop * columns)
        values = widen(raw, info.dtype).astype(np.float32, copy=False).reshape(-1, columns)
        return gguf_blocks.quantize(values, self.kind, self.tensor, self.threads)


def stored(checkpoint: Checkpoint) -> dict[str, Rows]:
    """Return the quantized matrices among a checkpoint's tensors, by their plain names.

    Args:
        checkpoint: the quantized view of a model, or a file of a layer, opened.
    """
    found: dict[str, Rows] = {}
    for tensor, info in checkpoint.tensors.items():
        parsed = gguf_blocks.parse_name(tensor)
        if parsed is not None and info.dtype == "U8" and len(info.shape) == 2:
            found[parsed[0]] = StoredRows(checkpoint, tensor, parsed[1])
    return found


def rounded(checkpoint: Checkpoint, types: Mapping[str, str], threads: int = 1) -> dict[str, Rows]:
    """Return matrices of a checkpoint as they are when rounded to a type each."""
    return {name: RoundedRows(checkpoint, name, kind, threads) for name, kind in types.items()}


class Dequantized:
    """A Checkpoint of plain numbers: quantized matrices in float32 as their blocks say, everything else the source's."""

    def __init__(self, source: Checkpoint, rows: Mapping[str, Rows]) -> None:
        self._source, self._rows = source, rows
        self.label, self.folder, self.headers = source.label, source.folder, source.headers
        self.config = source.config
        self.adapter_folder: Path | None = getattr(source, "adapter_folder", None)
        self.notes = tuple(getattr(source, "notes", ()))
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, dtype="F32", nbytes=4 * info.elements) if name in rows else info
            for name, info in source.tensors.items()
        }
        digest = hashlib.sha256(f"gguf rows 1\0{getattr(source, 'identity', '')}\0".encode())
        for name in sorted(rows):
            digest.update(f"{name}\0{rows[name].kind}\0{rows[name].identity}\0".encode())
        self.identity = digest.hexdigest()

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._source, "computed", None)
        return name in self._rows or (inner is not None and inner(name))

    def stored_dtype(self, name: str) -> str:
        """Return the type a tensor is written in."""
        inner = getattr(self._source, "stored_dtype", None)
        return self.tensors[name].dtype if inner is None or name in self._rows else inner(name)

    def granularity(self, name: str) -> int:
        return self.tensors[name].shape[1] if name in self._rows else self._source.granularity(name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._rows:
            return self._source.read(name, start, stop)
        columns, rows = self.tensors[name].shape[1], self._rows[name]
        first = start // columns
        values = gguf_blocks.dequantize(rows.read(first, -(-stop // columns)), rows.kind).reshape(-1)
        return values[start - first * columns : stop - first * columns]

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.computed(name):
            raise AssertionError(f"{name} is decoded; it has no stored bytes")
        return self._source.read_bytes(name, start, stop)
