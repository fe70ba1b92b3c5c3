"""``surgeon prune`` from a request to a published model or family, and the document about it."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.checkpoint.digests import known_digest, remember
from surgeon.derive import Source
from surgeon.errors import SurgeonError
from surgeon.execute import execute
from surgeon.output import staging
from surgeon.output.manifest import MANIFEST
from surgeon.prune.decide import check_reachable, in_words
from surgeon.prune.members import Member, asked, build, forget_candidates, publication
from surgeon.prune.request import SPARSE, PruneRequest, Target
from surgeon.prune.session import Say, Session, Tell
from surgeon.structure.cut import Cut
from surgeon.system import peak_memory, physical_cores
from surgeon.verify.static import verify_path


def prune(
    request: PruneRequest,
    source: Source,
    destination: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: Tell | None = None,
    say: Say | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Prune a model and publish the result; nothing is published unless every member was written and read back.

    Args:
        request: a checked request.
        source: the model.
        destination: folder of the result; of a family the folder of its members.
        overwrite: replace an earlier result.
        resume: take up rankings, tables and candidates of an interrupted run.
        dry_run: only say what would be done, or refuse as the run would.
        progress: (what, done, total).
        say: one sentence for the user.

    Returns:
        The document ``surgeon prune --json`` prints.
    """
    started = time.perf_counter()
    destination = destination.absolute()
    work = request.work_folder(destination)
    session = Session(source, request, work, progress or (lambda *_: None), say or (lambda _: None), stop)
    targets = request.targets
    document = _document(session, destination)
    same = _finished(session, destination, targets)
    if same is not None:
        return {
            **document,
            "members": same,
            "unchanged": True,
            "seconds": round(time.perf_counter() - started, 3),
        }
    _check_destination(session, destination, overwrite)
    if not resume and not request.work:
        shutil.rmtree(work, ignore_errors=True)
    if request.method in SPARSE:
        from surgeon.prune import sparse_run

        found = sparse_run.build(session, targets[0], destination.name, dry_run=dry_run)
    else:
        for target in targets:
            check_reachable(session, target)
        found = {} if dry_run else _members(session, targets, destination.name)
    if dry_run:
        return {**document, "status": "dry-run", "needs": session.needs(), "warnings": session.warnings}
    plan = publication(session, found, [], session.warnings)
    forget_candidates(work)
    outcome = execute(
        plan, destination, threads=request.threads or physical_cores(), overwrite=overwrite,
        memory_limit=request.memory_limit, resume=resume, stop=stop,
        progress=lambda done, total: session.tell("writing", done, total),
        input_paths=[*_inputs(session)],
    )  # fmt: skip
    made = [member.document(outcome.models[key]) for key, member in found.items()]
    if not request.work:
        shutil.rmtree(work, ignore_errors=True)
    return {
        **document, "plan": {"id": plan.plan_id()}, "members": made, "warnings": list(dict.fromkeys(session.warnings)),
        "calibration": session.texts.record if session.used_text else None,
        "workload": session.workload.sentence() if request.target_speedup else None,
        "table": session.table.document() if request.target_speedup else None,
        "seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak_memory(),
    }  # fmt: skip


def _members(session: Session, targets: tuple[Target, ...], title: str) -> dict[str, Member]:
    """Build every member of a family from one calibration run; "" is the key of a single one."""
    if session.request.method == "lapp":
        from surgeon.prune import lapp

        return lapp.build(session, targets, title)
    if session.request.distill:
        from surgeon.prune import gradual

        return gradual.build_family(session, targets, title)
    if session.request.nested:
        from surgeon.prune import nested

        return nested.build(session, targets, title)
    found = {}
    for target in targets:
        key = target.name if len(targets) > 1 else ""
        found[key] = build(session, target, title)
    return found


def _document(session: Session, destination: Path) -> dict[str, Any]:
    checkpoint = session.source.checkpoint
    return {
        "status": "ok", "output": str(destination), "method": session.request.method, "criterion": session.request.solver,
        "model": {
            "name": session.source.key, "parameters": sum(i.elements for i in checkpoint.tensors.values()),
            "bytes": sum(i.nbytes for i in checkpoint.tensors.values()),
            "shape": in_words(Cut.whole(session.structure.layers), session),
        },
        "targets": [target.name for target in session.request.targets], "members": [], "unchanged": False,
        "warnings": [], "workload": None,
    }  # fmt: skip


def _inputs(session: Session) -> list[Path]:
    checkpoint = session.source.checkpoint
    folder = [checkpoint.folder] if checkpoint.folder is not None else []
    return [*folder, *(header.file for header in checkpoint.headers)]


def _check_destination(session: Session, destination: Path, overwrite: bool) -> None:
    """Refuse what publishing would refuse, before hours of work."""
    staging.check_destination(destination, _inputs(session), overwrite=overwrite, is_file=False)


def _finished(
    session: Session, destination: Path, targets: tuple[Target, ...]
) -> list[dict[str, Any]] | None:
    """Return the members when the destination already holds what is asked for, verified.

    Timing a model twice never gives equal figures, so equality is that of the request and the source.
    """
    family = len(targets) > 1 and not session.request.nested
    found = []
    for target in targets if family else targets[:1]:
        folder = destination / target.name if family else destination
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            recipe = manifest["recipe"]
            if recipe.get("request") != asked(session)["request"] or not _same_source(session, manifest):
                return None
            if verify_path(folder, hashes=True).errors:
                return None
        except (OSError, ValueError, KeyError, TypeError, SurgeonError):
            return None
        size = manifest["output"]
        found.append(
            {
                "name": target.name,
                "path": str(folder),
                "parameters": size["parameters"],
                "bytes": size["bytes"],
                "shape": "",
            }
        )
    return found


def _same_source(session: Session, manifest: Mapping[str, Any]) -> bool:
    recorded = {
        name: file["sha256"] for model in manifest["inputs"].values() for name, file in model["files"].items()
    }
    for header in session.source.checkpoint.headers:
        found = known_digest(header)
        if found is None:
            found = _hashed(header.file)
            remember([(header, found)])
        if recorded.get(header.file.name) != found:
            return False
    return True


def _hashed(path: Path) -> str:

    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
