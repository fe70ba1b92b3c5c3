"""From a Plan to a published, verified model: staging, engine, manifest, verification, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon import __version__, engine
from surgeon.checkpoint.digests import known_digest, remember
from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, OutputConflict
from surgeon.output import staging as stage
from surgeon.output.disk import Disk
from surgeon.output.layout import Layout, lay_out
from surgeon.output.manifest import CHECKSUMS, MANIFEST, checksums, manifest, seal, sha256
from surgeon.output.writer import ModelWriter
from surgeon.plan import Estimate, Plan, estimate
from surgeon.system import memory_budget
from surgeon.verify.static import verify_model


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        path: the published folder or file.
        models: key -> folder (or file) of each output model.
        unchanged: an identical result was already there; nothing was done.
    """

    path: Path
    models: dict[str, Path]
    manifests: dict[str, dict[str, Any]]
    timing: engine.Timing
    resumed_items: int = 0
    unchanged: bool = False
    seconds: float = 0.0
    summaries: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Answer of a dry run: what the plan needs against what this machine has."""

    estimate: Estimate
    threads: int
    memory_limit: int
    disk_free: int


def preflight(plan: Plan, destination: Path, *, threads: int, memory_limit: int | None) -> Check:
    """Check memory and disk before anything is written; lower the threads if that makes it fit.

    Raises:
        EnvironmentFault: E501 not enough disk, E504 not enough memory (fault H1).
    """
    needed, threads, limit = fit_memory(plan, threads, memory_limit)
    parent = destination.parent
    try:
        info = os.statvfs(parent)
        free = info.f_bavail * info.f_frsize
    except OSError:
        free = 1 << 62  # no such call here; a late ENOSPC is still handled
    held = sum(_size(p) for p in stage.leftovers(destination)) if parent.exists() else 0
    if needed.disk_bytes > free + held:
        raise EnvironmentFault(
            "E501", f"not enough disk space for {printable(str(destination))}: needs {needed.disk_bytes / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB free",
            help="--dtype bfloat16 halves float32 output; --overwrite does not free the old model first",
        )  # fmt: skip
    return Check(needed, threads, limit, free)


def fit_memory(plan: Plan, threads: int, memory_limit: int | None) -> tuple[Estimate, int, int]:
    """Return what a plan needs, with how many threads, and the limit it fits into.

    Raises:
        EnvironmentFault: E504 not enough memory.
    """
    limit = memory_limit or memory_budget()
    needed = estimate(plan, threads)
    while needed.memory_bytes > limit and threads > 1:
        threads -= 1
        needed = estimate(plan, threads)
    if needed.memory_bytes > limit:
        raise EnvironmentFault(
            "E504", f"this needs about {needed.memory_bytes / 1e6:,.0f} MB of memory (for {printable(needed.largest_item)}), "
            f"the limit is {limit / 1e6:,.0f} MB", help="raise --memory-limit, or use a machine with more memory",
        )  # fmt: skip
    return needed, threads, limit


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def execute(
    plan: Plan,
    destination: Path,
    *,
    threads: int,
    overwrite: bool = False,
    resume: bool = True,
    memory_limit: int | None = None,
    progress: engine.Progress | None = None,
    stop: threading.Event | None = None,
    disk: Disk | None = None,
    input_paths: list[Path] | None = None,
) -> Outcome:
    """Run a plan and publish its result; P1 and P2 hold whatever happens.

    Args:
        plan: what to do.
        destination: a folder, or a file when the output has no config (bare files).
        threads: workers.
        overwrite: replace a previous model.
        resume: continue a matching interrupted run; a leftover of another plan is refused.
        memory_limit: bytes; default min(cgroup, 80 % of free memory).
        stop: set it to end early; finished work is kept.
        disk: file system calls (tests inject faults).
        input_paths: files and folders that are read, for the check that none is the output.

    Raises:
        SurgeonError: see the modules used; nothing is published then.
    """
    started = time.perf_counter()
    disk = disk or Disk()
    destination = Path(os.path.abspath(destination))
    is_file = all(model.config is None for model in plan.models.values()) and set(plan.models) == {""}
    if is_file and destination.suffix != ".safetensors":
        raise OutputConflict("E601", f"the result is one file without a config; {printable(destination.name)} must end in "
                             ".safetensors", help="give model folders to get a model folder")  # fmt: skip
    if not is_file and destination.suffix == ".safetensors":
        raise OutputConflict("E601", f"the result is a folder; {printable(destination.name)} looks like a file",
                             help="choose an -o without .safetensors")  # fmt: skip
    inputs = input_paths if input_paths is not None else input_locations(plan)
    try:
        stage.recover_overwritten(destination, disk)
        plan_id = plan.plan_id()
        same = _finished(destination, plan_id, is_file, plan)
        if same is not None:
            stage.clear_leftovers(destination, disk)
            return Outcome(
                destination, _paths(plan, destination, is_file), same, engine.Timing(), unchanged=True
            )
        stage.check_destination(destination, inputs, overwrite=overwrite, is_file=is_file)
        check = preflight(plan, destination, threads=threads, memory_limit=memory_limit)
        fingerprint = {"program": __version__, **plan.fingerprint(), "input files": _stamps(plan)}
        staging = stage.open_staging(
            destination, fingerprint, plan_id, is_file=is_file, resume=resume, disk=disk
        )
    except OSError as error:
        raise disk_fault(error, destination) from error
    try:
        result, manifests = _build(plan, staging, check.threads, progress, stop, is_file)
        stage.publish(staging, overwrite=overwrite)
    except OSError as error:
        staging.close()
        raise disk_fault(error, destination, staging.folder) from error
    except (MemoryError, RuntimeError) as error:
        staging.close()
        if not isinstance(error, MemoryError) and "start new thread" not in str(error):
            raise
        raise EnvironmentFault(
            "E504", f"the memory is used up; the largest piece of work is {printable(check.estimate.largest_item)}",
            help="set --memory-limit below what this process may use, or --threads lower; the same command continues",
        ) from error  # fmt: skip
    except InputError:
        # A wrong input will not become right by resuming; do not leave gigabytes behind.
        staging.discard()
        raise
    except BaseException:
        staging.close()
        raise
    return Outcome(
        destination, _paths(plan, destination, is_file), manifests, result.timing if result else engine.Timing(),
        result.resumed_items if result else len(plan.items), False, time.perf_counter() - started,
        summaries=result.summaries if result else {},
    )  # fmt: skip


def input_locations(plan: Plan) -> list[Path]:
    """Return every folder and weight file a plan reads."""
    found: dict[Path, None] = {}
    for checkpoint in plan.inputs.values():
        if checkpoint.folder is not None:
            found.setdefault(checkpoint.folder)
        adapter = getattr(checkpoint, "adapter_folder", None)
        if adapter is not None:
            found.setdefault(adapter)
        for header in checkpoint.headers:
            found.setdefault(header.file)
    return list(found)


def _paths(plan: Plan, destination: Path, is_file: bool) -> dict[str, Path]:
    return {key: destination / key if key else destination for key in plan.models}


def _stamps(plan: Plan) -> dict[str, list[list[Any]]]:
    """Return what tells one version of an input file from another without reading it.

    Fine-tunes of one model have equal headers: only this keeps a resumed run from mixing two of them.
    """
    return {
        key: [[h.stamp.size, h.stamp.mtime_ns, h.stamp.inode, h.stamp.device] for h in checkpoint.headers]
        for key, checkpoint in plan.inputs.items()
    }


def same_inputs(plan: Plan, recorded: Any) -> bool:
    """Compare the inputs' content with the digests a finished result recorded; hashes what is not known."""
    for key, checkpoint in plan.inputs.items():
        for header in checkpoint.headers:
            try:
                wanted = recorded[key]["files"][header.file.name]["sha256"]
            except (KeyError, TypeError):
                return False
            found = known_digest(header)
            if found is None:
                found = _digest_of(header.file)
                remember([(header, found)])
            if found != wanted:
                return False
    return True


