"""Members that an interrupted run had finished: what was decided, measured and said, taken up instead of done again.

A model is timed anew only when it has to be: times never repeat exactly, so a second timing could decide otherwise,
and an interrupted publication could not go on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from surgeon.measure.compare import Measured
from surgeon.measure.environment import Environment
from surgeon.measure.workload import Workload
from surgeon.prune.decide import Decision
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.structure.cut import Cut


@dataclass(frozen=True)
class Finished:
    """One member without its weights."""

    decision: Decision
    measured: Measured | None
    verdict: str
    quality: dict[str, Any]
    remarks: tuple[str, ...]


def keep(session: Session, target: Target, member: Finished) -> None:
    """Write a finished member into the work folder."""
    decision, found = member.decision, member.measured
    session.keep(_name(target), {
        "key": _key(session, target), "cut": decision.cut.document(), "predicted": decision.predicted,
        "loss": decision.loss, "decided": list(decision.remarks), "tried": [list(pair) for pair in decision.tried],
        "measured": None if found is None else {
            **{name: value for name, value in asdict(found).items() if name not in ("workload", "environment")},
            "workload": found.workload.document(), "environment": found.environment.document(),
        },
        "verdict": member.verdict, "quality": member.quality, "remarks": list(member.remarks),
    })  # fmt: skip


def take_up(session: Session, target: Target) -> Finished | None:
    """Return what an earlier run of the same request finished, None where there is nothing."""
    try:
        kept = json.loads((session.work / _name(target)).read_bytes())
        if kept["key"] != _key(session, target):
            return None
        decision = Decision(
            Cut.from_document(kept["cut"]), kept["predicted"], kept["loss"], tuple(kept["decided"]),
            tuple((name, loss) for name, loss in kept["tried"]),
        )  # fmt: skip
        return Finished(
            decision,
            _measured(kept["measured"]),
            kept["verdict"],
            kept["quality"],
            tuple(kept["remarks"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _measured(document: dict[str, Any] | None) -> Measured | None:
    if document is None:
        return None
    parts = {name: (float(dense), float(pruned)) for name, (dense, pruned) in document["parts"].items()}
    return Measured(**{
        **document, "workload": Workload.from_document(document["workload"]),
        "environment": Environment.from_document(document["environment"]), "parts": parts,
    })  # fmt: skip


def _name(target: Target) -> str:
    return f"member-{target.name}.json"


def _key(session: Session, target: Target) -> str:
    """Return what a member depends on: what the session does, and the workload that a table brings along."""
    return f"{session.key} {target.name} {target.value!r}"
