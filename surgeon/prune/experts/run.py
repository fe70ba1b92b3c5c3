"""``surgeon prune`` on a mixture of experts, from a request to a published model or family, and the document about it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgeon.architectures.layered_config import num_layers
from surgeon.calibrate.activation_gradients import spilled_bytes
from surgeon.calibrate.head import Head
from surgeon.calibrate.quality import last_states
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.deploy.build import load
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import InputError, SurgeonError, UsageError, Where
from surgeon.execute import Outcome, execute
from surgeon.experts import masked
from surgeon.experts.analysis import risk
from surgeon.formats.dequantized import runnable
from surgeon.output.manifest import MANIFEST
from surgeon.output.places import check_places, enough_disk, inputs_of, locked, same_result
from surgeon.plan import Plan
from surgeon.prune import candidate
from surgeon.prune.experts import decide, possible, quality
from surgeon.prune.experts.decide import REPORT_FILE, Choice
from surgeon.prune.experts.request import ExpertRequest
from surgeon.prune.experts.session import ExpertSession, Say, Tell
from surgeon.prune.experts.widths import channel_parameters
from surgeon.prune.request import Target
from surgeon.structure.experts.cut import ExpertCut
from surgeon.structure.experts.view import ExpertView
from surgeon.system import memory_budget, peak_memory, physical_cores
from surgeon.traits import quantized
from surgeon.unwritten.leaving import Leaving
from surgeon.verify.static import verify_path

NOT_RUNNABLE = ("E375", "E380", "E381", "E382", "E445", "E446")
"""Codes of models that cannot be run here: no tokenizer, no class, a quantized form that is not read."""

ROUNDED = 0.05
"""Share of the largest logit by which rounding all weights to another type may move one."""


@dataclass
class Member:
    """One model of a family, ready to be published."""

    target: Target | None
    choice: Choice
    derived: Derived
    shape: str
    parameters: int
    bytes: int
    quality: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def document(self, path: Path | None) -> dict[str, Any]:
        """Return the member as plain data."""
        return {
            "name": self.target.name if self.target else "from-report", "path": None if path is None else str(path),
            "parameters": self.parameters, "bytes": self.bytes, "shape": self.shape, "speedup": None,
            "experts_per_layer": self.choice.keep, "quality": self.quality, "remarks": self.remarks, "readers": [],
        }  # fmt: skip


def prune(
    request: ExpertRequest,
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
    """Prune the experts of a model and publish the result; arguments and result as `surgeon.prune.run.prune`.

    Raises:
        UsageError: E239, E258 targets and options; InputError: E399, E407-E409, those of `surgeon.structure.experts`.
    """
    started = time.perf_counter()
    destination = destination.absolute()
    session = ExpertSession(
        source, request, request.work_folder(destination), progress or (lambda *_: None), say or (lambda _: None), stop,
        leaving=leaving,
    )  # fmt: skip
    targets = request.targets or (None,)
    for target in targets:
        possible.check(session, target)
    document = _document(session, destination)
    same = _finished(session, destination) if resume else None
    if same is not None:
        return {
            **document,
            **_published(session, destination, same, None, unchanged=True),
            "seconds": _since(started),
        }
    if request.dtype and quantized(session.checkpoint):
        raise UsageError("E258", f"{source.path} is quantized: --dtype would round its scales, which changes the weights", help="leave --dtype out")  # fmt: skip
    inputs = inputs_of(source)
    check_places(session.work, destination, inputs, overwrite=overwrite)
    needs = enough_disk(_disk_bytes(session, len(targets)), destination, session.work)
    if dry_run:
        return {**document, **_rehearsed(session, needs, targets), "seconds": _since(started)}
    outcome, plan_id = None, None
    with locked(session):
        if not resume:
            shutil.rmtree(session.work, ignore_errors=True)
        found = {
            target.name if target and len(targets) > 1 else "": _build(session, target, destination.name)
            for target in targets
        }
        only = next(iter(found.values()))
        if only.choice.deployable:
            outcome, plan_id = _write(session, found, destination, inputs, overwrite=overwrite, resume=resume)
        if not request.work and leaving is None:
            shutil.rmtree(session.work, ignore_errors=True)
    if not request.work and leaving is None:
        with suppress(OSError):  # other things may lie there: steps of a recipe
            session.work.parent.rmdir()
    made = [
        member.document(None if outcome is None else outcome.models[key]) for key, member in found.items()
    ]
    return {
        **document, **_published(session, None if outcome is None else destination, made, outcome), "plan": {"id": plan_id},
        "calibration": session.texts.record if "texts" in vars(session) else None,
        "super_experts": _supers(session), "seconds": _since(started), "peak_memory_bytes": peak_memory(),
    }  # fmt: skip


def _write(
    session: ExpertSession, members: Mapping[str, Member], destination: Path, inputs: list[Path], *, overwrite: bool, resume: bool
) -> tuple[Outcome, str]:  # fmt: skip
    """Write and publish all members; return what was done and the plan's id."""
    plan = _publication(session, members)
    shutil.rmtree(session.work / "candidate", ignore_errors=True)
    outcome = (session.leaving or execute)(
        plan, destination, threads=session.request.threads or physical_cores(), overwrite=overwrite,
        memory_limit=session.request.memory_limit, resume=resume, stop=session.stop, input_paths=inputs,
        progress=lambda done, total: session.tell("writing", done, total),
    )  # fmt: skip
    return outcome, plan.plan_id()


