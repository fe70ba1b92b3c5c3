"""From a decision to a model that was written, read back and timed; corrected until it meets its target."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgeon.calibrate import quality
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.derive import Derived, plan_of
from surgeon.errors import SurgeonError
from surgeon.measure.compare import Measured, speedup, verdict
from surgeon.measure.correction import aim, fit_correction
from surgeon.measure.table import LatencyTable
from surgeon.plan import Plan
from surgeon.prune import candidate, finished
from surgeon.prune.decide import Decision, decide, in_words
from surgeon.prune.goal import Goal
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.prune.written import (
    KEPT_FILE,
    command,
    derive,
    kept_document,
    reference_view,
    running_view,
    solve,
)
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut
from surgeon.system import physical_cores

__all__ = [
    "KEPT_FILE",
    "ROUNDS",
    "Member",
    "asked",
    "build",
    "command",
    "kept_document",
    "publication",
    "written",
]

ROUNDS = 4
"""Models built, saved, reloaded and timed for one target."""

TRIMS = 3
"""Times a size is chosen anew because what is beside the cut (biases that come with it) made a result too large."""


@dataclass
class Member:
    """One model of a family, ready to be published.

    Attributes:
        target, decision: what was asked for and decided.
        derived: what is written.
        shape: its sizes in words.
        parameters, bytes: of it.
        measured: against the source, None when it was not timed.
        verdict: "met", "too slow", "too fast", "not measurable"; "" when it was not timed.
        quality: on held-out text.
        remarks: sentences for the user.
        readers: programs that load it.
        solved: its solved weights.
    """

    target: Target
    decision: Decision
    derived: Derived
    shape: str
    parameters: int = 0
    bytes: int = 0
    measured: Measured | None = None
    verdict: str = ""
    quality: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    solved: Checkpoint | None = None

    def document(self, path: Path) -> dict[str, Any]:
        """Return the member as plain data."""
        speed = None
        found = self.measured
        if self.target.kind == "speedup" or found is not None:
            speed = {
                "target": self.target.value if self.target.kind == "speedup" else None,
                "predicted": self.decision.predicted if self.target.kind == "speedup" else None,
                "measured": found.ratio if found else None, "low": found.low if found else None,
                "high": found.high if found else None, "verdict": self.verdict or None,
                "details": found.plain() if found else None,
            }  # fmt: skip
        return {
            "name": self.target.name, "path": str(path), "parameters": self.parameters, "bytes": self.bytes,
            "shape": self.shape, "speedup": speed, "quality": self.quality, "loss": self.decision.loss,
            "tried": [{"plan": name, "loss": loss} for name, loss in self.decision.tried],
            "remarks": self.remarks, "readers": self.readers,
        }  # fmt: skip


def build(session: Session, target: Target, title: str) -> Member:
    """Return the model for a target: decided, written, read back, timed, its quality measured.

    With a speedup the table is corrected and a plan chosen anew until a model meets it, at most `ROUNDS` times. What
    an interrupted run had finished is taken up.
    """
    kept = finished.take_up(session, target)
    if kept is not None:
        member = _member(session, target, kept.decision, title, solve(session, kept.decision.cut))
        member.measured, member.verdict, member.quality = kept.measured, kept.verdict, kept.quality
        member.remarks = list(kept.remarks)
        session.say(f"{target.name}: taken up from an earlier run")
        return member
    if target.kind == "speedup" and session.request.measure:
        member = _timed(session, target, title)
    else:
        member = _sized(session, target, title)
    _measure_quality(session, member)
    finished.keep(session, member.target, finished.Finished(
        member.decision, member.measured, member.verdict, member.quality, tuple(member.remarks)))  # fmt: skip
    return member


def _sized(session: Session, target: Target, title: str) -> Member:
    """Return the model of a target that is a size, a share, a number of layers, or a speedup by the table alone."""
    asked_for = target
    budget = 60 * session.request.search_budget
    for _ in range(TRIMS):
        goal = None if target.kind == "layers" else session.goal(asked_for)
        decision = _absolute(session, decide(session, asked_for, goal, budget), goal, None)
        member = _written(session, target, decision, title)
        size = {"params": member.parameters, "size": member.bytes}.get(target.kind, 0)
        if size <= target.value or not size:
            break
        asked_for = replace(asked_for, value=asked_for.value - (size - target.value))
    if target.kind == "speedup":
        member.remarks.append("not timed (--no-measure): the speedup is what the latency table says")
    return member


def _timed(session: Session, target: Target, title: str) -> Member:
    """Build, time and correct until the measured speedup meets the target."""
    request = session.request
    table, history, made = session.table, list[tuple[Any, float]](), dict[Cut, Member]()
    left, wanted = 60 * request.search_budget, target.value
    dense = (session.origin or session).folder
    while len(made) < ROUNDS:
        began = time.monotonic()
        try:
            goal = session.goal(replace(target, value=wanted), table)
            decision = _absolute(session, decide(session, target, goal, left), goal, table)
        except SurgeonError:
            if not made:
                raise
            break  # the corrected table says that nothing more can be reached
        left = max(1.0, left - (time.monotonic() - began))
        if decision.cut in made:
            break
        member = made[decision.cut] = _written(session, target, decision, title)
        session.release()
        session.tell(f"timing candidate {len(made)} for {target.name}", len(made), ROUNDS)
        measured = speedup(
            dense, session.work / "candidate", session.workload, session.conditions, progress=session.tell,
            stop=session.stop,
        )  # fmt: skip
        member.measured, member.verdict = measured, verdict(measured, target.value, request.tolerance)
        session.say(
            f"{target.name}: {member.shape}: predicted {decision.predicted:.3f}x, measured "
            f"{measured.ratio:.3f}x ({measured.low:.3f} to {measured.high:.3f}): {member.verdict}"
        )
        if member.verdict in ("met", "not measurable"):
            break
        history.append((shapes(decision.cut, session.structure), measured.ratio))
        table = session.table.corrected(**fit_correction(session.table, history))
        wanted = max(1 + 1e-6, aim(table, history, target.value))
    best = min(made.values(), key=lambda one: _miss(one, target, request.tolerance))
    best.remarks += _said(best, len(made), request.tolerance)
    return best


def _said(member: Member, made: int, tolerance: float) -> list[str]:
    """Say in a sentence what was not met."""
    assert member.measured is not None
    if member.verdict == "not measurable":
        return [
            f"not measurable to within {tolerance:.0%} here: the 95 % interval is "
            f"±{member.measured.half_width:.1%} (other work on the machine, or too short a time limit)"
        ]
    if member.verdict == "met":
        return []
    count = (
        f"the nearest of {made} models that were built and timed"
        if made > 1
        else "the only model within reach"
    )
    return [f"{member.verdict}: {count}; the sizes between are too coarse, --round-to 1 gives finer ones"]


def _absolute(
    session: Session, decision: Decision, goal: Goal | None, table: LatencyTable | None
) -> Decision:
    """Return a decision whose predicted speedup counts from the dense model, also in a stage cut from another."""
    if goal is None or goal.kind != "speedup" or decision.predicted is None:
        return decision
    return replace(decision, predicted=decision.predicted * session.reached(table or session.table))


def _miss(member: Member, target: Target, tolerance: float) -> tuple[int, float]:
    """Order members: those fast enough first, then by distance from the target."""
    assert member.measured is not None
    ratio = member.measured.ratio / target.value
    return (0 if ratio >= 1 - tolerance else 1, abs(ratio - 1))


def written(
    session: Session, target: Target, decision: Decision, title: str, solved: Checkpoint | None
) -> Member:
    """Return a member from a decision and its solved weights: written, read back, its quality measured."""
    member = _compared(session, _member(session, target, decision, title, solved))
    _measure_quality(session, member)
    return member


def _written(session: Session, target: Target, decision: Decision, title: str) -> Member:
    session.tell(f"solving weights for {target.name}", 0, 1)
    return _compared(session, _member(session, target, decision, title, solve(session, decision.cut)))


def _member(
    session: Session, target: Target, decision: Decision, title: str, solved: Checkpoint | None
) -> Member:
    derived, readers = derive(session, target, decision.cut, solved, title)
    outputs = _plan(session, derived).outputs()[""]
    member = Member(target, decision, derived, in_words(decision.cut, session), sum(o.elements for o in outputs),
                    sum(o.nbytes for o in outputs), readers=readers, solved=solved)  # fmt: skip
    member.remarks += [*decision.remarks, *getattr(derived.view, "notes", ())]
    return member


def _plan(session: Session, derived: Derived) -> Plan:
    return plan_of(session.source, {"": derived}, verb="prune", dtype=session.request.dtype)


def write_candidate(session: Session, member: Member) -> Path:
    """Write a member into the work folder, in place of what was built there before."""
    return candidate.write(
        _plan(session, member.derived), session.work / "candidate", threads=session.request.threads,
        memory_limit=session.request.memory_limit, stop=session.stop,
    )  # fmt: skip


def _compared(session: Session, member: Member) -> Member:
    """Write a candidate, read it back, and refuse it where it computes something else than it must."""
    cut = member.decision.cut
    leaving = session.leaving
    folder = write_candidate(session, member) if leaving is None else None
    probes = candidate.probes(session.texts.held_out)
    settings = replace(session.settings, dtype="float32", spill=None)
    expected = quality.last_states(
        reference_view(session, cut, member.solved, member.derived.view), probes, settings
    )
    rounded = candidate.sixteen_bit(session.source.checkpoint, session.request.dtype)
    if leaving is not None:
        plan, place = _plan(session, member.derived), session.work / "candidate"
        with leaving.looked_at(
            plan, place, session.request.threads or physical_cores(), session.stop
        ) as view:
            difference = candidate.check_unwritten(view, expected, probes, settings, rounded=rounded)
        member.remarks.append(
            f"compared unwritten with the masked model: last states differ by {difference:.1e}"
        )
        return member
    assert folder is not None
    back = candidate.check(folder, expected, probes, settings, rounded=rounded)
    how = "loaded strictly and compared" if back.strict else "streamed back and compared"
    member.remarks.append(f"{how} with the masked model: last states differ by {back.difference:.1e}")
    return member


def _measure_quality(session: Session, member: Member) -> None:
    """Compare a member with the source on held-out text."""
    session.tell(f"measuring quality of {member.target.name}", 0, 1)
    first = session.origin or session
    running = running_view(session, member.decision.cut, member.solved, member.derived.view)
    member.quality = quality.compare(
        first.source.checkpoint, running, session.texts.held_out, session.settings, decoder=session.decoder,
        reference=first.reference, stop=session.stop,
    )  # fmt: skip


def asked(session: Session) -> dict[str, Any]:
    """Return what of a request and its text decides about the result."""
    return session.asked


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
