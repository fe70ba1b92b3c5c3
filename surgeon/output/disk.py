"""The few calls that change the file system, behind one object.

Everything surgeon writes goes through `Disk`, so that tests can make the n-th call fail or
end the process there, for every n (faults A1-A3, A13).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Disk:
    """Real file system. Subclasses in the tests inject faults by overriding `_step`."""

    def _step(self, action: str, path: object) -> None:
        """Called before every change; a fault-injecting subclass raises or exits here."""

    def make_folder(self, path: Path) -> None:
        self._step("mkdir", path)
        os.mkdir(path)

    def create(self, path: Path, size: int = 0) -> int:
        """Create a new file, reserve ``size`` bytes for real, and return a descriptor."""
        self._step("create", path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if size:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                    os.close(descriptor)
                    raise
                os.ftruncate(descriptor, size)
            except AttributeError:  # macOS, Windows: no reservation there
                os.ftruncate(descriptor, size)
        return descriptor

    def reopen(self, path: Path) -> int:
        self._step("reopen", path)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write_at(self, descriptor: int, data: memoryview | bytes, offset: int) -> None:
        self._step("write", descriptor)
        view = memoryview(data)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy a file to a new one, piece by piece, and sync it."""
        descriptor = self.create(target, source.stat().st_size)
        try:
            with open(source, "rb") as stream:
                offset = 0
                while piece := stream.read(8 << 20):
                    self.write_at(descriptor, piece, offset)
                    offset += len(piece)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def append(self, descriptor: int, data: bytes) -> None:
        self._step("append", descriptor)
        while data:
            data = data[os.write(descriptor, data) :]

    def sync(self, descriptor: int) -> None:
        self._step("sync", descriptor)
        os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        self._step("sync_folder", path)
        if sys.platform == "win32":
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a whole small file and sync it."""
        descriptor = self.create(path)
        try:
            self.write_at(descriptor, content, 0)
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        os.rename(source, target)

    def exchange(self, left: Path, right: Path) -> bool:
        """Swap two paths atomically; return False where the system cannot."""
        self._step("exchange", right)
        if not sys.platform.startswith("linux"):
            return False
        try:
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        except (OSError, AttributeError):
            return False
        done = renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
        if done == 0:
            return True
        number = ctypes.get_errno()
        if number in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EBUSY}:
            return False
        raise OSError(number, os.strerror(number), str(right))

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        self._step("remove_tree", path)
        shutil.rmtree(path)