# ---- one member ----------------------------------------------------------------------------------


def _build(session: ExpertSession, target: Target | None, title: str) -> Member:
    """Return the model for a target: decided, written, read back, compared with the masked source, its quality measured."""
    experts = session.experts
    choice = decide.choose(session, target) if target else decide.choose(session, Target("report", 0.0))
    if not choice.deployable:
        return _evaluated(session, target, choice, title)
    view: Any = ExpertView(session.checkpoint, experts, choice.cut, choice.replaced)
    choice.remarks += view.notes
    derived = _derived(session, target, choice, view, title)
    outputs = _plan(session, derived).outputs()[""]
    member = Member(
        target,
        choice,
        derived,
        in_words(session, choice),
        sum(o.elements for o in outputs),
        sum(o.nbytes for o in outputs),
    )
    member.remarks += [
        *choice.remarks,
        *decide.idle_remarks(session),
        *_protection(session),
        *_risks(session, choice),
    ]
    try:
        _compare(session, member)
    except InputError as error:
        if session.needs_text or error.code not in NOT_RUNNABLE:
            raise
        # What needs no run of the model may be applied to one that cannot be run here.
        member.remarks.append(
            f"not run here ({error.message}): names, shapes and bytes were checked, its output was not"
        )
    return member


def _derived(
    session: ExpertSession, target: Target | None, choice: Choice, view: Checkpoint, title: str
) -> Derived:
    request = session.request
    return Derived(
        view=view, recipe=_recipe(session, target, choice), method=request.method, title=title,
        parameters={"target": target.name if target else "report", "experts": f"{session.experts.count} -> {choice.keep}"},
        companions={REPORT_FILE: decide.report_of(session, choice, target)}, notices=tuple(choice.remarks),
        command=command(session, target),
    )  # fmt: skip


def _evaluated(session: ExpertSession, target: Target | None, choice: Choice, title: str) -> Member:
    """Return a member that no reader loads: its quality is that of the masked source, its size what a file would hold."""
    experts, infos = session.experts, session.checkpoint.tensors.values()
    # Only channels are masked, so the routers need no mask.
    view: Any = masked.MaskedSource(session.checkpoint, experts, choice.cut)
    places = [(layer.index, expert) for layer in experts.layers for expert in range(layer.count)]
    gone = sum(experts.width - len(choice.cut.channels.get(place, range(experts.width))) for place in places)
    without = gone * channel_parameters(session.checkpoint, experts) // len(places)
    total, stored = sum(info.elements for info in infos), sum(info.nbytes for info in infos)
    member = Member(
        target, choice, _derived(session, target, choice, view, title), in_words(session, choice), total - without,
        round(stored * (total - without) / total),
    )  # fmt: skip
    member.remarks += [*choice.remarks, *decide.idle_remarks(session), *_protection(session)]
    session.tell("measuring quality", 0, 1)
    member.quality = quality.by_domain(
        session.checkpoint, view, session.texts.held_out, session.plain_settings, stop=session.stop
    )
    return member


