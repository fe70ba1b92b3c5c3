"""Which steps hand their model to the next one without writing it, and how such a step runs.

A step is fused when it merges or prunes, and its only reader is one prune or quantize step of the same run, which takes
it as its model. What times or trains a model needs it on disk: there both ends stay as they are, and so does everything
that eval, measure, edit, export or publication reads. The result is the same, byte for byte, fused or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import api
from surgeon.derive import Source
from surgeon.pipeline.verbs import Machine, merge_document, placed, plan_merge
from surgeon.recipe.recipe import Recipe, Step, StepOutput, leaves
from surgeon.system import physical_cores

if TYPE_CHECKING:
    from surgeon.unwritten.leaving import Leaving

MAKERS, READERS = ("merge", "prune"), ("prune", "quantize")


@dataclass(frozen=True)
class Fusion:
    """What is fused in a recipe.

    Attributes:
        readers: fused step -> the step that reads it.
        written: step between others whose model is written all the same -> why.
    """

    readers: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)


def fusion(recipe: Recipe, chosen: Iterable[str], *, keep: bool) -> Fusion:
    """Decide what is fused.

    Args:
        chosen: the steps that may run.
        keep: models of steps are to stay (``--keep-intermediate``).
    """
    readers: dict[str, str] = {}
    written: dict[str, str] = {}
    running = frozenset(chosen)
    for step in recipe.steps:
        found = [other for other in recipe.steps if step.id in other.uses]
        if not step.writes or step.id == recipe.publish or not found:
            continue
        reason = "--keep-intermediate asks for it" if keep else _why_written(step, found, running)
        if reason is None:
            readers[step.id] = found[0].id
        else:
            written[step.id] = reason
    return Fusion(readers, written)


def _why_written(step: Step, found: list[Step], running: frozenset[str]) -> str | None:
    """Return why a step's model has to be written, None where it need not be."""
    if step.verb not in MAKERS:
        return f"{step.verb} writes its model"
    if len(found) > 1:
        return f"{' and '.join(other.id for other in found)} read it"
    reader = found[0]
    if reader.verb not in READERS:
        return f"{reader.id} ({reader.verb}) reads it from disk"
    others = [name for name, value in reader.options.items() if name != "model" and _names(value, step.id)]
    if others:
        return f"{reader.id} reads it as {others[0]}"
    if step.id not in running or reader.id not in running:
        return f"{reader.id} does not run with it now"
    for one, whole in ((step, True), (reader, False)):
        reason = _needs_disk(one, whole) if one.verb == "prune" else None
        if reason is not None:
            return f"{one.id} {reason}"
    return None


def _needs_disk(step: Step, makes: bool) -> str | None:
    """Return what of a prune step needs written models; ``makes``: of the model it makes, not of the one it reads."""
    options = step.options
    if options.get("method") == "lapp" or options.get("distill"):
        return "trains"
    if options.get("target_speedup"):
        return "times models"
    if makes and options.get("layout", "uniform") != "uniform":
        return "makes layers that differ, which are only read as a whole"
    targets = ("target_params", "target_size", "sparsity", "keep_layers", "keep_experts")
    if makes and any(isinstance(v := options.get(name), (list, tuple)) and len(v) > 1 for name in targets):
        return "makes several models"
    return None


def _names(value: Any, step: str) -> bool:
    return any(isinstance(one, StepOutput) and one.step == step for one in leaves(value))


# ---- running one -----------------------------------------------------------------------------------


def leave(
    verb: str, options: dict[str, Any], output: Path, machine: Machine, *, dry_run: bool = False, anew: bool = False
) -> tuple[dict[str, Any], Source | None]:  # fmt: skip
    """Run a merge or prune step without writing its weights.

    Args:
        options: of the verb's request model; a model may be an open `Source`.
        output: where the companions are put; what an earlier call left there is taken up.
        dry_run: only check and say.
        anew: make again what is there.

    Returns:
        The command's document, and the model; None of a dry run.
    """
    from surgeon.unwritten.leaving import Leaving

    leaving = Leaving()
    run = _merge if verb == "merge" else _prune
    return run(dict(options), output, machine, leaving, dry_run, not anew), leaving.source


def _merge(
    options: dict[str, Any], output: Path, machine: Machine, leaving: Leaving, dry: bool, resume: bool
) -> dict[str, Any]:
    from surgeon.execute import fit_memory

    planned = plan_merge(options, output, machine)
    needs, _, _ = fit_memory(planned.plan, machine.threads or physical_cores(), machine.memory_limit)
    if dry:
        return merge_document(planned, needs, output)
    planned = planned.measure(
        output, threads=machine.threads, memory_limit=machine.memory_limit, progress=machine.progress, stop=machine.stop,
    )  # fmt: skip
    tell = machine.progress
    outcome = leaving(
        planned.plan, output, threads=machine.threads or physical_cores(), memory_limit=machine.memory_limit, overwrite=True,
        resume=resume, stop=machine.stop, progress=None if tell is None else lambda done, total: tell("merging", done, total),
    )  # fmt: skip
    return merge_document(planned, needs, output, outcome)


def _prune(
    options: dict[str, Any], output: Path, machine: Machine, leaving: Leaving, dry: bool, resume: bool
) -> dict[str, Any]:
    from surgeon.prune import request as requests
    from surgeon.prune import run
    from surgeon.prune.experts import request as expert_requests
    from surgeon.prune.experts import run as expert_run
    from surgeon.structure.experts.sizes import holds_routed

    given = placed(options, machine, ("threads", "memory_limit", "device", "offline"))
    model = given.pop("model")
    method = str(given.get("method") or "").replace("_", "-").lower()
    how: dict[str, Any] = {
        "overwrite": True, "resume": resume, "dry_run": dry, "progress": machine.progress, "say": machine.say,
        "stop": machine.stop, "leaving": leaving,
    }  # fmt: skip
    opening = {"offline": bool(given.get("offline")), "dequantize": bool(given.get("dequantize"))}
    with api.open_source(model, **opening) as source:
        experts = method in expert_requests.METHODS if method else holds_routed(source.checkpoint)
        if experts:
            return expert_run.prune(expert_requests.build(model=source.path, **given), source, output, **how)
        return run.prune(requests.build(model=source.path, **given), source, output, **how)
