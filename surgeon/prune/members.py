"""From a decision to a model that was written, read back and timed; corrected until it meets its target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.deploy import per_layer, runtimes
from surgeon.derive import Derived, plan_of
from surgeon.errors import InputError, SurgeonError
from surgeon.measure.compare import Measured, speedup, verdict
from surgeon.measure.correction import fit_correction
from surgeon.plan import Plan
from surgeon.prune import candidate, quality, resolve
from surgeon.prune.decide import Decision, decide, in_words
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.structure.check import check, is_uniform, shapes
from surgeon.structure.cut import Cut
from surgeon.structure.views import MaskedView, PrunedView

ROUNDS = 4
"""Models built, saved, reloaded and timed for one target."""

KEPT_FILE = "pruning.json"
"""Companion that says which heads, channels and layers of the source a model consists of."""


@dataclass
class Member:
    """One model of a family, ready to be published.

    Attributes:
        target, decision: what was asked for and decided.
        derived: what is written.
        parameters, bytes: of it.
        measured: against the source, None when it was not timed.
        quality: on held-out text.
        remarks: sentences for the user.
        readers: programs that load it.
    """

    target: Target
    decision: Decision
    derived: Derived
    shape: str
    parameters: int = 0
    bytes: int = 0
    measured: Measured | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)

    def document(self, path: Path) -> dict[str, Any]:
        """Return the member as plain data."""
        speed = None
        if self.target.kind == "speedup" or self.measured is not None:
            found = self.measured
            speed = {
                "target": self.target.value if self.target.kind == "speedup" else None,
                "predicted": self.decision.predicted if self.target.kind == "speedup" else None,
                "measured": found.ratio if found else None, "low": found.low if found else None,
                "high": found.high if found else None, "details": found.plain() if found else None,
            }  # fmt: skip
        return {
            "name": self.target.name, "path": str(path), "parameters": self.parameters, "bytes": self.bytes,
            "shape": self.shape, "speedup": speed, "quality": self.quality, "loss": self.decision.loss,
            "tried": [{"plan": name, "loss": loss} for name, loss in self.decision.tried],
            "remarks": self.remarks, "readers": self.readers,
        }  # fmt: skip


def build(session: Session, target: Target, title: str) -> Member:
    """Decide on a cut, write it, read it back, time it; correct the table and decide again until it meets the target."""
    request = session.request
    if target.kind != "speedup" or not request.measure:
        goal = None if target.kind == "layers" else session.goal(target)
        decision = decide(session, target, goal, 60 * request.search_budget)
        return written(session, target, decision, title)
    table = session.table
    history: list[tuple[Any, float]] = []
    made: list[Member] = []
    seen: set[Cut] = set()
    for number in range(ROUNDS):
        try:
            decision = decide(session, target, session.goal(target, table), 60 * request.search_budget)
        except SurgeonError:
            if not made:
                raise
            made[-1].remarks.append("the corrected table says that the target is out of reach")
            break
        if decision.cut in seen:
            break
        seen.add(decision.cut)
        member = written(session, target, decision, title)
        folder = session.work / "candidate"
        session.tell(f"timing candidate {number + 1} for {target.name}", number, ROUNDS)
        member.measured = speedup(
            session.folder,
            folder,
            session.workload,
            session.conditions,
            progress=session.tell,
            stop=session.stop,
        )
        made.append(member)
        found = verdict(member.measured, target.value, request.tolerance)
        session.say(
            f"{target.name}: {member.shape}: predicted {decision.predicted:.3f}x, measured "
            f"{member.measured.ratio:.3f}x ({member.measured.low:.3f} to {member.measured.high:.3f}): {found}"
        )
        if found in ("met", "not measurable"):
            break
        history.append((shapes(decision.cut, session.structure), member.measured.ratio))
        table = session.table.corrected(**fit_correction(session.table, history))
    best = min(made, key=lambda one: _miss(one, target))
    found = verdict(best.measured, target.value, request.tolerance) if best.measured else "not timed"
    if found == "not measurable":
        assert best.measured is not None
        best.remarks.append(
            f"not measurable to within {request.tolerance:.0%} here: the 95 % interval is "
            f"±{best.measured.half_width:.1%} (other work on the machine, or too short a time limit)"
        )
    elif found != "met":
        best.remarks.append(
            f"{found}: the nearest of {len(made)} models that were built and timed; sizes are too coarse to come closer"
        )
    return best


def _miss(member: Member, target: Target) -> tuple[int, float]:
    """Order members: those fast enough first, then by distance from the target."""
    assert member.measured is not None
    ratio = member.measured.ratio / target.value
    return (0 if ratio >= 0.97 else 1, abs(ratio - 1))


def written(session: Session, target: Target, decision: Decision, title: str) -> Member:
    """Write a candidate and compare what is read back with the masked model."""
    session.tell(f"solving weights for {target.name}", 0, 1)
    solved = solve(session, decision.cut, session.work / "solved" / f"{target.name}.safetensors")
    derived, readers = derive(session, target, decision.cut, solved, title)
    plan = plan_of(session.source, {"": derived}, verb="prune", dtype=session.request.dtype)
    folder = candidate.write(
        plan, session.work / "candidate", threads=session.request.threads, memory_limit=session.request.memory_limit,
        stop=session.stop,
    )  # fmt: skip
    probes = candidate.probes(session.texts.held_out)
    running = running_view(session, decision.cut, solved, derived.view)
    settings = replace(session.settings, dtype="float32")
    expected = quality.last_states(running, probes, settings)
    rounded = candidate.sixteen_bit(session.source.checkpoint, session.request.dtype)
    back = candidate.check(folder, expected, probes, settings, rounded=rounded)
    outputs = plan.outputs()[""]
    member = Member(target, decision, derived, in_words(decision.cut, session), sum(o.elements for o in outputs),
                    sum(o.nbytes for o in outputs), readers=readers)  # fmt: skip
    member.remarks += [*decision.remarks, *getattr(derived.view, "notes", ())]
    how = "loaded strictly and compared" if back.strict else "streamed back and compared"
    member.remarks.append(f"{how} with the masked model: last states differ by {back.difference:.1e}")
    first = session.origin or session
    member.quality = quality.compare(
        first.source.checkpoint, running, session.texts.held_out, session.settings, decoder=session.decoder,
        reference=first.reference,
    )  # fmt: skip
    return member


def solve(session: Session, cut: Cut, file: Path) -> Checkpoint | None:
    """Return solved weights of a cut, None where the criterion leaves weights as they are."""
    if session.request.method == "depth":
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    source = session.source.checkpoint
    if session.request.sequential:
        return resolve.sequential(
            session.database, source, session.structure, cut, file, session.texts.statistics, session.settings,
            progress=session.tell, stop=session.stop,
        )  # fmt: skip
    return resolve.resolve(
        session.database, source, session.structure, cut, file, progress=session.tell, stop=session.stop
    )


def running_view(session: Session, cut: Cut, solved: Checkpoint | None, pruned: Checkpoint) -> Checkpoint:
    """Return what the library's classes can run layer by layer: the pruned model, or its masked equal."""
    if is_uniform(cut, session.structure) and session.writable(cut):
        return pruned
    return MaskedView(session.source.checkpoint, session.structure, cut, solved)


