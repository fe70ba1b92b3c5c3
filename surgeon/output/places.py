"""The places of a run: a work folder that one run at a time may use, and a destination that may already hold the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.digests import InputDigester
from surgeon.output.staging import DestinationLock

BEAT = 60.0
"""Seconds between two signs of life in the lock of a work folder."""


Run = Any
"""A session of any kind of pruning: it has source, work, tell, asked and release()."""


@contextmanager
def locked(session: Run) -> Iterator[None]:
    """Hold the work folder: two runs that share it would take each other's candidates for their own."""
    session.work.parent.mkdir(parents=True, exist_ok=True)
    lock = DestinationLock.acquire(session.work)
    told: Callable[[str, int, int], None] = session.tell
    last = [time.monotonic()]

    def tell(what: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > BEAT:
            last[0] = time.monotonic()
            lock.heartbeat()
        told(what, done, total)

    session.tell = tell
    try:
        yield
    finally:
        session.release()
        lock.release()


def same_result(session: Run, manifest: Mapping[str, Any]) -> bool:
    """Say whether a result was made by the same program from the same source, request and text."""
    recipe = manifest["recipe"]
    asked = json.loads(json.dumps(session.asked))
    if manifest["program"]["version"] != __version__ or any(
        recipe.get(name) != asked[name] for name in asked
    ):
        return False
    recorded = dict(recipe.get("source") or {})
    if not recorded:
        files = (model["files"] for model in manifest["inputs"].values())
        recorded = {name: file["sha256"] for one in files for name, file in one.items()}
    digests = InputDigester(list(session.source.checkpoint.headers)).finish()
    return all(recorded.get(file.name) == digest for file, digest in digests.items())
