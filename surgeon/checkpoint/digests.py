"""sha256 of input files, computed beside the work and remembered.

Known digests are reused: the hub cache names large files by their sha256, and a small cache
keyed by (path, size, mtime, inode, header) remembers what was hashed here. What remains is hashed by
threads that follow the readers, so that a byte comes from the disk once and from the page cache afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import secrets
import threading
from pathlib import Path

from surgeon.checkpoint.header import Header, open_regular
from surgeon.errors import InputError
from surgeon.system import open_file_budget

CHUNK = 4 << 20
CACHE_ENTRIES = 5_000
THREADS = 2
"""One thread hashes some 2 GB/s, less than a light merge reads: it would be what a run waits for at its end."""
HEAD_START = 64_000_000
"""Bytes of each file that are hashed while the arithmetic is still being loaded."""


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "surgeon" / "digests.json"


def _cache_key(header: Header) -> str:
    stamp = header.stamp
    return f"{header.file.resolve()}|{stamp.size}|{stamp.mtime_ns}|{stamp.inode}|{header.sha256[:16]}"


def _read_cache() -> dict[str, str]:
    try:
        content = json.loads(_cache_file().read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, str) and re.fullmatch(r"[0-9a-f]{64}", v)}


def remember(pairs: list[tuple[Header, str]]) -> None:
    """Add digests to the cache; a cache that cannot be written is no error."""
    if not pairs:
        return
    path = _cache_file()
    content = _read_cache()
    for header, digest in pairs:
        content[_cache_key(header)] = digest
    content = dict(list(content.items())[-CACHE_ENTRIES:])
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
    except OSError:
        return


def known_digest(header: Header) -> str | None:
    """Return a sha256 somebody already computed for exactly this file, or None."""
    if header.digest:
        return header.digest
    real = header.file.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    return _read_cache().get(_cache_key(header))


class InputDigester:
    """Hashes input files in the background, following the reading position."""

    def __init__(self, headers: list[Header]) -> None:
        self.digests: dict[Path, str] = {}
        self._pending: dict[Path, Header] = {}
        for header in headers:
            known = known_digest(header)
            if known:
                self.digests[header.file] = known
            else:
                self._pending[header.file] = header
        self._hashes = {path: hashlib.sha256() for path in self._pending}
        self._position = dict.fromkeys(self._pending, 0)
        workers = max(1, min(THREADS, len(self._pending)))
        queues: list[queue.Queue] = [queue.Queue() for _ in range(workers)]
        self._queues = queues
        self._queue_of = {path: queues[i % workers] for i, path in enumerate(self._pending)}
        self._stop = threading.Event()
        self.failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(jobs,), name="input-sha256", daemon=True)
            for jobs in queues
        ]
        for thread in self._threads:
            thread.start()
        for path, header in self._pending.items():
            self.advance(path, min(header.stamp.size, HEAD_START))

    def advance(self, path: Path, end: int) -> None:
        """Let the hash of ``path`` proceed to absolute position ``end``."""
        if path in self._pending:
            self._queue_of[path].put((path, end))

    def finish(self) -> dict[Path, str]:
        """Hash what is left of every file and return all digests."""
        for path, header in self._pending.items():
            self.advance(path, header.stamp.size)
        self._join()
        if self.failure is not None:
            raise self.failure
        computed = [(h, self._hashes[p].hexdigest()) for p, h in self._pending.items()]
        self.digests.update({h.file: d for h, d in computed})
        remember(computed)
        return self.digests

    def stop(self) -> None:
        """End the thread without results."""
        self._stop.set()
        self._join()

    def _join(self) -> None:
        for jobs in self._queues:
            jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, jobs: queue.Queue) -> None:
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        descriptors: dict[Path, int] = {}
        try:
            while not self._stop.is_set():
                job = jobs.get()
                if job is None:
                    return
                path, end = job
                if path not in descriptors:
                    if len(descriptors) >= min(16, open_file_budget()):
                        os.close(descriptors.pop(next(iter(descriptors))))
                    try:
                        descriptors[path] = open_regular(path)
                    except InputError:
                        continue  # gone: the readers, or the last look at all inputs, say so
                position = self._position[path]
                while position < end and not self._stop.is_set():
                    count = os.preadv(descriptors[path], [view[: min(CHUNK, end - position)]], position)
                    if count == 0:
                        break  # shrank: the readers report it with the file's name
                    self._hashes[path].update(view[:count])
                    position += count
                self._position[path] = position
        except BaseException as error:
            self.failure = error
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
