"""One measurement, from a request to the result document; the entry for the command line and for recipes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgeon.checkpoint.checkpoint import CONFIG_NAME, open_path
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.source import Located, locate, looks_local
from surgeon.checkpoint.strict_json import MAX_JSON_BYTES, read_json_object
from surgeon.errors import EnvironmentFault, InputError, OutputConflict
from surgeon.measure.files import write_json
from surgeon.measure.request import MeasureRequest, build
from surgeon.measure.timing import Estimate
from surgeon.measure.workload import Workload
from surgeon.verify.readers import require

__all__ = ["MeasureRequest", "build", "measure", "save"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


def measure(
    request: MeasureRequest, progress: Progress | None = None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Measure a model and return the result document; nothing is printed, no file written.

    Raises:
        SurgeonError: see the modules.
    """
    request.checked()
    began = time.monotonic()
    check_output(request)
    model = _find(request.model, request.offline)
    other = _find(request.baseline, request.offline) if request.baseline else None
    from surgeon.measure.compare import generates

    mode = request.workload if request.mode in ("table", "memory") else request.mode
    workload = Workload.usual(
        decoder=generates(model.path), mode=mode, batch=request.batch, context=request.context, generate=request.generate
    )  # fmt: skip
    document: dict[str, Any] = {
        "mode": request.mode or workload.mode, "model": _described(model), "baseline": _described(other) if other else None,
        "workload": {**workload.document(), "sentence": workload.sentence()},
    }  # fmt: skip
    if request.mode == "table":
        document |= _table(request, model, workload, progress, stop)
    elif request.mode == "memory":
        document |= _memory(request, model, other, workload, progress, stop)
    elif other is not None:
        document |= _compared(request, model, other, workload, progress, stop)
    else:
        document |= _timed(request, model, workload, progress, stop)
    document["seconds"] = round(time.monotonic() - began, 3)
    return document


def _find(reference: str, offline: bool) -> Located:
    text, revision = reference.strip(), None
    if not looks_local(text.partition("@")[0]) and "@" in text:
        text, _, revision = text.partition("@")
    found = locate(text, revision, offline=offline)
    require(found.path)
    return found


def _described(found: Located) -> dict[str, Any]:
    checkpoint = open_path(found.path, found.label, repo=found.repo)
    try:
        tensors = list(checkpoint.tensors.values())
    finally:
        checkpoint.close()
    return {
        "name": found.repo or found.path.resolve().name, "path": str(found.path),
        "parameters": sum(t.elements for t in tensors), "bytes": sum(t.nbytes for t in tensors),
    }  # fmt: skip


def _timed(
    request: MeasureRequest,
    model: Located,
    workload: Workload,
    progress: Progress | None,
    stop: threading.Event | None,
) -> dict[str, Any]:
    from surgeon.measure.compare import speed

    found = speed(model.path, workload, request.conditions(), progress=progress, stop=stop)
    metrics = {"seconds": found.seconds.plain()}
    if found.prefill is not None:
        metrics["prefill_seconds"] = found.prefill.plain()
        metrics["prefill_tokens_per_second"] = _rate(found.prefill, workload.batch * workload.context)
    if found.decode is not None:
        metrics["decode_seconds"] = found.decode.plain()
        metrics["decode_tokens_per_second"] = _rate(found.decode, workload.batch)
    return {
        "environment": _environment(found.environment), "metrics": metrics, "notes": [],
        "warnings": [] if found.measurable else [_imprecise(found.seconds, request)],
    }  # fmt: skip


def _compared(
    request: MeasureRequest,
    model: Located,
    other: Located,
    workload: Workload,
    progress: Progress | None,
    stop: threading.Event | None,
) -> dict[str, Any]:
    from surgeon.measure.compare import speedup

    found = speedup(other.path, model.path, workload, request.conditions(), progress=progress, stop=stop)
    ratio = Estimate(found.ratio, found.low, found.high, found.pairs)
    return {
        "environment": _environment(found.environment), "metrics": {"speedup": {**ratio.plain(), "measurable": found.measurable}},
        "comparison": found.plain(), "notes": [], "warnings": [] if found.measurable else [_imprecise(ratio, request)],
    }  # fmt: skip


