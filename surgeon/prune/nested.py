"""A nested family: one model that computes what the source does, and holds every member as leading slices.

Heads and channels of the source are sorted by how long they stay, which changes nothing it computes;
``members.json`` beside the weights says where each member ends, and ``surgeon export --member`` takes one out.
Members share the parent's weights: nothing is solved again after a cut, so a member is worse than the same
shape pruned for itself (`surgeon.prune.members`). Quality on held-out text says by how much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgeon.calibrate import quality
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.deploy import members as families
from surgeon.deploy import runtimes
from surgeon.derive import Derived, plan_of
from surgeon.errors import SurgeonError, UsageError
from surgeon.measure.compare import Measured, speedup, verdict
from surgeon.measure.correction import aim, fit_correction
from surgeon.measure.table import LatencyTable
from surgeon.prune import candidate
from surgeon.prune.decide import Decision, in_words
from surgeon.prune.goal import Goal
from surgeon.prune.members import ROUNDS, Member, asked
from surgeon.prune.nested_shapes import Family, PlainLosses, decide_family, kept_in_front, orders
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut
from surgeon.structure.views import MaskedView, PrunedView

DIGITS = 5
"""Significant digits of quality in ``members.json``: equal runs must give equal files on machines whose sums differ."""


@dataclass
class Parent(Member):
    """The one model that is published: the source, sorted.

    Attributes:
        members: plain data of every member, largest first.
    """

    members: list[dict[str, Any]] = field(default_factory=list)

    def document(self, path: Path) -> dict[str, Any]:
        """Return the parent as plain data, with its members."""
        return {**super().document(path), "name": "nested family", "speedup": None, "members": self.members}


@dataclass
class _Part:
    """One member while it is made."""

    target: Target
    decision: Decision
    member: families.Member
    view: Checkpoint
    remarks: list[str]
    measured: Measured | None = None


def build(session: Session, targets: Sequence[Target], title: str) -> dict[str, Member]:
    """Return the parent of a nested family under the key "".

    Shapes are decided from one set of rankings and, where targets are speedups, corrected until all measured
    speedups meet theirs, or ROUNDS families were built and timed.

    Args:
        targets: weakest cut first.
        title: name of the output, for the card.

    Raises:
        UsageError: E264 a target is out of reach, or two members would be one; E267 an option without effect here.
        InputError: E316 the parent or a member computes something else than it must.
    """
    _check_options(session)
    losses = PlainLosses(session)
    if targets[0].kind != "speedup" or not session.request.measure:
        family = decide_family(session, targets, _goals(session, targets), losses)
        session.release()
        return {"": _parent(session, _parts(session, targets, family), title)}
    return {"": _parent(session, _nearest(session, targets, losses), title)}


def _nearest(session: Session, targets: Sequence[Target], losses: PlainLosses) -> list[_Part]:
    """Return the members of the family whose measured speedups come nearest to their targets."""
    table, history, made = session.table, list[tuple[Any, float]](), dict[tuple[Cut, ...], list[_Part]]()
    wanted = list(targets)
    while len(made) < ROUNDS:
        try:
            family = decide_family(session, targets, _goals(session, wanted, table), losses)
        except SurgeonError:
            if not made:
                raise
            break  # the corrected table says that a target is out of reach
        if family.cuts in made:
            break
        session.release()
        parts = made[family.cuts] = _parts(session, targets, family)
        verdicts = [_timed(session, part, len(made)) for part in parts]
        if all(found in ("met", "not measurable") for found in verdicts):
            break
        history += [
            (shapes(part.decision.cut, session.structure), part.measured.ratio)
            for part in parts
            if part.measured
        ]
        table = session.table.corrected(**fit_correction(session.table, history))
        wanted = [replace(one, value=max(1 + 1e-6, aim(table, history, one.value))) for one in targets]
    return min(made.values(), key=lambda parts: _miss(parts, session.request.tolerance))


def _check_options(session: Session) -> None:
    request = session.request
    for name, given in (("sequential", request.sequential), ("allow-norm-approx", request.allow_norm_approx),
                        ("protect-layers", bool(request.protect_layers))):  # fmt: skip
        if given:
            raise UsageError("E267", f"--{name} has no effect on a nested family", help="leave it out: members are leading slices "
                             "of the parent, all layers cut alike, with its own weights")  # fmt: skip
    if "hidden" in session.structures:
        raise UsageError("E267", "members of a nested family share the residual stream, so it cannot be cut",
                         help="leave hidden out of --structures")  # fmt: skip


def _goals(
    session: Session, wanted: Sequence[Target], table: LatencyTable | None = None
) -> list[Goal | None]:
    """Return the budget of each member; none where every layer loses the same share."""
    if session.request.method == "width" and wanted[0].kind == "sparsity":
        return [None] * len(wanted)
    return [session.goal(target, table) for target in wanted]


def _parts(session: Session, targets: Sequence[Target], family: Family) -> list[_Part]:
    """Return the members of a family as slices of its sorted parent; each is written, read back and compared."""
    structure = session.structure
    parent = _sorted(session, family)
    found = []
    for target, decision in zip(targets, family.decisions, strict=True):
        member = families.Member(target.name, kept_in_front(decision.cut, structure))
        view: Any = PrunedView(parent, structure, member.cut(structure))
        found.append(_Part(target, decision, member, view, list(decision.remarks)))
    families.check_nested([part.member for part in found], structure)
    return found


def _sorted(session: Session, family: Family) -> families.PermutedView:
    return families.permute(session.source.checkpoint, session.structure, orders(session, family))


def _timed(session: Session, part: _Part, number: int) -> str:
    """Write a member to the work folder, compare it with the masked source, time it; return the verdict."""
    folder = _written(session, part)
    session.tell(f"timing candidate {number} for {part.target.name}", number, ROUNDS)
    part.measured = speedup(
        session.folder, folder, session.workload, session.conditions, progress=session.tell, stop=session.stop
    )
    found = verdict(part.measured, part.target.value, session.request.tolerance)
    session.say(
        f"{part.target.name}: {in_words(part.decision.cut, session)}: predicted {part.decision.predicted:.3f}x, measured "
        f"{part.measured.ratio:.3f}x ({part.measured.low:.3f} to {part.measured.high:.3f}): {found}"
    )
    return found


def _written(session: Session, part: _Part) -> Path:
    """Write a member as it will be extracted, and compare it with the source whose removed units are zero."""
    expected = MaskedView(session.source.checkpoint, session.structure, part.decision.cut)
    return _compared(session, part.view, expected, part.remarks)


def _compared(
    session: Session, view: Checkpoint, expected: Checkpoint, remarks: list[str], files: Any = None
) -> Path:
    """Write a model to the work folder, read it back, and refuse it where it computes something else than it must."""
    request = session.request
    derived = Derived(view, {"verb": "prune"}, request.method, {}, "candidate", dict(files or {}))
    plan = plan_of(session.source, {"": derived}, verb="prune", dtype=request.dtype)
    folder = candidate.write(plan, session.work / "candidate", threads=request.threads, memory_limit=request.memory_limit,
                             stop=session.stop)  # fmt: skip
    probes = candidate.probes(session.texts.held_out)
    settings = replace(session.settings, dtype="float32", spill=None)
    states = quality.last_states(expected, probes, settings)
    back = candidate.check(folder, states, probes, settings, rounded=request.dtype not in (None, "float32"))
    how = "loaded strictly and compared" if back.strict else "streamed back and compared"
    remark = f"{how}: last states differ by {back.difference:.1e}"
    if remark not in remarks:
        remarks.append(remark)
    return folder


def _miss(parts: list[_Part], tolerance: float) -> tuple[int, float]:
    """Order families: those with the most members fast enough first, then by summed distance from the targets."""
    ratios = [part.measured.ratio / part.target.value for part in parts if part.measured is not None]
    return sum(ratio < 1 - tolerance for ratio in ratios), sum(abs(ratio - 1) for ratio in ratios)


def _parent(session: Session, parts: list[_Part], title: str) -> Parent:
    """Return the sorted source with the record of its members, compared with the source itself."""
    family = Family(tuple(part.decision for part in parts), _mode(session, parts))
    view = _sorted(session, family)
    documents, entries = [], []
    for part in parts:
        if part.measured is None:
            _written(session, part)
        document = _described(session, part)
        documents.append(document)
        figures = {name: document[name] for name in ("parameters", "bytes", "shape")}
        entries.append(replace(part.member, figures={**figures, "quality": _rounded(document["quality"])}))
    name, content = families.companion(entries, session.structure)
    remarks: list[str] = []
    _compared(session, view, session.source.checkpoint, remarks, {name: content})
    readers = [
        one
        for one in runtimes.readers(session.source.checkpoint.config or {})
        if one.loads and one.form == "folder"
    ]
    tensors = _sizes(session, view)
    parent = Parent(
        parts[0].target, Decision(Cut.whole(session.structure.layers)), _derived(session, view, family, parts, title, {name: content}),
        in_words(Cut.whole(session.structure.layers), session), tensors["parameters"], tensors["bytes"], members=documents,
        remarks=[f"the parent computes what the source does: {remarks[0]}",
                 "members share the parent's weights: nothing was solved again after the cut"],
        readers=[f"{one.runtime} ({one.form})" for one in readers],
    )  # fmt: skip
    parent.remarks += [_sentence(document) for document in documents]
    return parent


def _mode(session: Session, parts: list[_Part]) -> str:
    """Return the unit in which attention is cut, from what the members keep."""
    for part in parts:
        for layer, kept in part.member.layers.items():
            attention = session.structure.attention[layer]
            if attention is not None and kept.groups < attention.groups:
                return "groups"
            if attention is not None and kept.heads_per_group < attention.per_group:
                return "heads"
    return ""


def _described(session: Session, part: _Part) -> dict[str, Any]:
    """Return a member as plain data, with its quality on held-out text."""
    found = part.measured
    scores = quality.compare(
        session.source.checkpoint, part.view, session.texts.held_out, session.settings, decoder=session.decoder,
        reference=session.reference,
    )  # fmt: skip
    speed = None
    if part.target.kind == "speedup":
        speed = {
            "target": part.target.value, "predicted": part.decision.predicted, "measured": found.ratio if found else None,
            "low": found.low if found else None, "high": found.high if found else None,
            "verdict": verdict(found, part.target.value, session.request.tolerance) if found else "not timed",
            "details": found.plain() if found else None,
        }  # fmt: skip
    return {
        "name": part.target.name, **_sizes(session, part.view), "shape": in_words(part.decision.cut, session), "speedup": speed,
        "quality": scores, "loss": part.decision.loss, "remarks": part.remarks,
        "tried": [{"plan": name, "loss": loss} for name, loss in part.decision.tried],
    }  # fmt: skip


def _sizes(session: Session, view: Checkpoint) -> dict[str, int]:
    derived = Derived(view, {}, session.request.method, {}, "member")
    outputs = plan_of(session.source, {"": derived}, verb="prune", dtype=session.request.dtype).outputs()[""]
    return {"parameters": sum(o.elements for o in outputs), "bytes": sum(o.nbytes for o in outputs)}


def _sentence(document: dict[str, Any]) -> str:
    """Return one line on a member."""
    words = [f"member {document['name']}: {document['parameters']:,} parameters, {document['shape']}"]
    speed, scores = document["speedup"], document["quality"]
    if speed and speed["measured"] is not None:
        words.append(
            f"measured {speed['measured']:.3f}x ({speed['low']:.3f} to {speed['high']:.3f}): {speed['verdict']}"
        )
    elif speed:
        words.append(f"predicted {speed['predicted']:.3f}x, not timed")
    if scores.get("perplexity"):
        words.append(
            "held-out perplexity {:.4g} -> {:.4g}, KL {:.4g}".format(*scores["perplexity"], scores["kl"])
        )
    elif "cosine" in scores:
        words.append(f"held-out cosine {scores['cosine']:.4f}")
    return "; ".join(words)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _derived(
    session: Session, view: Checkpoint, family: Family, parts: list[_Part], title: str, files: dict[str, bytes]
) -> Derived:  # fmt: skip
    names = [part.target.name for part in parts]
    kept = hashlib.sha256("".join(cut.identity() for cut in family.cuts).encode()).hexdigest()
    recipe = {
        "verb": "prune", **asked(session), "nested": True, "targets": names, "kept": kept,
        "shapes": {part.target.name: [[s.heads, s.groups, s.head_dim, s.ffn] for s in shapes(part.decision.cut, session.structure)]
                   for part in parts},
    }  # fmt: skip
    kind = parts[0].target.kind
    option = kind if kind == "sparsity" else f"target-{kind}"
    values = ",".join(format(part.target.value, "g") for part in parts)
    request = session.request
    chosen = f" --criterion {request.criterion}" if request.criterion else ""
    return Derived(
        view=view, recipe=recipe, method=request.method, title=title, companions=files,
        parameters={"members": ", ".join(names)},
        notices=("This model computes what its source does: heads and channels are only sorted. "
                 f"{families.FILE} lists smaller models inside it; surgeon export --member NAME takes one out.",),
        command=f"surgeon prune {session.source.key} --method {request.method}{chosen} --{option} {values} --nested -o OUT",
    )  # fmt: skip
