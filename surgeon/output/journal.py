"""The record of finished work in a staging folder.

One line per record: crc32 of the text, a blank, JSON. A torn or damaged line ends the
readable prefix; what follows is recomputed (fault A7).
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from surgeon.output.disk import Disk


def encode(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the records of the readable prefix; [] when there is none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    for line in raw.split(b"\n")[:-1]:
        checksum, _, text = line.partition(b" ")
        try:
            if int(checksum, 16) != zlib.crc32(text) or len(checksum) != 8:
                break
            records.append(json.loads(text))
        except ValueError:
            break
    return records


class Journal:
    """Appends records; safe to call from several threads."""

    def __init__(self, path: Path, disk: Disk, keep: list[dict[str, Any]] | None = None) -> None:
        self._disk = disk
        self._lock = threading.Lock()
        if keep is None:
            self._descriptor = disk.create(path)
        else:
            # A damaged tail must not hide records appended after it: cut the file to its readable prefix.
            self._descriptor = disk.reopen(path)
            os.ftruncate(self._descriptor, sum(len(encode(r)) for r in keep))
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def append(self, record: dict[str, Any], sync: bool = False) -> None:
        with self._lock:
            self._disk.append(self._descriptor, encode(record))
            if sync:
                self._disk.sync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
