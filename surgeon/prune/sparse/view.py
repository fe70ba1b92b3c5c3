"""A model some of whose tensors lie in other files: what a phase of sparsification leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint, StoredCheckpoint, open_path
from surgeon.checkpoint.header import TensorInfo

HASHED_BYTES = 1 << 24
"""Bytes of a layer's file hashed at a time."""


class SparseView:
    """A Checkpoint: ``model`` with tensors of the same shapes and types taken from files.

    Args:
        model: the dense model.
        files: safetensors files, by layer; every tensor of theirs replaces the model's.
    """

    def __init__(self, model: Checkpoint, files: Sequence[Path]) -> None:
        self._model = model
        self.label = model.label
        self.folder = model.folder
        self.config: dict[str, Any] | None = model.config
        self.headers = model.headers
        self.adapter_folder = getattr(model, "adapter_folder", None)
        self.tensors: dict[str, TensorInfo] = dict(model.tensors)
        self._stored: dict[str, StoredCheckpoint] = {}
        for file in files:
            opened = open_path(file)
            for name, info in opened.tensors.items():
                before = model.tensors[name]
                if (info.shape, info.dtype) != (before.shape, before.dtype):
                    raise ValueError(
                        f"{name} in {file.name} is {info.dtype} {info.shape}, not {before.dtype} {before.shape}"
                    )
                self._stored[name] = opened
                self.tensors[name] = info

    @cached_property
    def identity(self) -> str:
        """Digest of what the files hold, for the id of a plan: it must not depend on when they were made."""
        digest = hashlib.sha256(f"sparse view 2 {getattr(self._model, 'identity', '')}\0".encode())
        for name, opened in self._stored.items():
            digest.update(name.encode() + b"\0")
            nbytes = self.tensors[name].nbytes
            for start in range(0, nbytes, HASHED_BYTES):
                digest.update(opened.read_bytes(name, start, min(start + HASHED_BYTES, nbytes)).data)
        return digest.hexdigest()

    def changed(self) -> list[str]:
        """Return the tensors that are not the model's own, sorted."""
        return sorted(self._stored)

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._model, "computed", None)
        return name not in self._stored and inner is not None and inner(name)

    def granularity(self, name: str) -> int:
        return 1 if name in self._stored else self._model.granularity(name)

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on."""
        inner = getattr(self._model, "memory", None)
        return 0 if inner is None or name in self._stored else inner(name)

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        inner = getattr(self._model, "kept_bytes", None)
        return 0 if inner is None or name in self._stored else inner(name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._stored.get(name, self._model).read(name, start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._stored.get(name, self._model).read_bytes(name, start, stop)
