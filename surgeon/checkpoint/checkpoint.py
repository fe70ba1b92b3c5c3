"""Checkpoint: a lazy, read-only view of named tensors with a configuration.

`Checkpoint` is a protocol because views stack: a folder, a bare file, an adapter folded into
a base, rows rearranged to another vocabulary. Whoever reads cannot tell them apart.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import (
    FileStamp,
    Header,
    TensorInfo,
    open_regular,
    printable,
    read_header,
    stamp_of,
)
from surgeon.checkpoint.index import Weights, read_folder
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import InputError, UsageError, Where

MAX_OPEN_FILES = 48
CONFIG_NAME = "config.json"


@runtime_checkable
class Checkpoint(Protocol):
    """What every reader of weights speaks.

    Attributes:
        label: how the user named it, for messages.
        folder: where companions lie, None for a bare file.
        config: parsed config.json, None for a bare file without one.
        tensors: name -> TensorInfo. ``dtype`` and ``shape`` are what a reader sees.
        headers: the files behind it, for digests and change detection.
    """

    label: str
    folder: Path | None
    config: dict[str, Any] | None
    tensors: Mapping[str, TensorInfo]
    headers: tuple[Header, ...]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor, 1-D.

        Raw carrier values (bfloat16 as uint16), or float32/float64 when the view computes.
        """
        ...

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes [start, stop) of a tensor, uint8; any type, never cast."""
        ...

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together; block borders should be multiples of it."""
        ...


class OpenFiles:
    """A bounded set of read descriptors shared by threads (fault H5)."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list] = OrderedDict()  # path -> [descriptor, users]

    def read_into(self, header: Header, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; raise E303 when the file has become shorter."""
        entry = self._acquire(header)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(entry[0], [buffer[done:]], offset + done)
                if count == 0:
                    raise InputError(
                        "E303",
                        f"{header.file.name} became shorter while it was read",
                        where=Where(str(header.file)),
                        help="something is rewriting the model; run again when it is complete",
                    )
                done += count
        finally:
            with self._lock:
                entry[1] -= 1

    def _acquire(self, header: Header) -> list:
        with self._lock:
            entry = self._open.get(header.file)
            if entry is None:
                self._evict()
                descriptor = open_regular(header.file)
                if stamp_of(descriptor) != header.stamp:
                    os.close(descriptor)
                    raise changed(header)
                entry = self._open[header.file] = [descriptor, 0]
            self._open.move_to_end(header.file)
            entry[1] += 1
            return entry

    def _evict(self) -> None:
        for path, (descriptor, users) in list(self._open.items()):
            if len(self._open) < self._limit:
                return
            if users == 0:
                os.close(descriptor)
                del self._open[path]

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()


def changed(header: Header) -> InputError:
    return InputError(
        "E334",
        f"{header.file.name} changed while it was in use",
        where=Where(str(header.file)),
        help="something is rewriting the model; run again when it is complete",
    )


class StoredCheckpoint:
    """A checkpoint as it lies on disk: one file, or a folder with one or several."""

    def __init__(
        self, label: str, folder: Path | None, config: dict[str, Any] | None, weights: Weights
    ) -> None:
        self.label = label
        self.folder = folder
        self.config = config
        self.tensors: dict[str, TensorInfo] = weights.tensors
        self.headers = weights.headers
        self.notes = weights.notes
        self.index_file = weights.index_file
        self._files = OpenFiles()
        self._by_path = {h.file: h for h in weights.headers}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        carrier = DTYPES[info.dtype].carrier
        if carrier is None:
            raise InputError(
                "E307",
                f"{info.dtype} values cannot be read one by one",
                where=Where(str(info.file), tensor=printable(name)),
            )
        out = np.empty(stop - start, dtype=carrier)
        if out.nbytes:
            self._files.read_into(
                self._by_path[info.file], memoryview(out).cast("B"), info.offset + start * carrier.itemsize
            )
        return out

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes [start, stop) of a tensor; for copies of any type, never cast."""
        info = self.tensors[name]
        out = np.empty(stop - start, dtype=np.uint8)
        if out.nbytes:
            self._files.read_into(self._by_path[info.file], memoryview(out).cast("B"), info.offset + start)
        return out

    def granularity(self, name: str) -> int:
        return 1

    def close(self) -> None:
        self._files.close()


def recheck(headers: tuple[Header, ...]) -> None:
    """Raise E334 when a file is not the one that was planned with (size, mtime, inode)."""
    for header in headers:
        try:
            info = os.stat(header.file)
        except OSError:
            raise changed(header) from None
        if FileStamp(info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev) != header.stamp:
            raise changed(header)


def open_path(
    path: Path,
    label: str | None = None,
    *,
    config_file: Path | None = None,
    weights: str = "auto",
    ignore_unlisted: bool = False,
    repo: str | None = None,
) -> StoredCheckpoint:
    """Open a local model folder or one .safetensors file.

    Args:
        path: folder or file.
        label: name for messages; defaults to the path.
        config_file: a config.json for a bare file (``--config``).
        weights: see `surgeon.checkpoint.index.read_folder`.

    Raises:
        InputError: anything that is not a complete, well-formed checkpoint.
    """
    label = label or str(path)
    if path.is_dir():
        found = read_folder(path, weights=weights, ignore_unlisted=ignore_unlisted, repo=repo)
        config_path = config_file or path / CONFIG_NAME
        if not config_path.exists():
            raise InputError(
                "E308",
                f"{label} has weights but no {CONFIG_NAME}",
                where=Where(str(path)),
                help=f"fetch {CONFIG_NAME}, give it with --config, or name the weight file itself",
            )
        return StoredCheckpoint(label, path, read_json_object(config_path), found)
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
        raise InputError(
            "E331",
            f"{label} is a pickle file; pickle files can run code",
            where=Where(str(path)),
            help="convert it to safetensors once, in an environment you trust",
        )
    if path.suffix == ".gguf":
        raise InputError(
            "E333",
            f"{label} is a GGUF file",
            where=Where(str(path)),
            help="use the safetensors checkpoint it was converted from",
        )
    header = read_header(path)
    config = read_json_object(config_file) if config_file else None
    return StoredCheckpoint(label, None, config, Weights((header,), header.tensors, None, ()))


def known_tensor(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """Return a tensor's info or raise a usage error that names the nearest one."""
    from surgeon.errors import close_matches

    info = checkpoint.tensors.get(name)
    if info is None:
        raise UsageError(
            "E203",
            f'{checkpoint.label} has no tensor "{printable(name)}"',
            help=close_matches(name, checkpoint.tensors),
        )
    return info