def _table(
    request: MeasureRequest,
    model: Located,
    workload: Workload,
    progress: Progress | None,
    stop: threading.Event | None,
) -> dict[str, Any]:
    from surgeon.measure.compare import stored_dtype
    from surgeon.measure.differencing import Levels, measure_table
    from surgeon.structure.find import structure_of

    checkpoint = open_path(model.path, model.label, repo=model.repo)
    try:
        structure = structure_of(checkpoint)
    finally:
        checkpoint.close()
    config = read_json_object(model.path / CONFIG_NAME)
    levels = Levels.of(structure, attention=request.heads, multiple=request.round_to)
    # What is stored decides, as when the model itself is loaded; config.json may say otherwise.
    config["dtype"] = stored_dtype(model.path)
    table = measure_table(
        config, structure, workload, levels, request.conditions(), progress=progress, stop=stop
    )
    return {
        "environment": _environment(table.environment), "table": table.document(), "metrics": {"shares": table.shares()},
        "notes": list(table.notes), "warnings": [],
    }  # fmt: skip


def _memory(
    request: MeasureRequest,
    model: Located,
    other: Located | None,
    workload: Workload,
    progress: Progress | None,
    stop: threading.Event | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    from surgeon.measure.memory import peak

    def one(found: Located) -> dict[str, Any]:
        if progress is not None:
            progress("loading in a process of its own", 0, 1)
        measured = peak(found.path, workload, request.conditions(), stop=stop)
        return {
            **asdict(measured),
            "environment": _environment(measured.environment),
            "total": measured.total,
        }

    metrics = one(model)
    environment = metrics.pop("environment")
    found: dict[str, Any] = {
        "environment": environment,
        "metrics": {"memory": metrics},
        "notes": [],
        "warnings": [],
    }
    if other is not None:
        before = one(other)
        del before["environment"]
        found["metrics"]["baseline_memory"] = before
    return found


def _environment(environment: Any) -> dict[str, Any]:
    return {**environment.document(), "sentence": environment.sentence()}


def _rate(estimate: Estimate, tokens: int) -> dict[str, float | int]:
    """Return tokens a second from seconds; the ends of the interval change places."""
    return Estimate(
        tokens / estimate.value, tokens / estimate.high, tokens / estimate.low, estimate.count
    ).plain()


def _imprecise(estimate: Estimate, request: MeasureRequest) -> str:
    wanted = f"; asked for was ±{request.precision:.1%}" if request.repeat is None else ""
    return (
        f"not measurable to that precision here: the 95 % interval is ±{estimate.half_width:.1%} "
        f"after {estimate.count} rounds{wanted}"
    )


# ---- the result file ---------------------------------------------------------------------------------


def check_output(request: MeasureRequest) -> None:
    """Refuse a result file that would replace something else (E601) or cannot be written (E502)."""
    path = request.result_file()
    if path is None:
        return
    if path.suffix != ".json":
        raise OutputConflict(
            "E601",
            f"the result is one JSON file; {printable(path.name)} does not end in .json",
            help="-o table.json",
        )
    if path.is_dir():
        raise OutputConflict("E601", f"{printable(str(path))} is a folder", help="give a file: -o table.json")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EnvironmentFault(
            "E502",
            f"no file can be written into {printable(str(parent))}",
            help="give a file in a folder of your own",
        )
    if path.exists() and not request.overwrite and not _ours(path):
        raise OutputConflict("E601", f"{printable(str(path))} exists and is no result of surgeon measure",
                             help="choose another -o, or --overwrite")  # fmt: skip


def _ours(path: Path) -> bool:
    from surgeon.measure.table import KIND

    try:
        content = read_json_object(path, MAX_JSON_BYTES)
    except InputError:
        return False
    return content.get("kind") == KIND or content.get("command") == "measure"


def save(document: dict[str, Any], request: MeasureRequest) -> None:
    """Write the result file: the table itself, or the result document.

    Raises:
        EnvironmentFault: E502.
    """
    path = request.result_file()
    if path is None:
        return
    if "table" in document:
        from surgeon.measure.table import LatencyTable

        LatencyTable.from_document(document["table"]).save(path)
        return
    write_json({"schema": 1, "command": "measure", **document}, path)
