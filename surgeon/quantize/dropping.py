"""``--drop-experts``: which experts go and how many bits the others get, for a size of the files; then the model without them.

The choice is made once for both, on one scale (`surgeon.quantize.joint_experts`). What is left is a model of its own, sliced from the
source's stored bytes, and everything after the choice works on it as on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from surgeon.errors import UsageError
from surgeon.formats.scheme import Scheme
from surgeon.quantize import wishes
from surgeon.quantize.decide import Decision
from surgeon.quantize.expert_menu import expert_menu
from surgeon.quantize.joint_experts import JointExperts, block_outputs, bytes_beside, joint_experts
from surgeon.quantize.measuring.pmq_scores import LayerScores, pmq_scores
from surgeon.quantize.scheme_names import Wanted, parse
from surgeon.quantize.session import Session
from surgeon.quantize.sizes import file_bytes, matrix_bytes
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import Experts
from surgeon.structure.experts.view import ExpertView

ROUNDS = 4
"""Times the budget of the experts is lowered because everything else took more than was left for it."""


def dropped(session: Session) -> tuple[Session, Decision]:
    """Return the session of the model that is left, and how its matrices are stored.

    Raises:
        UsageError: E462 a size out of reach, E489 experts that cannot be dropped; InputError: E477, E490.
    """
    request = session.request
    assert request.target_size is not None
    experts = experts_of(session.checkpoint)
    menu = expert_menu(session)
    scores = pmq_scores(
        session.checkpoint, experts, session.linear.layers, menu, session.form, session.texts.statistics, session.settings,
        session.options, progress=session.tell, stop=session.stop,
    )  # fmt: skip
    outputs = block_outputs(
        session.checkpoint, experts, session.texts.statistics, session.plain_settings, stop=session.stop,
        progress=lambda done, total: session.tell("outputs of experts", done, total),
    )  # fmt: skip
    rest = _rest(session, scores)
    budget = int(request.target_size) - rest
    if budget <= 0:
        raise UsageError("E462", f"a size of {int(request.target_size):,} bytes cannot be reached by dropping experts: all that is "
                         f"not of experts takes {rest:,}", help="raise the target, or name fewer bits for the rest: --scheme 're:.*self_attn.*=W4A16'")  # fmt: skip
    for _ in range(ROUNDS):
        best = _best(session, experts, scores, outputs, menu, budget)
        left = _left(session, experts, best)
        decision = _decision(session, left, experts, best)
        size = file_bytes(left, decision.schemes)
        if size <= request.target_size:
            return left, decision
        budget -= size - int(request.target_size)
    raise UsageError("E462", f"a size of {int(request.target_size):,} bytes cannot be reached by dropping experts", help="raise the target, or allow fewer bits with --bits")  # fmt: skip


def _left(session: Session, experts: Experts, best: JointExperts) -> Session:
    """Return a session of the model without the dropped experts; it is judged by the whole one."""
    view: Any = ExpertView(session.checkpoint, experts, best.cut)
    left = replace(session, source=replace(session.source, checkpoint=view), original=session.checkpoint)
    left.__dict__["texts"] = session.texts
    return left


def _rest(session: Session, scores: Sequence[LayerScores]) -> int:
    """Return about how many bytes everything but the experts takes."""
    inside = {
        label
        for one in scores
        for members in one.members
        for part in members
        for label in ((part,) if isinstance(part, str) else part)
    }
    rest = parse(
        "W4A16", session.form.name, group_size=session.request.group_size, symmetric=session.request.symmetric
    )
    wanted = {m.tensor: wishes.wishes(session).fixed.get(m.tensor, rest) for m in session.linear.matrices}
    schemes = wishes.settle(session, wanted)
    total = file_bytes(session, schemes)
    matrices = wishes.every(session)
    return total - sum(
        matrix_bytes(session, n, (matrices[n].rows, matrices[n].columns), schemes[n])[0] for n in inside
    )


def _best(
    session: Session,
    experts: Experts,
    scores: Sequence[LayerScores],
    outputs: Any,
    menu: Sequence[Scheme],
    budget: int,
) -> JointExperts:
    """Return the best choice; where a reader wants one scheme for all experts, each scheme is tried alone."""
    one_for_all = session.form.name == "compressed-tensors" and session.form.reader.runtime == "transformers"
    menus = [[scheme] for scheme in menu] if one_for_all else [list(menu)]
    granularity = (
        "expert" if session.form.name == "auto-round" and session.request.granularity == "expert" else "layer"
    )
    found: list[JointExperts] = []
    refused: UsageError | None = None
    for choice in menus:
        columns = [menu.index(scheme) for scheme in choice]
        part = [
            replace(
                one,
                schemes=tuple(s.name for s in choice),
                error=one.error[..., columns],
                sizes=one.sizes[..., columns],
            )
            for one in scores
        ]
        try:
            found.append(
                joint_experts(
                    experts,
                    part,
                    outputs,
                    choice,
                    budget,
                    beside=bytes_beside(session.checkpoint, experts),
                    granularity=granularity,
                )
            )
        except UsageError as error:
            if error.code != "E462":
                raise
            refused = error
    if not found:
        assert refused is not None
        raise refused
    return min(found, key=lambda one: one.loss)


def _decision(session: Session, left: Session, experts: Experts, best: JointExperts) -> Decision:
    view: Any = left.checkpoint
    named = {source: name for name, source in view.source_names.items()}
    asked = wishes.wishes(left)
    rest = parse(
        "W4A16", session.form.name, group_size=session.request.group_size, symmetric=session.request.symmetric
    )
    wanted = {m.tensor: asked.fixed.get(m.tensor, rest) for m in left.linear.matrices}
    wanted |= {named[label]: Wanted(scheme) for label, scheme in best.schemes.items() if label in named}
    record = {"removed": best.removed, "loss": best.loss, "status": best.status,
              "kept": {str(layer): list(ids) for layer, ids in best.cut.kept.items()}}  # fmt: skip
    said = (
        f"{best.removed} of {experts.count} experts a layer were dropped; predicted loss {best.loss:.4g} (relative error of the blocks' outputs)",
    )
    return Decision(wishes.settle(left, wanted), remarks=said, record=record)
