"""Staging: everything is built beside the destination and moved there when it is verified.

    .OUT.surgeon-<random>/   journal     what is finished
                             model/      the folder (or file) to be
    .OUT.surgeon-lock        who is writing OUT now

P1: the destination is absent or unchanged, or complete and verified, whatever kills the
process. Publication is one rename; with --overwrite one exchange; on a mount point the files
move one by one, config.json leaving first and arriving last, because loaders refuse a folder
without it.

Codes: E502 not permitted, E503 name too long, E601 destination exists, E602 destination is an
input, E603 another run is writing it, E604 foreign files, E605 leftover of another plan.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, OutputConflict
from surgeon.output.disk import Disk
from surgeon.output.journal import Journal, read_journal

JOURNAL = "journal"
MODEL = "model"
STALE_SECONDS = 15 * 60
COMMIT_RECORD = "config.json"
HIDDEN = ".surgeon-"
"""Begins the names of folders inside a destination that is filled file by file."""


def staging_prefix(destination: Path) -> str:
    return f".{destination.name}.surgeon-"


def check_destination(destination: Path, inputs: list[Path], *, overwrite: bool, is_file: bool) -> None:
    """Refuse a destination that is an input, exists, or cannot be created (faults A8, A9, A14).

    ``inputs`` are folders and files that are read; identity is by device and inode, so links,
    bind mounts and ``..`` do not hide it.
    """
    parent = destination.parent
    try:
        long_name = len(os.fsencode(staging_prefix(destination))) + 20
        if long_name > 255:
            raise EnvironmentFault(
                "E503",
                f"the output name is too long: {printable(destination.name)[:60]}...",
                help="names up to 220 bytes work",
            )
        if not parent.exists():
            raise EnvironmentFault(
                "E502",
                f"the folder for the output does not exist: {printable(str(parent))}",
                help=f"mkdir -p '{printable(str(parent))}'",
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise EnvironmentFault(
                "E502", f"cannot write into {printable(str(parent))}", help="choose another -o"
            )
        _check_not_input(destination, inputs)
        if destination.is_symlink():
            raise OutputConflict(
                "E601",
                f"the output {printable(str(destination))} is a link",
                help="give the real path, or choose another -o",
            )
        if not destination.exists():
            return
        if is_file:
            if not destination.is_file():
                raise OutputConflict(
                    "E601",
                    f"the output {printable(str(destination))} exists and is not a file",
                    help="choose another -o",
                )
            if not overwrite:
                raise OutputConflict(
                    "E601",
                    f"the output exists: {printable(str(destination))}",
                    help="choose another -o, or --overwrite to replace it",
                )
            return
        if not destination.is_dir():
            raise OutputConflict(
                "E601",
                f"the output {printable(str(destination))} is a file, a folder is needed",
                help="choose another -o",
            )
        found = sorted(p.name for p in destination.iterdir())
        entries = [name for name in found if not name.startswith(HIDDEN)]
    except PermissionError as error:
        raise EnvironmentFault(
            "E502",
            f"cannot access {printable(str(destination))}: permission denied",
            help="choose another -o",
        ) from error
    except OSError as error:
        if error.errno in {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EROFS}:
            raise EnvironmentFault(
                "E503", f"the output path does not work: {error.strerror}", help="choose another -o"
            ) from error
        raise
    if not entries:
        return
    if not overwrite and len(entries) == len(found):  # else a publication stopped half-way and goes on
        raise OutputConflict(
            "E601",
            f"the output folder exists and is not empty: {printable(str(destination))}",
            help="choose another -o, or --overwrite to replace the model in it",
        )
    foreign = _foreign_entries(destination)
    if foreign:
        shown = ", ".join(printable(f) for f in foreign[:3])
        raise OutputConflict(
            "E604",
            f"{printable(str(destination))} holds files that are no part of a model: {shown}",
            help="they would be lost; move them away, or choose another -o",
        )


def _check_not_input(destination: Path, inputs: list[Path]) -> None:
    def identity(path: Path) -> tuple[int, int] | None:
        try:
            info = os.stat(path)
        except OSError:
            return None
        return info.st_dev, info.st_ino

    chain = [destination.resolve(), *destination.resolve().parents]
    above = {identity(p) for p in chain if p.exists()}
    here = identity(destination)
    for path in inputs:
        mine = identity(path)
        if mine is None:
            continue
        real = path.resolve()
        if mine == here:
            raise OutputConflict(
                "E602",
                f"the output is also an input: {printable(str(destination))}",
                help="choose another -o; inputs are never modified",
            )
        if path.is_dir() and mine in above:
            raise OutputConflict(
                "E602",
                f"the output lies inside the input {printable(str(path))}",
                help="choose another -o; inputs are never modified",
            )
        if here is not None and here in {identity(p) for p in real.parents}:
            raise OutputConflict(
                "E602",
                f"the input {printable(str(path))} lies inside the output folder",
                help="choose another -o; inputs are never modified",
            )
        if (
            here is not None
            and destination.is_dir()
            and path.is_file()
            and any(identity(p) == mine for p in destination.iterdir())
        ):
            raise OutputConflict(
                "E602",
                f"the output folder holds the input file {printable(path.name)}",
                help="choose another -o; inputs are never modified",
            )


_MODEL_SUFFIXES = {
    ".safetensors",
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".md",
    ".py",
    ".yml",
    ".yaml",
    ".tiktoken",
}
_MODEL_NAMES = {"LICENSE", "NOTICE", "SHA256SUMS", "USE_POLICY", ".gitattributes"}


def _foreign_entries(folder: Path) -> list[str]:
    """Return entries that surgeon would not have written and no checkpoint needs."""
    manifest = folder / "surgeon.json"
    listed: set[str] = set()
    if manifest.is_file():
        try:
            listed = set(json.loads(manifest.read_bytes()).get("files", {}))
        except (ValueError, AttributeError):
            listed = set()
    names = [
        p
        for p in sorted(folder.rglob("*"))
        if (p.is_file() or p.is_symlink()) and not p.relative_to(folder).parts[0].startswith(HIDDEN)
    ]
    relative = {str(p.relative_to(folder)) for p in names}
    moving = any(p.name.startswith(HIDDEN) for p in folder.iterdir())
    if (
        not listed
        and not moving
        and not any(n == COMMIT_RECORD or n.endswith(".safetensors") for n in relative)
    ):
        return sorted(relative)
    foreign = []
    for path in names:
        name = str(path.relative_to(folder))
        known = name in listed or path.name in _MODEL_NAMES or path.name.split(".")[0] in _MODEL_NAMES
        if known or path.suffix in _MODEL_SUFFIXES:
            continue
        foreign.append(name)
    return foreign


@dataclass
class DestinationLock:
    """Advisory lock on a destination; correctness never depends on it (staging names are unique)."""

    path: Path
    descriptor: int

    @classmethod
    def acquire(cls, destination: Path) -> DestinationLock:
        path = destination.parent / f"{staging_prefix(destination)}lock"
        for _ in range(100):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not _try_lock(descriptor):
                holder = _holder(descriptor)
                os.close(descriptor)
                raise _busy(destination, holder)
            try:
                same = os.stat(path).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                same = False
            if not same:  # the previous holder removed the file between our open and our lock
                os.close(descriptor)
                continue
            holder = _holder(descriptor)
            age = time.time() - os.fstat(descriptor).st_mtime
            if holder and holder.get("host") != socket.gethostname() and age < STALE_SECONDS:
                os.close(descriptor)
                raise _busy(destination, holder)
            note = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(note).encode(), 0)
            except OSError:
                os.close(descriptor)
                raise
            return cls(path, descriptor)
        raise _busy(destination, {})

    def heartbeat(self) -> None:
        os.utime(self.descriptor)

    def release(self) -> None:
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):  # the folder may be gone; a lock file alone blocks nobody
                os.unlink(self.path)
            os.close(self.descriptor)
            self.descriptor = -1


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: unique staging names still keep results whole
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # file systems without locks
    return True


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}


def _busy(destination: Path, holder: dict[str, Any]) -> OutputConflict:
    who = (
        f"pid {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        if holder
        else "unknown"
    )
    return OutputConflict(
        "E603",
        f"another run ({who}) is writing {printable(destination.name)}",
        help='wait, choose another -o, or "surgeon clean" if that machine is gone',
    )


@dataclass
class Staging:
    """One run's working place beside its destination."""

    destination: Path
    folder: Path
    is_file: bool
    disk: Disk
    lock: DestinationLock
    journal: Journal
    plan_id: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def filling(self) -> Path:
        """Inside a destination that cannot be replaced: where the new files gather beside the old."""
        return self.destination / f"{HIDDEN}{self.plan_id[:12]}"

    @property
    def moving(self) -> Path:
        """The same folder once the old files are gone: what is not in it has arrived."""
        return self.destination / f"{HIDDEN}{self.plan_id[:12]}.new"

    def places(self, name: str) -> list[Path]:
        """Return where a file of the (only) output model can be, publication having begun or not."""
        if self.is_file:
            return [self.model / name, self.destination.parent / name]
        found = [self.model / name, self.filling / name, self.moving / name]
        return [*found, self.destination / name] if self.moving.exists() else found

    def close(self) -> None:
        """Release the lock and leave the staging folder for a later resume."""
        self.journal.close()
        self.lock.release()

    def discard(self) -> None:
        """Remove the staging folder and release the lock."""
        self.journal.close()
        if self.folder.exists():
            self.disk.remove_tree(self.folder)
        self.lock.release()


