"""A quantized model as a Checkpoint: stored tensors of matrices from the files of layers, everything else from the source.

It is what a plan writes, what sizes are taken from, and, read through `surgeon.formats.dequantized`, the reference that
every reader of the result is compared with. Without files it is an outline: names, types and shapes are right, and
nothing quantized can be read.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint, StoredCheckpoint, open_path
from surgeon.checkpoint.dtypes import CONFIG_NAMES, DTYPES
from surgeon.checkpoint.header import TensorInfo
from surgeon.formats.scheme import Scheme
from surgeon.kernels.cast import narrow, widen
from surgeon.quantize.forms import Form
from surgeon.traits import text_section

HASHED_BYTES = 1 << 24
"""Bytes of a layer's file hashed at a time."""


class QuantizedView:
    """A Checkpoint over a plain one.

    Args:
        source: plain numbers.
        files: with the stored tensors of all quantized matrices; empty for an outline.
        schemes: matrix -> how it is stored; None, or not named, as it is.
        others: further linear modules (without ".weight"), which stay as they are.
        form: how matrices are stored.
        dtype: storage code that plain floats are written in; None keeps each tensor's own.

    Raises:
        ValueError: a file lacks a tensor, or holds one of another type or shape.
    """

    def __init__(
        self, source: Checkpoint, files: Sequence[Path], schemes: Mapping[str, Scheme | None], others: Sequence[str],
        form: Form, dtype: str | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self.label, self.folder = source.label, source.folder
        self.adapter_folder: Path | None = getattr(source, "adapter_folder", None)
        self.notes = tuple(getattr(source, "notes", ()))
        self._dtype = dtype
        opened = [open_path(file, file.name) for file in files]
        # Files of layers follow from the model and the request: `identity` covers them, a manifest does not name them.
        self.headers = source.headers
        self._files: dict[str, StoredCheckpoint] = {name: one for one in opened for name in one.tensors}
        self._plain: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.stored: dict[str, tuple[str, ...]] = {}
        self._schemes: dict[str, str] = {}
        for name, info in source.tensors.items():
            scheme = schemes.get(name)
            if scheme is None:
                place = form.renamed(name)
                self._plain[place] = name
                code = self._written(name)
                size = info.elements * DTYPES[code].bits // 8
                self.tensors[place] = replace(info, name=place, dtype=code, nbytes=size)
                continue
            parts = form.layout(name, tuple(info.shape), scheme)
            self.stored[name] = tuple(place for place, _, _ in parts)
            for place, code, shape in parts:
                self.tensors[place] = self._info(place, code, shape, info)
            self._schemes[name] = scheme.name
        modules = {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}
        self.config: dict[str, Any] | None = _config(
            source.config, form.config({**modules, **dict.fromkeys(others)}), dtype
        )

    @cached_property
    def identity(self) -> str:
        """Digest of the schemes and of what the files of the layers hold, for the id of a plan."""
        digest = hashlib.sha256(b"quantized 2\0" + str(getattr(self.source, "identity", "")).encode())
        for matrix, scheme in self._schemes.items():
            digest.update(f"{matrix}\0{scheme}\0".encode())
            for name in self.stored[matrix] if self._files else ():
                nbytes = self.tensors[name].nbytes
                for start in range(0, nbytes, HASHED_BYTES):
                    held = self._files[name].read_bytes(name, start, min(start + HASHED_BYTES, nbytes))
                    digest.update(held.data)
        return digest.hexdigest()

    def _info(self, name: str, code: str, shape: tuple[int, ...], plain: TensorInfo) -> TensorInfo:
        held = self._files.get(name)
        if held is not None:
            found = held.tensors[name]
            if (found.dtype, tuple(found.shape)) != (code, tuple(shape)):
                raise ValueError(f"{name} is {found.dtype} {found.shape} in its file, not {code} {shape}")
            return found
        if self._files:
            raise ValueError(f"{name} is in none of the files")
        count = int(np.prod(shape, dtype=np.int64))
        return replace(
            plain, name=name, dtype=code, shape=tuple(shape), nbytes=count * DTYPES[code].bits // 8
        )

    def _written(self, plain: str) -> str:
        """Return the storage type a plain tensor of the source is written in."""
        inner = getattr(self.source, "stored_dtype", None)
        own = inner(plain) if inner is not None else self.source.tensors[plain].dtype
        return self._dtype if self._dtype and DTYPES[own].family == "float" else own

    def stored_dtype(self, name: str) -> str:
        """Return the storage type a tensor is written in."""
        return self.tensors[name].dtype

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner, plain = getattr(self.source, "computed", None), self._plain.get(name)
        if plain is None:
            return False
        rounded = self.tensors[name].dtype != self.source.tensors[plain].dtype
        return rounded or (inner is not None and inner(plain))

    def granularity(self, name: str) -> int:
        plain = self._plain.get(name)
        return 1 if plain is None else self.source.granularity(plain)

    def memory(self, name: str) -> int:
        """Return the bytes held beside the blocks while a tensor is worked on."""
        inner, plain = getattr(self.source, "memory", None), self._plain.get(name)
        return inner(plain) if plain is not None and inner is not None else 0

    def kept_bytes(self, name: str) -> int:
        """Return the bytes that stay in memory after a tensor was read."""
        inner, plain = getattr(self.source, "kept_bytes", None), self._plain.get(name)
        return inner(plain) if plain is not None and inner is not None else 0

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        plain = self._plain.get(name)
        if plain is None:
            return self._files[name].read(name, start, stop)
        raw, own, code = (
            self.source.read(plain, start, stop),
            self.source.tensors[plain].dtype,
            self.tensors[name].dtype,
        )
        # As it will be written, so that whoever reads the view sees the numbers of the file.
        return raw if own == code else narrow(widen(raw, own), code)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        plain = self._plain.get(name)
        if plain is None:
            return self._files[name].read_bytes(name, start, stop)
        return self.source.read_bytes(plain, start, stop)


def _config(
    config: Mapping[str, Any] | None, quantization: dict[str, Any], dtype: str | None
) -> dict[str, Any]:
    """Return config.json with what is said of quantization, and with the type plain tensors are written in."""
    found = copy.deepcopy(dict(config or {}))
    if dtype is not None:
        named = False
        for section in (found, text_section(found)):
            for key in ("dtype", "torch_dtype"):
                if key in section:
                    section[key], named = CONFIG_NAMES[dtype], True  # type: ignore[index]
        if not named:
            found["torch_dtype"] = CONFIG_NAMES[dtype]
    if quantization:
        found["quantization_config"] = quantization
    return found