def derive(
    session: Session, target: Target, cut: Cut, solved: Checkpoint | None, title: str
) -> tuple[Derived, list[str]]:
    """Return the pruned model as it is to be written, and the programs that load it.

    Raises:
        InputError: E367 no stock class holds it and --layout is uniform; E327 nothing reads it.
    """
    request, checkpoint = session.request, session.source.checkpoint
    uniform = is_uniform(cut, session.structure)
    check(
        cut, session.structure, checkpoint.config or {}, for_stock=request.layout == "uniform",
        allow_norm_approx=request.allow_norm_approx,
    )  # fmt: skip
    view = PrunedView(checkpoint, session.structure, cut, solved, allow_norm_approx=request.allow_norm_approx)
    files: dict[str, bytes] = {KEPT_FILE: kept_document(cut)}
    if per_layer.is_per_layer(view.config):
        if uniform and request.layout == "uniform":
            raise InputError(
                "E367",
                "no stock class holds this shape",
                help="--layout per-layer, or --structures ffn,layers",
            )
        view.config, code = per_layer.finish(view.config)
        files.update(dict(code))
    found = runtimes.readers(view.config)
    readers = [f"{one.runtime} ({one.form})" for one in found if one.loads]
    derived = Derived(
        view=view, recipe=recipe(session, target, cut), method=request.method, title=title, companions=files,
        parameters={"target": target.name, "shape": in_words(cut, session)},
        notices=tuple(f"{one.runtime}: {one.reason}" for one in found if one.reason),
        command=command(session, target),
    )  # fmt: skip
    return derived, readers


def kept_document(cut: Cut) -> bytes:
    """Return the content of `KEPT_FILE`."""
    return (json.dumps(cut.document(), separators=(",", ":")) + "\n").encode()


def recipe(session: Session, target: Target, cut: Cut) -> dict[str, Any]:
    """Return the resolved request and what was decided, without paths, times or places."""
    return {
        "verb": "prune", **asked(session), "target": target.name, "kept": cut.identity(),
        "shapes": [[s.heads, s.groups, s.head_dim, s.ffn] for s in shapes(cut, session.structure)],
        "layers": list(cut.kept_layers),
    }  # fmt: skip


PLACES = {
    "model",
    "work",
    "threads",
    "memory_limit",
    "latency_table",
    "device",
    "offline",
    "calibration",
    "max_shard_size",
}
"""Fields of the request that say where and how fast, not what."""


def asked(session: Session) -> dict[str, Any]:
    """Return what of a request decides about the result."""
    document = session.request.model_dump(mode="json")
    return {"request": {name: value for name, value in document.items() if name not in PLACES}}


def command(session: Session, target: Target) -> str:
    """Return the command that repeats a member, without paths."""
    request = session.request
    words = ["surgeon prune", session.source.key, f"--method {request.method}"]
    if request.criterion:
        words.append(f"--criterion {request.criterion}")
    option = {"speedup": "target-speedup", "params": "target-params", "size": "target-size", "sparsity": "sparsity",
              "layers": "keep-layers", "pattern": "pattern"}[target.kind]  # fmt: skip
    words.append(f"--{option} {target.pattern or format(target.value, 'g')}")
    for name in ("layout", "sequential", "seed", "samples", "sequence_length", "distill"):
        value = getattr(request, name)
        if value != type(request).model_fields[name].default:
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join([*words, "-o OUT"])


def publication(
    session: Session, members: Mapping[str, Member], notes: list[str], warnings: list[str]
) -> Plan:
    """Return the plan that writes all members."""
    request = session.request
    return plan_of(
        session.source, {key: member.derived for key, member in members.items()}, verb="prune", dtype=request.dtype,
        seed=request.seed, notes=notes, warnings=warnings, max_shard_bytes=request.max_shard_size,
    )  # fmt: skip


def forget_candidates(work: Path) -> None:
    """Remove what was only built to be timed."""
    shutil.rmtree(work / "candidate", ignore_errors=True)
