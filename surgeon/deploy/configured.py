"""A model under another configuration: the same tensors, said to be of another class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import TensorInfo


class Configured:
    """A Checkpoint with another configuration."""

    def __init__(self, source: Checkpoint, config: dict[str, Any]) -> None:
        self._source = source
        self.config: dict[str, Any] | None = config
        self.label, self.folder, self.headers = source.label, source.folder, source.headers
        self.adapter_folder = getattr(source, "adapter_folder", None)
        self.notes = getattr(source, "notes", ())
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        said = json.dumps(config, sort_keys=True)
        inner = getattr(source, "identity", "")
        self.identity = hashlib.sha256(f"configured 1\0{inner}\0{said}".encode()).hexdigest()

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self._source, "computed", None)
        return inner is not None and inner(name)

    def stored_dtype(self, name: str) -> str:
        """Return the type a tensor is stored in, whatever it is read as."""
        inner = getattr(self._source, "stored_dtype", None)
        return inner(name) if inner is not None else self.tensors[name].dtype

    def granularity(self, name: str) -> int:
        return self._source.granularity(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._source.read(name, start, stop)