def leftovers(destination: Path) -> list[Path]:
    """Return staging folders of earlier runs to this destination."""
    prefix = staging_prefix(destination)
    found = [p for p in destination.parent.iterdir() if p.name.startswith(prefix) and p.is_dir()]
    return sorted(p for p in found if not p.name.startswith(f"{prefix}old-"))


def replaced(destination: Path) -> list[Path]:
    """Return previous models that were moved aside for a new one (systems without exchange)."""
    prefix = f"{staging_prefix(destination)}old-"
    return sorted(p for p in destination.parent.iterdir() if p.name.startswith(prefix) and p.is_dir())


def clear_leftovers(destination: Path, disk: Disk) -> None:
    """Remove what runs left that died after publishing; the destination is known to be complete."""
    hidden = [p for p in destination.iterdir() if p.name.startswith(HIDDEN)] if destination.is_dir() else []
    lock_file = destination.parent / f"{staging_prefix(destination)}lock"
    if not (hidden or leftovers(destination) or replaced(destination) or lock_file.exists()):
        return
    try:
        lock = DestinationLock.acquire(destination)
    except OutputConflict:
        return  # another run is at work there; it will tidy up after itself
    try:
        for old in (*leftovers(destination), *replaced(destination), *hidden):
            if _published(old, destination):
                disk.remove_tree(old)
    finally:
        lock.release()