def _finished(destination: Path, plan_id: str, is_file: bool, plan: Plan) -> dict[str, dict[str, Any]] | None:
    """Return the manifests when the destination already holds this plan's verified result."""
    from surgeon.errors import SurgeonError
    from surgeon.verify.static import verify_path

    manifests = {}
    for key, path in _paths(plan, destination, is_file).items():
        file = path.with_name(f"{path.name}.{MANIFEST}") if is_file else path / MANIFEST
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("plan") != plan_id:
            return None
        if content.get("program", {}).get("version") != __version__:
            return None
        manifests[key] = content
        try:
            if verify_path(path, hashes=True).errors:
                return None
        except SurgeonError:
            return None
    if not all(same_inputs(plan, content.get("inputs")) for content in manifests.values()):
        return None
    return manifests


def _build(plan, staging: stage.Staging, threads, progress, stop, is_file):
    """Compute into staging and verify there; or find that an earlier run had got that far."""
    disk = staging.disk
    layouts = {
        key: lay_out(tensors, plan.max_shard_bytes, staging.destination.name if is_file else None)
        for key, tensors in plan.outputs().items()
    }
    verified = next((r["verified"] for r in reversed(staging.records) if "verified" in r), None)
    if verified is not None and _still_staged(staging, verified):
        return None, {key: json.loads(text) for key, text in verified["manifests"].items()}
    folders = {key: staging.model / key if key else staging.model for key in plan.models}
    for leftover in (staging.filling, staging.moving):
        if not is_file and leftover.exists():  # a publication that was damaged half-way begins anew
            disk.remove_tree(leftover)
    for folder in (staging.model, *folders.values()):
        if not folder.exists():
            disk.make_folder(folder)
    shards = {folders[key] / shard.name for key, layout in layouts.items() for shard in layout.shards}
    for path in sorted(staging.model.rglob("*")):
        if path not in shards and not path.is_dir():
            disk.remove(path)  # companions are written anew; an exchange may have left an older model here
    writers: dict[str, ModelWriter] = {}
    try:
        for key, layout in layouts.items():
            writers[key] = ModelWriter(folders[key], layout, disk, adopt=bool(staging.records))
        with _heartbeat(staging.lock):
            result = engine.run(
                plan, writers, staging.journal, staging.records, threads=threads, progress=progress, stop=stop
            )
    finally:
        for writer in writers.values():
            writer.close()
    manifests: dict[str, dict[str, Any]] = {}
    digests_by_model: dict[str, dict[str, str]] = {}
    for key, model in plan.models.items():
        digests, body = write_companions(
            plan, model, layouts[key], folders[key], result, disk, is_file, staging.destination.name
        )
        digests_by_model[key] = digests
        manifests[key] = body
        verify_model(folders[key], layouts[key], model, digests, is_file=is_file)
    for folder in sorted(
        {p for f in folders.values() for p in [f, *(d for d in f.rglob("*") if d.is_dir())]}
    ):
        disk.sync_folder(folder)
    staging.journal.append(
        {
            "verified": {
                "files": digests_by_model,
                "manifests": {k: json.dumps(m) for k, m in manifests.items()},
            }
        },
        sync=True,
    )
    return result, manifests


