"""One step: a call of the function behind its command, and the document that command would print."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import api
from surgeon.api import MergePlan
from surgeon.errors import OutputConflict
from surgeon.execute import Outcome
from surgeon.plan import Estimate

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
    planned = plan_merge(options, output, machine)
    check = planned.check(output, threads=machine.threads, memory_limit=machine.memory_limit, overwrite=True)
    if dry:
        return merge_document(planned, check.estimate, output)
    planned = planned.measure(
        output,
        threads=machine.threads,
        memory_limit=machine.memory_limit,
        progress=machine.progress,
        stop=machine.stop,
    )
    outcome = planned.run(
        output, threads=machine.threads, memory_limit=machine.memory_limit, overwrite=True, resume=resume, stop=machine.stop,
        progress=machine.progress,
    )  # fmt: skip
    return merge_document(planned, check.estimate, output, outcome)


def plan_merge(options: dict[str, Any], output: Path, machine: Machine) -> MergePlan:
    """Return the plan of a merge step."""
    request = api.build_request(**placed(options, machine, ("device", "offline")), **{})
    return api.plan_merge(request, title=output.name)


def merge_document(
    planned: MergePlan, needs: Estimate, output: Path, outcome: Outcome | None = None
) -> dict[str, Any]:
    """Return the document of a merge step; without an outcome that of a dry run."""
    plan = planned.plan
    tensors = [tensor for group in plan.outputs().values() for tensor in group]
    size = {
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "parameters": sum(tensor.elements for tensor in tensors),
    }
    document = {
        "status": "dry-run" if outcome is None else "ok", "output": {"path": str(output), **size},
        "plan": {"id": plan.plan_id(), "method": plan.recipe["method"], "parameters_of_method": plan.recipe["parameters"],
                 "inputs": list(plan.inputs), "tensors": len(plan.items), "disk_bytes": needs.disk_bytes,
                 "memory_estimate_bytes": needs.memory_bytes},
        "metrics": {}, "gates": [], "warnings": list(plan.warnings), "notes": [*planned.notes, *plan.notes],
    }  # fmt: skip
    if outcome is None:
        return document
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
                     stop=machine.stop, **placed(options, machine, ("threads", "memory_limit", "device", "offline")))  # fmt: skip


def _quantize(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    return api.quantize(output=output, overwrite=True, resume=resume, dry_run=dry, progress=machine.progress, say=machine.say,
                        stop=machine.stop, **placed(options, machine, ("threads", "memory_limit", "device", "offline")))  # fmt: skip


def _edit(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    return api.edit(output=output, overwrite=True, resume=resume, dry_run=dry, threads=machine.threads, memory_limit=machine.memory_limit,
                    progress=machine.progress, stop=machine.stop, **placed(options, machine, ("device", "offline")))  # fmt: skip


def _export(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    return api.export(output=output, overwrite=True, resume=resume, dry_run=dry, threads=machine.threads, memory_limit=machine.memory_limit,
                      progress=machine.progress, stop=machine.stop, **placed(options, machine, ("offline",)))  # fmt: skip


def _measure(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    if dry:
        return {"status": "dry-run", "warnings": []}
    return {"status": "ok", **api.measure(progress=machine.progress, stop=machine.stop,
                                          **placed(options, machine, ("threads", "memory_limit", "device", "offline")))}  # fmt: skip


def _eval(
    options: dict[str, Any], output: Path | None, machine: Machine, dry: bool, resume: bool
) -> dict[str, Any]:
    if dry:
        return {"status": "dry-run", "warnings": []}
    return api.evaluate(output=str(output), overwrite=True, resume=resume, progress=machine.progress, stop=machine.stop,
                        **placed(options, machine, ("threads", "memory_limit", "device", "offline")))  # fmt: skip


def placed(options: dict[str, Any], machine: Machine, names: tuple[str, ...]) -> dict[str, Any]:
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
