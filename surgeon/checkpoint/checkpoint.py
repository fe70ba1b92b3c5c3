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
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.system import open_file_budget

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
    headers: tuple[Header, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

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
    """A bounded set of read descriptors shared by all checkpoints and threads (fault H5)."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[Path, FileStamp], list] = OrderedDict()  # -> [descriptor, users]

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
        except OSError as error:
            raise EnvironmentFault(
                "E506", f"reading {printable(header.file.name)} failed: {error.strerror}", where=Where(str(header.file)),
                help="the disk or network share is faulty, or was disconnected",
            ) from error  # fmt: skip
        finally:
            with self._lock:
                entry[1] -= 1

    def _acquire(self, header: Header) -> list:
        key = (header.file, header.stamp)
        with self._lock:
            entry = self._open.get(key)
            if entry is None:
                self._evict()
                try:
                    descriptor = open_regular(header.file)
                except InputError as error:  # it was there when the run was planned
                    raise changed(header) from error
                if stamp_of(descriptor) != header.stamp:
                    os.close(descriptor)
                    raise changed(header)
                entry = self._open[key] = [descriptor, 0]
            self._open.move_to_end(key)
            entry[1] += 1
            return entry

    def _evict(self) -> None:
        limit = self._limit or open_file_budget()
        for key, (descriptor, users) in list(self._open.items()):
            if len(self._open) < limit:
                return
            if users == 0:
                os.close(descriptor)
                del self._open[key]

    def close(self, headers: tuple[Header, ...]) -> None:
        """Close these files, but not those another thread is reading."""
        with self._lock:
            for header in headers:
                entry = self._open.get((header.file, header.stamp))
                if entry is not None and entry[1] == 0:
                    os.close(entry[0])
                    del self._open[(header.file, header.stamp)]


FILES = OpenFiles()
"""Every checkpoint of this process reads through the same bounded set."""


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
        self._files = FILES
        self._by_path = {h.file: h for h in weights.headers}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        carrier = DTYPES[info.dtype].carrier
        if carrier is None:
            raise InputError(
                "E307",
                f"{info.dtype} values cannot be read one by one",
                where=Where(str(info.file), tensor=printable(name)),
                help="use the checkpoint it was quantized from",
            )
        out = np.empty(stop - start, dtype=carrier)
        if out.nbytes:
            self._files.read_into(
                self._by_path[info.file], out.view(np.uint8).data, info.offset + start * carrier.itemsize
            )
        return out

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes [start, stop) of a tensor; for copies of any type, never cast."""
        info = self.tensors[name]
        out = np.empty(stop - start, dtype=np.uint8)
        if out.nbytes:
            self._files.read_into(self._by_path[info.file], out.view(np.uint8).data, info.offset + start)
        return out

    def granularity(self, name: str) -> int:
        return 1

    def close(self) -> None:
        self._files.close(self.headers)


def recheck(headers: tuple[Header, ...]) -> None:
    """Raise E334 when a file is not the one that was planned with (size, mtime, inode)."""
    for header in headers:
        if header.digest:  # not written: the files it is computed from are what must stay
            recheck(header.behind)
            continue
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
    allow_pickle: bool = False,
) -> StoredCheckpoint:
    """Open a local model folder or one .safetensors file.

    Args:
        path: folder or file.
        label: name for messages; defaults to the path.
        config_file: a config.json for a bare file (``--config``).
        weights: see `surgeon.checkpoint.index.read_folder`.
        allow_pickle: read pickle files, through torch's weights-only loader, when there is nothing else.

    Raises:
        InputError: anything that is not a complete, well-formed checkpoint.
    """
    label = label or str(path)
    if allow_pickle:
        pickled = _open_pickled(path, label, config_file)
        if pickled is not None:
            return pickled
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


def _open_pickled(path: Path, label: str, config_file: Path | None) -> Any:
    """Return a view of pickle files where a model has nothing else, or None."""
    from surgeon.checkpoint.pickled import PickledCheckpoint, pickle_files

    if path.is_dir():
        files = [] if any(p.suffix == ".safetensors" for p in path.iterdir()) else pickle_files(path)
        config_path = config_file or path / CONFIG_NAME
        config = read_json_object(config_path) if files and config_path.exists() else None
        return PickledCheckpoint(label, path, config, files) if files else None
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        return PickledCheckpoint(label, None, read_json_object(config_file) if config_file else None, [path])
    return None