def _published(old: Path, destination: Path) -> bool:
    """Say whether the run that left ``old`` got its result to the destination (or had none)."""
    records = read_journal(old / JOURNAL)
    if not records:
        return True
    return any("verified" in r for r in records) and records[0].get("plan") == _plan_at(destination)


def _plan_at(destination: Path) -> str | None:
    manifest = destination / "surgeon.json"
    if not manifest.is_file():
        manifest = destination.with_name(f"{destination.name}.surgeon.json")
    try:
        return json.loads(manifest.read_bytes()).get("plan")
    except (OSError, ValueError, AttributeError):
        return None


def open_staging(
    destination: Path, fingerprint: dict[str, Any], plan_id: str, *, is_file: bool, resume: bool, disk: Disk
) -> Staging:
    """Take the lock and create a staging folder, or adopt the one a dead run of the same plan left.

    Raises:
        OutputConflict: E603 another run holds the destination; E605 a leftover of another plan.
    """
    lock = DestinationLock.acquire(destination)
    journal: Journal | None = None
    try:
        records: list[dict[str, Any]] = []
        adopted: Path | None = None
        for old in leftovers(destination):
            found = read_journal(old / JOURNAL)
            start = found[0] if found else {}
            same = start.get("fingerprint") == json.loads(json.dumps(fingerprint))
            if resume and adopted is None and same:
                adopted, records = old, found
            elif not resume or not start or same or _published(old, destination):
                disk.remove_tree(old)
            else:
                raise OutputConflict(
                    "E605",
                    f"an interrupted run to {printable(destination.name)} had another plan: "
                    f"{differences(start.get('fingerprint', {}), fingerprint)}",
                    help="--no-resume discards it; or repeat that run's command to finish it",
                )
        folder = destination.parent / f"{staging_prefix(destination)}{secrets.token_hex(6)}"
        if adopted is not None:
            disk.rename(adopted, folder)
            journal = Journal(folder / JOURNAL, disk, keep=records)
        else:
            disk.make_folder(folder)
            disk.make_folder(folder / MODEL)
            journal = Journal(folder / JOURNAL, disk)
            journal.append({"plan": plan_id, "fingerprint": fingerprint}, sync=True)
        return Staging(destination, folder, is_file, disk, lock, journal, plan_id, records)
    except BaseException:
        if journal is not None:
            journal.close()
        lock.release()
        raise


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the parts in which two fingerprints differ."""
    parts = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    return ", ".join(parts) + " differ" if parts else "unknown difference"


def publish(staging: Staging, *, overwrite: bool) -> None:
    """Move the verified model to its destination (P1) and remove the staging folder.

    The caller has synced every file. Safe to repeat after an interruption at any point.
    """
    disk, destination = staging.disk, staging.destination
    if staging.is_file:
        if destination.exists() and (staging.model / destination.name).exists() and not overwrite:
            raise _appeared(staging)
        _publish_file(staging)
    elif staging.filling.exists() or staging.moving.exists():
        _move_into(staging)
    else:
        disk.sync_folder(staging.model)
        if destination.exists() and any(destination.iterdir()) and not overwrite:
            raise _appeared(staging)
        _publish_folder(staging)
    disk.sync_folder(destination.parent)
    staging.journal.close()
    if staging.folder.exists():
        disk.remove_tree(staging.folder)
    staging.lock.release()


def _appeared(staging: Staging) -> OutputConflict:
    return OutputConflict(
        "E601",
        f"{printable(str(staging.destination))} appeared while this run was working",
        help=f"the finished model is in {printable(str(staging.model))}; --overwrite replaces what appeared",
    )


def _publish_file(staging: Staging) -> None:
    # The weight file last: a run that dies in between has published nothing and is simply repeated.
    disk, destination, model = staging.disk, staging.destination, staging.model
    for source in sorted(model.iterdir(), key=lambda p: (p.name == destination.name, p.name)):
        disk.rename(source, destination.parent / source.name)


def _publish_folder(staging: Staging) -> None:
    disk, destination, model = staging.disk, staging.destination, staging.model
    if os.path.ismount(destination):
        return _move_into(staging)
    try:
        if not destination.exists() or not any(destination.iterdir()):
            disk.rename(model, destination)
        elif not disk.exchange(model, destination):
            old = destination.parent / f"{staging_prefix(destination)}old-{secrets.token_hex(4)}"
            disk.rename(destination, old)
            disk.rename(model, destination)
            disk.sync_folder(destination.parent)
            for folder in replaced(destination):
                disk.remove_tree(folder)
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.EXDEV}:
            raise
        _move_into(staging)


def _move_into(staging: Staging) -> None:
    """Fill a folder that cannot itself be replaced; config.json leaves first and arrives last.

    Three steps, each of which can be repeated: gather the new files in a hidden folder inside the
    destination; remove the old ones and rename the hidden folder, which says that they are gone;
    move the new ones out of it.
    """
    disk, destination, model = staging.disk, staging.destination, staging.model
    filling, moving = staging.filling, staging.moving
    if not destination.exists():
        disk.make_folder(destination)
    if not moving.exists():
        if not filling.exists():
            disk.make_folder(filling)
        for source in sorted(model.rglob("*")):
            target = filling / source.relative_to(model)
            if not source.is_dir():
                _move(disk, source, target)
            elif not target.exists():
                disk.make_folder(target)
        disk.sync_folder(filling)
        for path in sorted(destination.iterdir(), key=lambda p: (p.name != COMMIT_RECORD, p.name)):
            if path == filling or path.name == "lost+found":
                continue
            if path.is_dir() and not path.is_symlink():
                disk.remove_tree(path)
            else:
                disk.remove(path)
            if path.name == COMMIT_RECORD:
                disk.sync_folder(destination)
        disk.rename(filling, moving)
    for source in sorted(moving.iterdir(), key=lambda p: (p.name == COMMIT_RECORD, p.name)):
        if source.name == COMMIT_RECORD:
            disk.sync_folder(destination)
        disk.rename(source, destination / source.name)
    disk.sync_folder(destination)
    disk.remove_tree(moving)


def _move(disk: Disk, source: Path, target: Path) -> None:
    """Rename a file, or copy it where the target is on another file system."""
    try:
        disk.rename(source, target)
        return
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EBUSY}:
            raise
    partial = target.with_name(target.name + ".part")
    if partial.exists():
        disk.remove(partial)
    disk.copy_file(source, partial)
    disk.rename(partial, target)
    disk.remove(source)


def recover_overwritten(destination: Path, disk: Disk) -> Path | None:
    """Put back the previous folder when a run died between the two renames (fault A13)."""
    if destination.exists() or not destination.parent.is_dir() or not replaced(destination):
        return None
    lock = DestinationLock.acquire(destination)
    try:
        old = replaced(destination)
        if destination.exists() or not old:  # the run was not dead and has just finished
            return None
        disk.rename(old[-1], destination)
        disk.sync_folder(destination.parent)
        return destination
    finally:
        lock.release()
