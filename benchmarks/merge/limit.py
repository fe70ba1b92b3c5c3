"""The physical limit of a merge: read all inputs once, write the output once, fsync, re-read with SHA-256.

No arithmetic, no checks, one process, each step at the best this machine gives: inputs are read by
as many threads as there are processors, and the written file is hashed in one go, as any verified
merge has to do at least.

    python benchmarks/merge/limit.py OUT INPUT.safetensors [INPUT.safetensors ...]

The output is as large as the first input, with content from it, so that no file system can cheat.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

CHUNK = 4 << 20


def _read(jobs: list[tuple[str, int, int]]) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for path, start, stop in jobs:
        descriptor = os.open(path, os.O_RDONLY)
        position = start
        while position < stop:
            count = os.preadv(descriptor, [buffer[: min(CHUNK, stop - position)]], position)
            if not count:
                break
            position += count
        os.close(descriptor)


def measure(out: Path, inputs: list[str]) -> dict[str, float]:
    """Run the four steps and return their seconds."""
    threads = len(os.sched_getaffinity(0))
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    parts: list[list[tuple[str, int, int]]] = [[] for _ in range(threads)]
    for path in inputs:
        size = os.stat(path).st_size
        step = -(-size // threads)
        for number in range(threads):
            parts[number].append((path, number * step, min(size, (number + 1) * step)))
    workers = [threading.Thread(target=_read, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds["read"] = time.perf_counter() - began

    with open(inputs[0], "rb") as stream:
        content = stream.read(CHUNK)
    size = os.stat(inputs[0]).st_size
    began = time.perf_counter()
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    position = 0
    while position < size:
        position += os.write(descriptor, memoryview(content)[: min(CHUNK, size - position)])
    seconds["write"] = time.perf_counter() - began
    began = time.perf_counter()
    os.fsync(descriptor)
    seconds["fsync"] = time.perf_counter() - began
    began = time.perf_counter()
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(buffer[:count])
        position += count
    seconds["reread_sha256"] = time.perf_counter() - began
    os.close(descriptor)
    seconds["total"] = sum(seconds.values())
    return seconds


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    try:
        print(json.dumps({k: round(v, 3) for k, v in measure(target, sys.argv[2:]).items()}))
    finally:
        target.unlink(missing_ok=True)