def _compare(session: ExpertSession, member: Member) -> None:
    """Write a candidate, read it back, compare it with the masked source, measure quality."""
    choice, held_out = member.choice, session.texts.held_out
    session.tell("checking the result", 0, 1)
    probes = candidate.probes([ids for one in held_out.values() for ids in one])
    with _candidate(session, member) as checkpoint:
        pruned = runnable(checkpoint)
        member.remarks.append(_equal(session, choice, pruned, probes))
        if session.leaving is None:
            member.remarks += _loaded(session, session.work / "candidate", pruned, probes)
        session.tell("measuring quality", 0, 1)
        member.quality = quality.by_domain(
            session.runnable, pruned, held_out, session.plain_settings, stop=session.stop
        )


@contextmanager
def _candidate(session: ExpertSession, member: Member) -> Iterator[Checkpoint]:
    """Give a member as it will be: written and read back, or, where it is left unwritten, computed as it is read."""
    request, folder, plan = session.request, session.work / "candidate", _plan(session, member.derived)
    if session.leaving is not None:
        with session.leaving.looked_at(
            plan, folder, request.threads or physical_cores(), session.stop
        ) as view:
            yield view
        return
    candidate.write(
        plan, folder, threads=request.threads, memory_limit=request.memory_limit, stop=session.stop
    )
    yield open_path(folder, str(folder))


def _equal(session: ExpertSession, choice: Choice, pruned: Checkpoint, probes: Any) -> str:
    """Say how far the written model is from the source with the dropped experts masked; refuse a real difference.

    Raises:
        InputError: E409.
    """
    settings = replace(session.plain_settings, dtype="float32")
    try:
        found = masked.compare(
            session.runnable, session.runnable_experts, choice.cut, pruned, probes, settings, replaced=choice.replaced, stop=session.stop
        )  # fmt: skip
    except InputError as error:
        if error.code != "E428":
            raise
        return f"its output was not compared with the masked source: {error.message}"
    limit = ROUNDED * found.peak if session.request.dtype else found.tolerance
    if not found.max_difference <= limit:
        raise InputError("E409", f"the model that was written differs from the source with its dropped experts masked: logits by up to "
                         f"{found.max_difference:.2g} on {found.tokens} tokens", help="this is a bug, or the disk changed the files; nothing was published")  # fmt: skip
    how = (
        "logits are equal to the last bit"
        if found.exact
        else f"logits differ by {found.max_difference:.1e} at most"
    )
    return (f"compared with the source whose dropped parts are masked: {how} ({found.tokens} tokens; the whole source differs "
            f"by {found.differs_from_unmasked:.2g})")  # fmt: skip