def _still_staged(staging: stage.Staging, verified: dict[str, Any]) -> bool:
    """Say whether every file of the verified result is still there, byte for byte."""
    for key, files in verified["files"].items():
        for name, digest in files.items():
            places = staging.places(f"{key}/{name}" if key else name)
            if not any(path.is_file() and _digest_of(path) == digest for path in places):
                return False
    return True


def _digest_of(path: Path) -> str:
    import hashlib

    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_companions(
    plan, model, layout: Layout, folder: Path, result, disk: Disk, is_file: bool, file_name: str
):
    """Write index, companions, manifest, checksums and, last, config.json; return digests and manifest."""
    digests = dict(result.file_digests[model.key])
    summaries = result.summaries.get(model.key, {})
    files: dict[str, bytes] = {}
    if layout.index is not None:
        files["model.safetensors.index.json"] = layout.index
    for companion in model.companions:
        files[companion.name] = companion.content
    config = None
    if model.config is not None:
        config = (json.dumps(model.config, indent=2, ensure_ascii=False) + "\n").encode()
        digests["config.json"] = sha256(config)
    digests.update({name: sha256(content) for name, content in files.items()})
    body = manifest(plan, model, layout, digests, result.input_digests, summaries)
    name = f"{file_name}.{MANIFEST}" if is_file else MANIFEST
    if is_file:
        body = seal(body)
    files[name] = body
    digests[name] = sha256(body)
    if not is_file:
        files[CHECKSUMS] = checksums(digests)
        digests[CHECKSUMS] = sha256(files[CHECKSUMS])
    for path_name in sorted(files):
        _write(folder, path_name, files[path_name], disk)
    if config is not None:
        _write(folder, "config.json", config, disk)
    return digests, json.loads(body)


def _write(folder: Path, name: str, content: bytes, disk: Disk) -> None:
    path = folder / name
    missing = [p for p in reversed(path.parents) if folder in p.parents and not p.exists()]
    for parent in missing:
        disk.make_folder(parent)
    if path.exists():
        disk.remove(path)
    disk.write_file(path, content)


@contextlib.contextmanager
def _heartbeat(lock: stage.DestinationLock) -> Iterator[None]:
    """Touch the lock once a minute, so that another host can tell a long run from a dead one."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(60):
            with contextlib.suppress(OSError):
                lock.heartbeat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def disk_fault(error: OSError, destination: Path, kept: Path | None = None) -> Exception:
    """Return the error to raise for what the file system answered while a result was written."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file grew over the allowed size",
        errno.EIO: "the disk reported an I/O error",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.ENOENT: "the folder vanished",
        errno.ENAMETOOLONG: "the name is too long",
    }
    reason = reasons.get(error.errno or 0) or (error.strerror or str(error)).lower()
    code = "E502" if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT} else "E505"
    help_text = "choose another -o"
    if kept is not None and kept.exists():
        help_text = (
            f"finished work is kept in {kept}; the same command continues there once the cause is gone"
        )
    return EnvironmentFault(code, f"writing {printable(str(destination))} failed: {reason}", help=help_text)
