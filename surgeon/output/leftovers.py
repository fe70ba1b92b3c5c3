"""What interrupted runs left beside their destinations, and how to be rid of it.

    .NAME.surgeon-<12 hex>    a staging folder: journal and unfinished model
    .NAME.surgeon-lock        the lock file of a run that was killed
    .NAME.surgeon-old-<hex>   the previous NAME, moved aside by an overwrite that was killed

Nothing is touched while a run holds the destination's lock, here or (by its heartbeat) elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.errors import EnvironmentFault, InputError
from surgeon.output.disk import Disk
from surgeon.output.journal import read_journal
from surgeon.output.staging import (
    JOURNAL,
    MODEL,
    STALE_SECONDS,
    DestinationLock,
    recover_overwritten,
    staging_prefix,
)

_NAME = re.compile(r"\.(?P<name>.+)\.surgeon-(?P<rest>lock|old-[0-9a-f]{8}|[0-9a-f]{12})", re.DOTALL)


@dataclass(frozen=True)
class Leftover:
    """One thing a dead run left.

        Attributes:
            path: where it lies.
            destination: what that run was writing.
            kind: "staging", "lock" or "previous" (the former content of the destination).
            bytes: what removing it frees.
            finished: items the journal records as done.
    X
            destination_exists: with "previous", False means that it is the only copy.
    """

    path: Path
    destination: Path
    kind: str
    bytes: int
    finished: int = 0
    plan: str | None = None
    verb: str | None = None
    inputs: tuple[str, ...] = ()
    destination_exists: bool = False


def find(folder: Path) -> tuple[list[Leftover], list[Path]]:
    """Return the leftovers in a folder, and the destinations that a live run is writing.

    Raises:
        InputError: E301 no such folder.
        EnvironmentFault: E502 it cannot be read.
    """
    if not folder.is_dir():
        raise InputError("E301", f"no such folder: {folder}", help="give the folder that holds the outputs")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise EnvironmentFault(
            "E502", f"cannot read {folder}: {error.strerror}", help="give another folder"
        ) from error
    found: dict[Path, list[Leftover]] = {}
    for path in entries:
        match = _NAME.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        destination = folder / match["name"]
        leftover = _describe(path, destination, match["rest"])
        if leftover is not None:
            found.setdefault(destination, []).append(leftover)
    live = [destination for destination in found if _is_live(destination)]
    return [item for d, items in found.items() if d not in live for item in items], live


def _describe(path: Path, destination: Path, rest: str) -> Leftover | None:
    if rest == "lock":
        return Leftover(path, destination, "lock", 0) if path.is_file() else None
    if not path.is_dir():
        return None
    if rest.startswith("old-"):
        return Leftover(path, destination, "previous", _size(path), destination_exists=destination.exists())
    known = (path / JOURNAL).exists() or (path / MODEL).exists()
    if not known and any(path.iterdir()):
        return None  # not ours
    try:
        records = read_journal(path / JOURNAL)
    except OSError:
        records = []
    start = records[0] if records else {}
    fingerprint = start.get("fingerprint")
    facts: dict[str, Any] = fingerprint if isinstance(fingerprint, dict) else {}
    inputs = facts.get("inputs")
    return Leftover(
        path, destination, "staging", _size(path), sum(1 for r in records if "item" in r),
        plan=_text(start.get("plan")), verb=_text(facts.get("verb")),
        inputs=tuple(map(str, inputs)) if isinstance(inputs, (dict, list)) else (),
    )  # fmt: skip


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _size(path: Path) -> int:
    """Return allocated bytes below a folder, links not followed."""
    total = 0
    for root, _, files in os.walk(path):
        for name in files:
            try:
                info = os.lstat(os.path.join(root, name))
            except OSError:
                continue
            total += min(info.st_size, getattr(info, "st_blocks", info.st_size) * 512)
    return total


def _is_live(destination: Path) -> bool:
    """Say whether a run holds the destination's lock, or another host's heartbeat is recent; changes nothing."""
    path = destination.parent / f"{staging_prefix(destination)}lock"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return False  # a run creates its lock before anything else and removes it last
    except OSError:
        return True  # it cannot be asked, so it counts as held
    try:
        holder = json.loads(os.read(descriptor, 4096) or b"{}")
        elsewhere = isinstance(holder, dict) and holder.get("host") not in {None, socket.gethostname()}
        if elsewhere and time.time() - os.fstat(descriptor).st_mtime < STALE_SECONDS:
            return True
    except (ValueError, OSError):
        pass
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    finally:
        os.close(descriptor)
    return False


def restore(leftover: Leftover) -> Path | None:
    """Put the previous model back when its overwrite died between two renames; None when there is no need."""
    return recover_overwritten(leftover.destination, Disk())


def remove(leftover: Leftover) -> bool:
    """Remove one leftover under the destination's lock; False when it is gone already.

    Raises:
        OutputConflict: E603 a run has taken the destination meanwhile.
        EnvironmentFault: E502 not permitted.
    """
    lock = DestinationLock.acquire(leftover.destination)
    try:
        if leftover.kind == "lock":
            return True  # released below, which removes it
        if not leftover.path.is_dir() or leftover.path.is_symlink():
            return False
        if leftover.kind == "previous" and not leftover.destination.exists():
            return False  # the only copy
        Disk().remove_tree(leftover.path)
        return True
    except PermissionError as error:
        raise EnvironmentFault(
            "E502", f"cannot remove {leftover.path}: permission denied", help="remove it as its owner"
        ) from error
    finally:
        lock.release()