def _loaded(session: ExpertSession, folder: Path, pruned: Checkpoint, probes: Any) -> list[str]:
    """Load a candidate as a whole by its stock class, strictly, where memory allows, and compare it with what was streamed.

    Raises:
        InputError: E316 it computes something else; E324, E325 it does not load.
    """
    config = pruned.config or {}
    elements = sum(info.elements for info in pruned.tensors.values())
    if (
        quantized(open_path(folder, str(folder)))
        or config.get("auto_map")
        or config.get("model_type") not in CONFIG_MAPPING
    ):
        return []
    if len(session.experts.running) < len(session.experts.layers):
        return []  # what predicts further tokens has no place in a stock class, whose loader calls it unexpected
    if 5 * elements >= (session.request.memory_limit or memory_budget()):
        return ["too large to be loaded as a whole here: it was streamed layer by layer"]
    settings = replace(session.plain_settings, dtype="float32")
    model: Any = load(folder, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(
            "eager"
        )  # the fast one has demands on widths, which are said elsewhere
    with torch.inference_mode():
        found = [model(torch.from_numpy(ids)[None]).logits[0] for ids in probes]
    head = Head(pruned, settings).logits
    expected = [head(states) for states in last_states(pruned, probes, settings, stop=session.stop)]
    difference = max(
        float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(expected, found, strict=True)
    )
    if not difference <= candidate.EXACT:
        raise InputError("E316", f"the model that was written computes something else in its stock class: logits differ by {difference:.2g}",
                         where=Where(str(folder)), help="this is a bug, or the disk changed the files; nothing was published")  # fmt: skip
    return [f"loaded strictly by {type(model).__name__}: logits as streamed, to {difference:.1e}"]


def _risks(session: ExpertSession, choice: Choice) -> list[str]:
    """Say what is known of how dropping experts goes wrong."""
    experts = session.experts
    found = []
    if choice.keep < 0.75 * experts.count:
        found.append(
            f"risk: {risk(experts, sum(info.elements for info in session.checkpoint.tensors.values()))}"
        )
    if session.request.method == "easy-ep" and session.needs_text and len(session.texts.held_out) == 1:
        found.append(
            "chosen for one domain: others suffer (published: DeepSeek-R1 halved for mathematics fell from 63 to 46 on LiveCodeBench, arXiv 2504.06792)"
        )
    return found


def _protection(session: ExpertSession) -> list[str]:
    if not session.needs_text:
        return []
    certain = [one for one in session.supers if one.certain]
    doubtful = [one for one in session.supers if not one.certain]
    found = []
    if certain:
        names = ", ".join(f"{one.layer}:{one.expert}" for one in certain[:6]) + (
            ", ..." if len(certain) > 6 else ""
        )
        found.append(
            f"{len(certain)} super experts ({names}) "
            + ("NOT protected (--no-protect)" if session.request.no_protect else "are protected")
        )
    if doubtful:
        names = ", ".join(f"{one.layer}:{one.expert}" for one in doubtful[:6])
        found.append(
            f"candidates for super experts, too few experts to be sure: {names}; --protect keeps them"
        )
    return found


def _plan(session: ExpertSession, derived: Derived) -> Plan:
    return plan_of(session.source, {"": derived}, verb="prune", dtype=session.request.dtype)


def _publication(session: ExpertSession, members: Mapping[str, Member]) -> Plan:
    request = session.request
    return plan_of(
        session.source, {key: member.derived for key, member in members.items()}, verb="prune", dtype=request.dtype,
        seed=request.seed, warnings=session.warnings, max_shard_bytes=request.max_shard_size,
    )  # fmt: skip


def _recipe(session: ExpertSession, target: Target | None, choice: Choice) -> dict[str, Any]:
    """Return the resolved request and what was decided, without paths, times or places."""
    return {
        "verb": "prune", **session.asked, "target": target.name if target else "report", "kept": choice.cut.identity(),
        "experts": {"before": session.experts.count, "after": choice.keep}, "record": choice.record,
    }  # fmt: skip


# ---- words ---------------------------------------------------------------------------------------


def in_words(session: ExpertSession, choice: Choice) -> str:
    """Return a model's experts in one line."""
    experts = session.experts
    widths = sorted({len(ids) for ids in choice.cut.channels.values()})
    width = experts.width if not widths else choice.cut.width or (widths[0] if len(widths) == 1 else None)
    wide = f"of width {width}" if width is not None else f"of widths {widths[0]} to {widths[-1]}"
    layers = len(experts.running)
    return f"{choice.keep} experts {wide} in {layers} layers, {experts.top_k} a token"


SILENT = frozenset(
    {
        "model",
        "method",
        "work",
        "threads",
        "memory_limit",
        "device",
        "offline",
        "max_shard_size",
        "calibration",
    }
)
FILES = {"scores": "FILE", "expert_record": "RECORD.yaml", "from_report": "REPORT"}


def command(session: ExpertSession, target: Target | None) -> str:
    """Return the command that repeats a member, without paths."""
    request = session.request
    words = ["surgeon prune", session.source.key, f"--method {request.method}"]
    if target is not None:
        option = {
            "experts": "--keep-experts",
            "params": "--target-params",
            "size": "--target-size",
            "sparsity": "--sparsity",
        }[target.kind]
        words.append(f"{option} {target.pattern or format(target.value, '.12g')}")
    skip = SILENT | {"keep_experts", "sparsity", "target_params", "target_size"}
    for name, info in ExpertRequest.model_fields.items():
        value = getattr(request, name)
        if name in skip or value == info.default:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option)
        else:
            shown = FILES.get(name) or (",".join(map(str, value)) if isinstance(value, tuple) else str(value))
            words.append(f"{option} {shown}")
    if request.calibration:
        words.append("--calibration TEXT")
    return " ".join([*words, "-o OUT"])


