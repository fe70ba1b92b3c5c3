"""The places of a run: inputs, a work folder that one run at a time may use, a destination that may already hold the result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.digests import InputDigester
from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, OutputConflict
from surgeon.output import staging
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


def inputs_of(source: Any) -> list[Path]:
    """Return the folder and files that are read."""
    checkpoint = source.checkpoint
    folders = [checkpoint.folder, getattr(checkpoint, "adapter_folder", None)]
    return [*(path for path in folders if path is not None), *(header.file for header in checkpoint.headers)]


def enough_disk(needed: dict[str, int], destination: Path, work: Path) -> dict[str, int]:
    """Refuse to begin without ``needed`` bytes of "results" and "work"; return them with what is free.

    Raises:
        EnvironmentFault: E501.
    """
    free = {}
    for name, place in (("results", destination.parent), ("work", _existing(work))):
        free[place.stat().st_dev] = shutil.disk_usage(place).free
        needed[f"{name}_free"] = free[place.stat().st_dev]
    same = len(free) == 1
    wanted = needed["results"] + needed["work"]
    short = wanted > min(free.values()) if same else any(
        needed[name] > needed[f"{name}_free"] for name in ("results", "work")
    )  # fmt: skip
    if short:
        raise EnvironmentFault(
            "E501", f"not enough disk space: {needed['results'] / 1e9:.1f} GB for results and up to {needed['work'] / 1e9:.1f} GB for "
            f"work are needed, {min(free.values()) / 1e9:.1f} GB are free", help="--work FOLDER puts the work elsewhere; or fewer targets",
        )  # fmt: skip
    return needed


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def check_places(
    work: Path, destination: Path, inputs: list[Path], *, overwrite: bool, is_file: bool = False
) -> None:
    """Refuse an output that exists or is an input, and a work folder inside an input (faults A8, A9)."""
    staging.check_destination(destination, inputs, overwrite=overwrite, is_file=is_file)
    place = work.resolve()
    for folder in inputs:
        if folder.is_dir() and place.is_relative_to(folder.resolve()):
            raise OutputConflict("E602", f"the work folder {printable(str(place))} lies inside the model",
                                 help="choose another --work; inputs are never modified")  # fmt: skip
