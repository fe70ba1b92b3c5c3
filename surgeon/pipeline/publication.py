"""From a verified model in the work folder to its name: staged beside the destination, published by one rename.

The same staging as every command's: P1 holds, and a run that died half-way goes on where it stopped. On another file
system the files are copied and verified there first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from surgeon import __version__
from surgeon.errors import InputError, Where
from surgeon.output import staging as stage
from surgeon.output.disk import Disk
from surgeon.output.manifest import MANIFEST
from surgeon.pipeline.digests import intact, made_digest


def publish(
    candidates: Mapping[str, Path],
    destination: Path,
    *,
    overwrite: bool,
    resume: bool = True,
    disk: Disk | None = None,
) -> None:
    """Move verified models to their destination, all at once.

    Args:
        candidates: "" -> the one model, which becomes the destination; or name -> model of a sweep, each a folder in it.
        overwrite: replace what is there, as a whole.
        resume: go on with what an interrupted publication left; else it is thrown away.

    Raises:
        InputError: E353 a candidate is not what its manifest says.
        OutputConflict: as every command that writes.
    """
    disk = disk or Disk()
    is_file = set(candidates) == {""} and destination.suffix == ".gguf"
    stage.recover_overwritten(destination, disk)
    plan = identity(candidates)
    opened = stage.open_staging(
        destination, {"program": __version__, "run": plan}, plan, is_file=is_file, resume=resume, disk=disk
    )
    try:
        if not any("verified" in record for record in opened.records):
            for key, candidate in candidates.items():
                _stage(opened, key, candidate, is_file)
            for folder in sorted({opened.model, *(p for p in opened.model.rglob("*") if p.is_dir())}):
                disk.sync_folder(folder)
            opened.journal.append({"verified": {"models": sorted(candidates)}}, sync=True)
        stage.publish(opened, overwrite=overwrite)
    except BaseException:
        opened.close()
        raise


def identity(candidates: Mapping[str, Path]) -> str:
    """Return what identifies a publication; of one model its plan's id, by which leftovers are recognised."""
    if set(candidates) == {""}:
        path = candidates[""]
        manifest = path / MANIFEST if path.is_dir() else path.with_name(f"{path.name}.{MANIFEST}")
        content = json.loads(manifest.read_bytes())
        return str(content.get("plan") or hashlib.sha256(manifest.read_bytes()).hexdigest())
    return hashlib.sha256(
        json.dumps({key: made_digest(path) for key, path in candidates.items()}, sort_keys=True).encode()
    ).hexdigest()


def staged(destination: Path, digest: str) -> Path | None:
    """Return where a model lies that an interrupted publication had staged already."""
    if not destination.parent.is_dir():
        return None
    for leftover in stage.leftovers(destination):
        place = leftover / stage.MODEL
        for path in (place / destination.name, place) if destination.suffix == ".gguf" else (place,):
            if path.exists() and made_digest(path) == digest:
                return path
    return None


def _stage(opened: stage.Staging, key: str, candidate: Path, is_file: bool) -> None:
    """Bring one model into the staging folder: by rename, or by copying and verifying the copy."""
    disk = opened.disk
    files = [candidate.with_name(f"{candidate.name}.{MANIFEST}"), candidate] if is_file else [candidate]
    targets = (
        [opened.model / path.name for path in files]
        if is_file
        else [opened.model / key if key else opened.model]
    )
    for source, target in zip(files, targets, strict=True):
        if not source.exists() and target.exists():  # an interrupted publication had brought it here
            continue
        if target.exists():
            disk.remove_tree(target) if target.is_dir() else disk.remove(target)
        if source.is_relative_to(opened.destination):  # what is published stays whole until it is replaced
            _copy(disk, source, target)
            continue
        try:
            disk.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy(disk, source, target)
    if not intact(targets[-1]):
        raise InputError("E353", f"the finished model {candidate} is not what its manifest says", where=Where(str(candidate)),
                         help="the disk or another program changed it; run again to make it anew")  # fmt: skip


def _copy(disk: Disk, source: Path, target: Path) -> None:
    """Copy a file or a folder, every file synced; the source stays until the copy is published."""
    if source.is_dir():
        disk.make_folder(target)
        for path in sorted(source.iterdir()):
            _copy(disk, path, target / path.name)
        return
    disk.copy_file(source, target)


def remove(path: Path) -> None:
    """Remove a model of the work folder, a file's manifest with it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.{MANIFEST}").unlink(missing_ok=True)