def _document(session: ExpertSession, destination: Path) -> dict[str, Any]:
    checkpoint, experts = session.checkpoint, session.experts
    whole = Choice(ExpertCut(), experts.count)
    return {
        "status": "ok", "output": {"path": str(destination)}, "method": session.request.method,
        "criterion": (session.request.criterion or "heapr") if session.request.method == "heapr" else None,
        "model": {
            "name": session.source.key, "parameters": sum(i.elements for i in checkpoint.tensors.values()),
            "bytes": sum(i.nbytes for i in checkpoint.tensors.values()), "shape": in_words(session, whole),
        },
        "targets": [target.name for target in session.request.targets], "members": [], "metrics": {}, "gates": [],
        "warnings": [], "workload": None,
    }  # fmt: skip


def _supers(session: ExpertSession) -> list[dict[str, Any]]:
    if "supers" not in vars(session):
        return []
    return [
        {"layer": s.layer, "expert": s.expert, "peak": float(s.peak), "certain": bool(s.certain)}
        for s in session.supers
    ]


def _disk_bytes(session: ExpertSession, targets: int) -> dict[str, int]:
    """Return the bytes a run needs at most: results; a candidate, activations between layers."""
    stored = sum(info.nbytes for info in session.checkpoint.tensors.values())
    if session.leaving is not None:  # neither a result nor a candidate
        stored = 0
    work = stored
    if session.needs_text:
        tokens = session.texts.record["statistics"]["tokens"]
        layers = num_layers(session.checkpoint.config or {}) or len(session.experts.layers)
        keeps = layers if session.request.method == "heapr" else 2
        work += spilled_bytes(keeps, tokens, session.experts.hidden, session.settings.dtype)
    return {"results": targets * stored, "work": work}


def _rehearsed(
    session: ExpertSession, needs: dict[str, int], targets: tuple[Target | None, ...]
) -> dict[str, Any]:
    """Return what a dry run adds."""
    texts = session.texts if session.needs_text else None
    outlook = []
    for target in targets:
        if target is None or session.request.method == "heapr":
            continue
        keep = decide.keep_count(session, target)
        outlook.append({"name": target.name, "experts": keep, "bytes": decide.size_of(session, keep, "size"),
                        "parameters": decide.size_of(session, keep, "params")})  # fmt: skip
    return {
        "status": "dry-run", "needs": needs, "outlook": outlook, "structures": [], "targets_checked": True,
        "warnings": list(dict.fromkeys(session.warnings)), "calibration": texts.record if texts else None,
    }  # fmt: skip


def _published(
    session: ExpertSession, destination: Path | None, members: list[dict[str, Any]], outcome: Outcome | None, *, unchanged: bool = False
) -> dict[str, Any]:  # fmt: skip
    digests = {
        name: digest
        for body in (outcome.manifests.values() if outcome else ())
        for name, digest in body["files"].items()
        if name.endswith(".safetensors")
    }
    metrics: dict[str, Any] = {}
    if len(members) == 1:
        metrics = {
            name: members[0]["quality"][name]
            for name in ("perplexity", "kl", "top1")
            if name in members[0]["quality"]
        }
    size = {
        "parameters": sum(member["parameters"] for member in members), "bytes": sum(member["bytes"] for member in members),
        "experts_per_layer": members[0]["experts_per_layer"] if len(members) == 1 else None,
    }  # fmt: skip
    return {
        "output": {
            "path": None if destination is None else str(destination),
            "models": {member["name"]: member["path"] for member in members if member["path"]}, **size,
            "sha256": digests, "unchanged": unchanged or bool(outcome and outcome.unchanged),
        },
        "size": size,
        "members": members, "metrics": metrics, "warnings": list(dict.fromkeys(session.warnings)),
    }  # fmt: skip


def _finished(session: ExpertSession, destination: Path) -> list[dict[str, Any]] | None:
    """Return the members when the destination already holds what is asked for, verified."""
    targets = session.request.targets or (None,)
    found = []
    for target in targets:
        folder = destination / target.name if target and len(targets) > 1 else destination
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            if not same_result(session, manifest) or verify_path(folder, hashes=True).errors:
                return None
            size, kept = manifest["output"], manifest["recipe"]["experts"]["after"]
            found.append({
                "name": target.name if target else "from-report", "path": str(folder), "parameters": size["parameters"],
                "bytes": size["bytes"], "shape": f"{kept} experts a layer", "experts_per_layer": kept, "speedup": None, "quality": {},
                "remarks": [], "readers": [],
            })  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, SurgeonError):
            return None
    return found


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
