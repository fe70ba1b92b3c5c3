"""``surgeon prune`` from a request to a published model or family, and the document about it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgeon.derive import Source
from surgeon.errors import SurgeonError
from surgeon.execute import Outcome, execute
from surgeon.output.manifest import MANIFEST
from surgeon.output.places import check_places, inputs_of, locked, same_result
from surgeon.prune import preflight
from surgeon.prune.decide import in_words
from surgeon.prune.members import Member, build, forget_candidates, publication
from surgeon.prune.request import SPARSE, PruneRequest
from surgeon.prune.session import Say, Session, Tell
from surgeon.prune.written import kept_in
from surgeon.structure.cut import Cut
from surgeon.system import peak_memory, physical_cores
from surgeon.unwritten.leaving import Leaving
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
    leaving: Leaving | None = None,
) -> dict[str, Any]:
    """Prune a model and publish the result; nothing is published unless every member was written and read back.

    Args:
        request: a checked request.
        source: the model.
        destination: folder of the result; of a family the folder of its members.
        overwrite: replace an earlier result.
        resume: take up rankings, tables and finished members of an interrupted run.
        dry_run: only say what would be done, or refuse as the run would; nothing is written.
        progress: (what, done, total).
        say: one sentence for the user.
        stop: set it to end early; nothing is published, and the same call goes on later.
        leaving: leave the one member unwritten, for the next step alone; its work folder then stays.

    Returns:
        The document ``surgeon prune --json`` prints.
    """
    started = time.perf_counter()
    destination = destination.absolute()
    session = Session(
        source, request, request.work_folder(destination), progress or (lambda *_: None), say or (lambda _: None), stop,
        leaving=leaving,
    )  # fmt: skip
    preflight.check_model(session)
    document = _document(session, destination)
    same = _finished(session, destination) if resume else None
    if same is not None:
        return {
            **document,
            **_published(session, destination, same, unchanged=True),
            "seconds": _since(started),
        }
    inputs = inputs_of(source)
    check_places(session.work, destination, inputs, overwrite=overwrite)
    needs = preflight.check_disk(session, destination, len(request.targets))
    if dry_run:
        return {**document, **_rehearsed(session, needs), "seconds": _since(started)}
    with locked(session):
        if not resume:
            shutil.rmtree(session.work, ignore_errors=True)
        found = _members(session, destination.name)
        plan = publication(session, found, [], session.warnings)
        forget_candidates(session.work)
        session.release()
        outcome = (leaving or execute)(
            plan, destination, threads=request.threads or physical_cores(), overwrite=overwrite,
            memory_limit=request.memory_limit, resume=resume, stop=stop, input_paths=inputs,
            progress=lambda done, total: session.tell("writing", done, total),
        )  # fmt: skip
        if not request.work and leaving is None:
            shutil.rmtree(session.work, ignore_errors=True)
    if not request.work and leaving is None:
        with suppress(OSError):  # other things may lie there: steps of a recipe
            session.work.parent.rmdir()
    made = [member.document(outcome.models[key]) for key, member in found.items()]
    return {
        **document, **_published(session, destination, made, outcome=outcome), "plan": {"id": plan.plan_id()},
        "calibration": session.texts.record if session.used_text else None,
        "workload": session.workload.sentence() if request.target_speedup else None,
        "table": session.table.document() if request.target_speedup else None,
        "seconds": _since(started), "peak_memory_bytes": peak_memory(),
    }  # fmt: skip


def _members(session: Session, title: str) -> dict[str, Member]:
    """Build every member of a family from one calibration run; "" is the key of a single one."""
    request, targets = session.request, session.request.targets
    if request.method in SPARSE:
        from surgeon.prune import sparse_run

        return sparse_run.build(session, targets[0], title)
    preflight.check(session, targets)
    if request.method == "lapp":
        from surgeon.prune import lapp

        return lapp.build(session, targets, title)
    if request.distill:
        from surgeon.prune import gradual

        return gradual.build_family(session, targets, title)
    if request.nested:
        from surgeon.prune import nested

        return nested.build(session, targets, title)
    found = {}
    for target in targets:
        key = target.name if len(targets) > 1 else ""
        found[key] = build(session, target, title)
    return found


def _rehearsed(session: Session, needs: dict[str, int]) -> dict[str, Any]:
    """Return what a dry run adds; targets are checked as far as that needs no measurement."""
    targets = session.request.targets
    checked = session.request.method not in SPARSE and (
        not session.request.target_speedup or session.knows_table
    )
    if checked:
        preflight.check(session, targets)
    elif session.request.method in SPARSE:
        from surgeon.prune import sparse_run

        sparse_run.build(session, targets[0], "dry run", dry_run=True)
    else:
        session.say(
            "whether the speedup can be reached shows when the latency table is measured, before anything else"
        )
    return {
        "status": "dry-run", "needs": needs, "outlook": preflight.outlook(session, targets),
        "structures": list(session.structures) if session.request.method not in (*SPARSE, "depth") else [],
        "targets_checked": checked, "warnings": list(dict.fromkeys(session.warnings)),
        "workload": session.workload.sentence() if session.request.target_speedup else None,
    }  # fmt: skip


def _document(session: Session, destination: Path) -> dict[str, Any]:
    checkpoint = session.source.checkpoint
    return {
        "status": "ok", "output": {"path": str(destination)}, "method": session.request.method,
        "criterion": session.request.solver if session.request.method not in (*SPARSE, "lapp") else None,
        "model": {
            "name": session.source.key, "parameters": sum(i.elements for i in checkpoint.tensors.values()),
            "bytes": sum(i.nbytes for i in checkpoint.tensors.values()),
            "shape": in_words(Cut.whole(session.structure.layers), session),
        },
        "targets": [target.name for target in session.request.targets], "members": [], "metrics": {}, "gates": [],
        "warnings": [], "workload": None,
    }  # fmt: skip


def _published(
    session: Session, destination: Path, members: list[dict[str, Any]], *, outcome: Outcome | None = None,
    unchanged: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the parts of the document that say what lies at the destination."""
    digests = {
        name: digest
        for body in (outcome.manifests.values() if outcome else ())
        for name, digest in body["files"].items()
        if name.endswith(".safetensors")
    }
    metrics: dict[str, Any] = {}
    if len(members) == 1:
        speed, quality = members[0].get("speedup") or {}, members[0].get("quality") or {}
        if speed.get("predicted") is not None or speed.get("measured") is not None:
            spread = (speed["high"] - speed["low"]) / 2 if speed.get("measured") is not None else None
            metrics["speedup"] = {
                "predicted": speed["predicted"],
                "measured": speed["measured"],
                "spread": spread,
            }
        metrics |= {
            name: quality[name] for name in ("perplexity", "kl", "top1", "cosine", "nmse") if name in quality
        }
    return {
        "output": {
            "path": str(destination), "models": {member["name"]: member["path"] for member in members},
            "parameters": sum(member["parameters"] for member in members),
            "bytes": sum(member["bytes"] for member in members), "sha256": digests,
            "unchanged": unchanged or bool(outcome and outcome.unchanged),
        },
        "members": members, "metrics": metrics, "warnings": list(dict.fromkeys(session.warnings)),
    }  # fmt: skip


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


# ---- a result that is there already --------------------------------------------------------------


def _finished(session: Session, destination: Path) -> list[dict[str, Any]] | None:
    """Return the members when the destination already holds what is asked for, verified.

    Timing a model twice never gives equal figures, so equality is that of request, text and source.
    """
    targets = session.request.targets
    family = len(targets) > 1 and not session.request.nested
    found = []
    for target in targets if family else targets[:1]:
        folder = destination / target.name if family else destination
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            if not same_result(session, manifest) or verify_path(folder, hashes=True).errors:
                return None
            size = manifest["output"]
            member = {
                "name": target.name, "path": str(folder), "parameters": size["parameters"], "bytes": size["bytes"],
                "shape": _shape(session, folder), "speedup": None, "quality": {}, "remarks": [], "readers": [],
            }  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, SurgeonError):
            return None
        found.append(member)
    return found


def _shape(session: Session, folder: Path) -> str:
    try:
        return in_words(kept_in(folder), session)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return in_words(Cut.whole(session.structure.layers), session)  # sparse: every shape stays
