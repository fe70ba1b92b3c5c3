"""Writes the shards of one output model while they are being computed, and reads them back.

Blocks arrive in any order and go straight to their place. Three things happen beside the
computation: written pages are pushed to disk early, finished stretches are read back and
compared with the checksum taken when they were computed, and each file's sha256 grows with
them. The 8 bytes of header length are written last: a half-written file never opens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import EnvironmentFault, Where
from surgeon.output.disk import Disk
from surgeon.output.layout import Layout, Shard
from surgeon.system import open_file_budget

CHUNK = 4 << 20


@dataclass
class _File:
    shard: Shard
    path: Path
    digest: hashlib._Hash
    position: int  # everything before it was read back
    extents: dict[int, tuple[int, int]]  # start -> (nbytes, crc32), written and not yet read back
    done: bool = False


class _Descriptors:
    """A bounded number of open output files, shared by threads; hundreds of shards need no more."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._limit = open_file_budget()
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # path -> [descriptor, users]

    def add(self, path: Path, descriptor: int) -> None:
        with self._lock:
            self._open[path] = [descriptor, 0]
            self._evict()

    @contextlib.contextmanager
    def borrow(self, path: Path) -> Iterator[int]:
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [self._disk.reopen(path), 0]
            self._open.move_to_end(path)
            entry[1] += 1
            self._evict()
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def open_paths(self) -> list[Path]:
        with self._lock:
            return list(self._open)

    def _evict(self) -> None:
        for path, (descriptor, users) in list(self._open.items()):
            if len(self._open) <= self._limit:
                return
            if users == 0:
                os.close(descriptor)
                del self._open[path]

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._open.values():
                os.close(descriptor)
            self._open.clear()


class ModelWriter:
    """All weight files of one output model in its staging folder.

    Args:
        folder: staging folder of the model.
        layout: files and offsets.
        disk: file system calls.
        adopt: reopen existing files instead of creating them (resume).
    """

    def __init__(self, folder: Path, layout: Layout, disk: Disk, adopt: bool = False) -> None:
        self.folder = folder
        self.layout = layout
        self._disk = disk
        self._lock = threading.Lock()
        self._files: list[_File] = []
        self._descriptors = _Descriptors(disk)
        try:
            for shard in layout.shards:
                path = folder / shard.name
                if adopt and path.exists() and path.stat().st_size == shard.size:
                    with self._descriptors.borrow(path) as descriptor:
                        disk.write_at(descriptor, bytes(8), 0)
                else:
                    if path.exists():
                        disk.remove(path)
                    self._descriptors.add(path, disk.create(path, shard.size))
                with self._descriptors.borrow(path) as descriptor:
                    disk.write_at(descriptor, shard.header[8:], 8)
                digest = hashlib.sha256(shard.header)
                self._files.append(_File(shard, path, digest, len(shard.header), {}))
        except BaseException:
            self.close()
            raise

    def write(self, name: str, offset: int, data) -> int:
        """Write bytes at ``offset`` inside tensor ``name``; return their crc32."""
        place = self.layout.places[name]
        file = self._files[place.shard]
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        checksum = zlib.crc32(view)
        if len(view):
            with self._descriptors.borrow(file.path) as descriptor:
                self._disk.write_at(descriptor, view, place.offset + offset)
            self.claim(name, offset, len(view), checksum)
        return checksum

    def claim(self, name: str, offset: int, nbytes: int, checksum: int) -> None:
        """Record that a stretch is on disk with this checksum (also for resumed work)."""
        place = self.layout.places[name]
        if nbytes:
            with self._lock:
                self._files[place.shard].extents[place.offset + offset] = (nbytes, checksum)

    def holds(self, name: str, offset: int, nbytes: int, checksum: int) -> bool:
        """Return whether the file already has these bytes (re-hashes them)."""
        place = self.layout.places[name]
        file = self._files[place.shard]
        found = 0
        position, end = place.offset + offset, place.offset + offset + nbytes
        with self._descriptors.borrow(file.path) as descriptor:
            while position < end:
                piece = os.pread(descriptor, min(CHUNK, end - position), position)
                if not piece:
                    return False
                found = zlib.crc32(piece, found)
                position += len(piece)
        return found == checksum

    def read_back(self) -> int:
        """Read finished stretches in file order, compare, extend the digests; return bytes read."""
        total = 0
        for file in self._files:
            while not file.done:
                with self._lock:
                    extent = file.extents.pop(file.position, None)
                if extent is None:
                    break
                nbytes, checksum = extent
                found = 0
                end = file.position + nbytes
                with self._descriptors.borrow(file.path) as descriptor:
                    while file.position < end:
                        piece = os.pread(descriptor, min(CHUNK, end - file.position), file.position)
                        if not piece:
                            raise self._damaged(file)
                        found = zlib.crc32(piece, found)
                        file.digest.update(piece)
                        file.position += len(piece)
                if found != checksum:
                    raise self._damaged(file)
                total += nbytes
                file.done = file.position == file.shard.size
        return total

    def _damaged(self, file: _File) -> EnvironmentFault:
        return EnvironmentFault(
            "E511", f"what was read back from {file.shard.name} is not what was written", where=Where(str(file.path)),
            help="the disk or memory of this machine is faulty; check it before trying again",
        )  # fmt: skip

    def push(self) -> None:
        """Ask the system to write dirty pages now, so that the final sync has little left to do."""
        for path in self._descriptors.open_paths():
            with self._descriptors.borrow(path) as descriptor:
                os.fdatasync(descriptor)

    def finish(self) -> dict[str, str]:
        """Read back the rest, sync, complete the headers, sync again; return sha256 by file name.

        Raises:
            EnvironmentFault: E511 when the disk does not return what was written.
        """
        self.read_back()
        for file in self._files:
            if file.position != file.shard.size:
                raise AssertionError(
                    f"{file.shard.name}: {file.shard.size - file.position} bytes were never written"
                )
            with self._descriptors.borrow(file.path) as descriptor:
                self._disk.sync(descriptor)
        digests = {}
        for file in self._files:
            with self._descriptors.borrow(file.path) as descriptor:
                self._disk.write_at(descriptor, file.shard.header[:8], 0)
                self._disk.sync(descriptor)
                if os.pread(descriptor, len(file.shard.header), 0) != file.shard.header:
                    raise self._damaged(file)
            digests[file.shard.name] = file.digest.hexdigest()
        return digests

    def close(self) -> None:
        self._descriptors.close()
