"""Tensors that take the place of a source's before anything is cut: merged experts, averaged router rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import Header, TensorInfo, printable
from surgeon.errors import InputError, Where
from surgeon.structure.experts.parts import Experts, ExpertTensor

HASHED_BYTES = 1 << 24
"""Bytes hashed at a time."""


class Replacements:
    """What replaces tensors of a source, by the source's names; "NAME#EXPERT" is one expert's part of a stack.

    Args:
        checkpoint: the replacements, None for none.
        source: the model they are for.
        experts: its experts.

    Raises (constructor):
        InputError: E427 they do not fit the source.
    """

    def __init__(self, checkpoint: Checkpoint | None, source: Checkpoint, experts: Experts) -> None:
        self.checkpoint = checkpoint
        self._source = source
        self.headers: tuple[Header, ...] = () if checkpoint is None else checkpoint.headers
        owners = {tensor.name: tensor for layer in experts.layers for tensor in layer.tensors}
        for key, info in checkpoint.tensors.items() if checkpoint is not None else ():
            self._check(key, info, owners.get(key.partition("#")[0]))

    def key(self, name: str, expert: int | None = None) -> str | None:
        """Return the name of a replacement for a tensor, or for one expert's part of it; None where there is none."""
        key = name if expert is None else f"{name}#{expert}"
        return key if self.checkpoint is not None and key in self.checkpoint.tensors else None

    def converted(self, name: str, replacement: str | None) -> bool:
        """Say whether a tensor, or what replaces it, comes as numbers rather than as bits of the stored type."""
        if replacement is None:
            return _computed(self._source, name)
        assert self.checkpoint is not None
        foreign = self.checkpoint.tensors[replacement].dtype != self._source.tensors[name].dtype
        return foreign or _computed(self.checkpoint, replacement)

    def content(self) -> bytes:
        """Return a digest of names, types, shapes and values, or of what the values are computed from."""
        known = getattr(self.checkpoint, "identity", "")
        if known:  # computing every merged weight once more would double the work
            return str(known).encode()
        digest = hashlib.sha256()
        for name, info in sorted(self.checkpoint.tensors.items()) if self.checkpoint is not None else ():
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
            for data in self._stretches(name, info):
                digest.update(np.ascontiguousarray(data).tobytes())
        return digest.digest()

    def _stretches(self, name: str, info: TensorInfo) -> Iterator[np.ndarray]:
        assert self.checkpoint is not None
        if _computed(self.checkpoint, name):
            for start in range(0, info.elements, HASHED_BYTES // 8):
                yield self.checkpoint.read(name, start, min(start + HASHED_BYTES // 8, info.elements))
            return
        for start in range(0, info.nbytes, HASHED_BYTES):
            yield self.checkpoint.read_bytes(name, start, min(start + HASHED_BYTES, info.nbytes))

    def _check(self, key: str, info: TensorInfo, tensor: ExpertTensor | None) -> None:
        assert self.checkpoint is not None
        name, part, expert = key.partition("#")
        source = self._source.tensors.get(name)
        if source is None:
            raise self._unfit(key, "belongs to no tensor of the model")
        wanted = source.shape
        if part:
            axis = None if tensor is None else tensor.expert_axis
            if axis is None or not expert.isdecimal() or int(expert) >= source.shape[axis]:
                raise self._unfit(key, "names an expert of a tensor that does not hold it")
            if any(size != 1 for size in source.shape[:axis]):
                raise self._unfit(key, "is no single stretch of its tensor")
            if name in self.checkpoint.tensors:
                raise self._unfit(key, "is given both as a part and with its whole tensor")
            wanted = (*source.shape[:axis], *source.shape[axis + 1 :])
        if _lengths(info.shape) != _lengths(wanted) or info.elements != math.prod(wanted):
            raise self._unfit(key, f"has shape {list(info.shape)}, the source {list(wanted)}")
        families = {DTYPES[info.dtype].family, DTYPES[source.dtype].family}
        if info.dtype != source.dtype and families != {"float"}:
            raise self._unfit(key, f"is {info.dtype}, the source {source.dtype}")

    def _unfit(self, key: str, fact: str) -> InputError:
        assert self.checkpoint is not None
        return InputError("E427", f"the replacement {printable(key)} {fact}", where=Where(self.checkpoint.label, tensor=printable(key)),
                          help="it was made for another model")  # fmt: skip


def _lengths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of length 1, which make no difference to how values lie."""
    return tuple(size for size in shape if size != 1)


def _computed(checkpoint: Checkpoint, name: str) -> bool:
    inner = getattr(checkpoint, "computed", None)
    return inner is not None and inner(name)
