"""One step: a call of the function behind its command, and the document that command would print."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import api
from surgeon.errors import OutputConflict

Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]

OTHER_PLAN = "E605"


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine; nothing of it changes a result.

    Attributes:
        device: None leaves it to each verb.
    """

    threads: int | None = None
    memory_limit: int | None = None
    device: str | None = None
    offline: bool = False
    progress: Tell | None = None
    say: Say | None = None
    stop: threading.Event | None = None


def call(
    verb: str,
    options: dict[str, Any],
    output: Path | None,
    machine: Machine,
    *,
    dry_run: bool = False,
    anew: bool = False,
) -> dict[str, Any]:
    """Run a step and return its command's document.

    Args:
        options: of the verb's request model, models as paths or references.
        output: where the model goes; of eval the result file.
        dry_run: only check and say; nothing is written.
        anew: make again what is there.
    """
    resume = not anew
    try:
        return _VERBS[verb](dict(options), output, machine, dry_run, resume)
    except OutputConflict as error:
        if error.code != OTHER_PLAN or dry_run or not resume:
            raise
        # The folder belongs to this run: what an earlier version of the step left half-done is in the way of nobody.
        return _VERBS[verb](dict(options), output, machine, dry_run, False)


def gguf_asked(verb: str, options: dict[str, Any]) -> bool:
    """Say whether a step makes a GGUF file, not a folder."""
    return (verb == "export" and options.get("to") == "gguf") or (
        verb == "quantize" and options.get("format") == "gguf"
    )


def _merge(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    assert output is not None
    request = api.build_request(**_placed(options, machine, ("device", "offline")), **{})
    planned = api.plan_merge(request, title=output.name)
    check = planned.check(output, threads=machine.threads, memory_limit=machine.memory_limit, overwrite=True)
    if not dry:
        planned = planned.measure(
            output,
            threads=machine.threads,
            memory_limit=machine.memory_limit,
            progress=machine.progress,
            stop=machine.stop,
        )
    plan = planned.plan
    tensors = [tensor for group in plan.outputs().values() for tensor in group]
    size = {
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "parameters": sum(tensor.elements for tensor in tensors),
    }
    document = {
        "status": "dry-run" if dry else "ok", "output": {"path": str(output), **size},
        "plan": {"id": plan.plan_id(), "method": plan.recipe["method"], "parameters_of_method": plan.recipe["parameters"],
                 "inputs": list(plan.inputs), "tensors": len(plan.items), "disk_bytes": check.estimate.disk_bytes,
                 "memory_estimate_bytes": check.estimate.memory_bytes},
        "metrics": {}, "gates": [], "warnings": list(plan.warnings), "notes": [*planned.notes, *plan.notes],
    }  # fmt: skip
    if dry:
        return document
    outcome = planned.run(
        output, threads=machine.threads, memory_limit=machine.memory_limit, overwrite=True, resume=resume, stop=machine.stop,
        progress=None if machine.progress is None else lambda done, total: machine.progress("merging", done, total),  # type: ignore[misc]
    )  # fmt: skip
    digests = {
        name: d
        for body in outcome.manifests.values()
        for name, d in body["files"].items()
        if name.endswith(".safetensors")
    }
    document["output"] |= {"shards": len(digests), "sha256": digests, "unchanged": outcome.unchanged}
    return document | {"seconds": round(outcome.seconds, 3)}


def _prune(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    return api.prune(output=output, overwrite=True, resume=resume, dry_run=dry, progress=machine.progress, say=machine.say,
                     stop=machine.stop, **_placed(options, machine, ("threads", "memory_limit", "device", "offline")))  # fmt: skip


def _quantize(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    return api.quantize(output=output, overwrite=True, resume=resume, dry_run=dry, progress=machine.progress, say=machine.say,
                        stop=machine.stop, **_placed(options, machine, ("threads", "memory_limit", "device", "offline")))  # fmt: skip


def _edit(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    if dry:
        return _edit_rehearsed(options, output, machine)
    done = api.edit(output=output, overwrite=True, resume=resume, threads=machine.threads, memory_limit=machine.memory_limit,
                    progress=machine.progress, stop=machine.stop, **_placed(options, machine, ("device", "offline")))  # fmt: skip
    found: dict[str, Any] = {"path": str(done.path)}
    if done.outcome is not None:
        files = {
            name: digest for body in done.outcome.manifests.values() for name, digest in body["files"].items()
        }
        sizes = [body["output"] for body in done.outcome.manifests.values()]
        found |= {"unchanged": done.outcome.unchanged, "sha256": {n: d for n, d in files.items() if n.endswith(".safetensors")},
                  "parameters": sum(size["parameters"] for size in sizes), "bytes": sum(size["bytes"] for size in sizes)}  # fmt: skip
    quality = (done.report or {}).get("quality") or {}
    metrics = (
        {"kl": quality["kl"], "perplexity": [quality["perplexity_before"], quality["perplexity_after"]]}
        if quality
        else {}
    )
    return {
        "status": "ok",
        "output": found,
        "edit": done.report,
        "metrics": metrics,
        "gates": [],
        "notes": done.notes,
        "warnings": done.warnings,
    }


def _edit_rehearsed(options: dict[str, Any], output: Path | None, machine: Machine) -> dict[str, Any]:
    from surgeon.edit import request as requests
    from surgeon.edit import run

    given = _placed(options, machine, ("device", "offline"))
    model = given.pop("model")
    asked = requests.build(**given)
    with api.open_source(model, offline=asked.offline, dequantize=asked.dequantize) as source:
        assert output is not None
        prepared = run.prepare(asked, source, title=output.name, dry=True, threads=machine.threads, memory_limit=machine.memory_limit,
                               progress=machine.progress, stop=machine.stop)  # fmt: skip
    return {
        "status": "dry-run",
        "output": {"path": str(output)},
        "edit": prepared.report,
        "notes": prepared.notes,
        "warnings": prepared.warnings,
    }


def _export(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    return api.export(output=output, overwrite=True, resume=resume, dry_run=dry, threads=machine.threads, memory_limit=machine.memory_limit,
                      progress=machine.progress, stop=machine.stop, **_placed(options, machine, ("offline",)))  # fmt: skip


def _measure(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    if dry:
        return {"status": "dry-run", "warnings": []}
    return {"status": "ok", **api.measure(progress=machine.progress, stop=machine.stop,
                                          **_placed(options, machine, ("threads", "memory_limit", "device", "offline")))}  # fmt: skip


def _eval(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    if dry:
        return {"status": "dry-run", "warnings": []}
    return api.evaluate(output=str(output), overwrite=True, resume=resume, progress=machine.progress, stop=machine.stop,
                        **_placed(options, machine, ("threads", "memory_limit", "device", "offline")))  # fmt: skip


def _placed(options: dict[str, Any], machine: Machine, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options with those of the machine that the verb knows."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name in names:
        value = getattr(machine, name)
        if value is not None and value is not False:
            given[name] = value
    return given


_VERBS: dict[str, Callable[[dict[str, Any], Path | None, Machine, bool, bool], dict[str, Any]]] = {
    "merge": _merge, "prune": _prune, "quantize": _quantize, "edit": _edit, "export": _export, "measure": _measure, "eval": _eval,
}  # fmt: skip
