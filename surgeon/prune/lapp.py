"""LAPP-style pruning as members: thresholds are learned, frozen into a cut, and the cut is built like any other.

The abstract of LAPP (arXiv 2309.14157) fixes one learnable threshold a layer, a compute budget and a progressive
schedule; the formulas are surgeon's (`surgeon.train.gates`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace

from surgeon.calibrate import data
from surgeon.checkpoint.checkpoint import open_path
from surgeon.derive import Source
from surgeon.measure.compare import speedup, verdict
from surgeon.prune.decide import Decision
from surgeon.prune.goal import Goal
from surgeon.prune.levels import granularity
from surgeon.prune.members import Member, written
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.train.cost import Cost
from surgeon.train.thresholds import Budget, Found, Options, thresholds

KINDS = {"heads": "attention", "ffn": "ffn"}


def build(session: Session, targets: tuple[Target, ...], title: str) -> dict[str, Member]:
    """Return one member a target, each learned on its own from the source."""
    samples = _samples(session)
    return {
        (target.name if len(targets) > 1 else ""): _member(session, target, samples, title)
        for target in targets
    }


def _samples(session: Session):
    from surgeon.data.records import parse_sources

    request = session.request
    found = data.load(
        parse_sources(list(request.calibration)) if request.calibration else None, session.folder,
        samples=min(request.distill_steps * request.distill_batch, 100_000), sequence_length=request.distill_length,
        seed=request.seed, pack=True, offline=request.offline,
    )  # fmt: skip
    session.say(f"learning on {found.record['tokens']:,} tokens in {len(found.samples):,} blocks")
    return list(found.samples)


def _member(session: Session, target: Target, samples, title: str) -> Member:
    request = session.request
    goal = session.goal(target)
    found = _learn(session, target, goal, samples)
    for warning in found.record["warnings"]:
        session.say(str(warning))
    if found.record.get("bypass"):
        session.say(f"{target.name}: bypass: {found.record['bypass']}")
    current = session
    if found.weights is not None:
        source = Source(session.source.key, open_path(found.weights, session.source.checkpoint.label), session.source.path,
                        session.source.repo, session.source.commit)  # fmt: skip
        current = replace(session, source=source, origin=session)
        for name in ("texts", "decoder", "workload", "table", "modes"):
            if name in session.__dict__:
                current.__dict__[name] = session.__dict__[name]
    solved = open_path(found.solved) if found.solved is not None else None
    decision = Decision(
        found.cut, goal.achieved(goal.cost.total(found.cut)), found.record["after"].get("divergence")
    )
    member = written(current, target, decision, title, solved)
    if target.kind == "speedup" and request.measure:
        member.measured = speedup(
            session.folder,
            session.work / "candidate",
            session.workload,
            session.conditions,
            progress=session.tell,
            stop=session.stop,
        )
        member.remarks.append(
            f"against the target: {verdict(member.measured, target.value, request.tolerance)}"
        )
    return member


def _learn(session: Session, target: Target, goal: Goal, samples) -> Found:
    request = session.request
    output = session.work / "learned" / target.name
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if goal.kind == "speedup":
        table = session.table
        cost = Cost.timed(session.structure, table.attention_seconds, table.ffn_seconds, goal.cost.rest)
    else:
        cost = Cost.parameters(session.source.checkpoint, session.structure)
    width = next((part.width for part in session.structure.ffn if part is not None), 1)
    options = Options(
        budget=Budget(remaining=goal.budget / goal.cost.dense), steps=request.distill_steps, batch=request.distill_batch,
        train=request.train, rate=request.learning_rate, bypass_rank=request.bypass_rank, seed=request.seed,
        structures=tuple(KINDS[name] for name in session.structures if name in KINDS),
        ffn_grid=granularity(width, request.round_to), task=1.0 if session.decoder else 0.0,
    )  # fmt: skip
    return thresholds(
        session.folder, samples, options, cost, session.work / "training" / target.name, output, device=session.settings.device,
        progress=lambda done, steps: session.tell(f"learning thresholds for {target.name}", done, steps), stop=session.stop,
    )  # fmt: skip
