"""The hidden states between two layers, in memory or in a file.

One block per batch, in the compute precision, so that what is read is bit for bit what was written
wherever it lay in between.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from surgeon.errors import EnvironmentFault, Where


class Activations(Protocol):
    """Hidden states of all batches at one boundary."""

    def put(self, batch: int, value: Tensor) -> None: ...

    def get(self, batch: int) -> Tensor: ...

    def close(self) -> None:
        """Release memory or disk; the values are gone unless the file is kept on purpose."""
        ...


class InMemory:
    """Activations held as tensors; one boundary's values overwrite the one's before, batch by batch."""

    def __init__(self, batches: int) -> None:
        self._values: list[Tensor | None] = [None] * batches

    def put(self, batch: int, value: Tensor) -> None:
        held = self._values[batch]
        if held is None:
            self._values[batch] = value.detach().to("cpu", copy=True)
        else:
            held.copy_(value.detach())

    def get(self, batch: int) -> Tensor:
        value = self._values[batch]
        assert value is not None, "read before it was written"
        return value

    def close(self) -> None:
        self._values = []


class InFile:
    """Activations in one file, a block for each batch; nothing stays in memory.

    Args:
        path: the file; overwritten.
        shapes: shape of each batch's block.
        dtype: precision of all of them.
        existing: open what is there instead of overwriting it.
        kept: leave the file behind when closed.
    """

    def __init__(
        self, path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype,
        *, existing: bool = False, kept: bool = False,
    ) -> None:  # fmt: skip
        self.path = path
        self._shapes = list(shapes)
        self._dtype = dtype
        self._kept = kept
        size = torch.empty(0, dtype=dtype).element_size()
        self._offsets = [0]
        for shape in self._shapes:
            self._offsets.append(self._offsets[-1] + math.prod(shape) * size)
        self.digests: list[str] = [""] * len(self._shapes)
        flags = os.O_RDWR if existing else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise EnvironmentFault("E502", f"cannot write activations: {error.strerror}", where=Where(str(path)),
                                   help="choose another folder for them") from error  # fmt: skip

    @property
    def bytes(self) -> int:
        return self._offsets[-1]

    def put(self, batch: int, value: Tensor) -> None:
        raw = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        offset, stop = self._offsets[batch], self._offsets[batch + 1]
        assert len(raw) == stop - offset, "a block has another shape than planned"
        view = raw.data
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done : done + (1 << 26)], offset + done)
        except OSError as error:
            raise EnvironmentFault("E501", f"cannot write activations: {error.strerror}", where=Where(str(self.path)),
                                   help="free disk space, or give fewer samples") from error  # fmt: skip
        if self._kept:
            self.digests[batch] = hashlib.sha256(view).hexdigest()

    def get(self, batch: int) -> Tensor:
        offset, stop = self._offsets[batch], self._offsets[batch + 1]
        raw = torch.empty(stop - offset, dtype=torch.uint8)
        view = raw.numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise EnvironmentFault(
                    "E506",
                    "the file of activations became shorter",
                    where=Where(str(self.path)),
                    help="something else changed it; run again",
                )
            done += count
        return raw.view(self._dtype).reshape(self._shapes[batch])

    def digest(self, batch: int) -> str:
        """Return the sha256 of a block as it lies in the file."""
        return hashlib.sha256(self.get(batch).reshape(-1).view(torch.uint8).numpy().data).hexdigest()

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            if not self._kept:
                self.path.unlink(missing_ok=True)
