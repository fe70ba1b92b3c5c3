"""Sparse methods as members: every shape stays, weights become zero, and the plain truth about speed is said."""

from __future__ import annotations

from surgeon.calibrate import quality
from surgeon.derive import Derived, plan_of
from surgeon.prune.decide import Decision, in_words
from surgeon.prune.members import Member, asked, command
from surgeon.prune.request import Target
from surgeon.prune.session import Session
from surgeon.prune.sparse.masks import Pattern
from surgeon.prune.sparse.run import SPEED, SparseOptions, sparsify
from surgeon.structure.cut import Cut


def build(session: Session, target: Target, title: str, *, dry_run: bool = False) -> dict[str, Member]:
    """Return the one member of a sparse run."""
    request = session.request
    options = SparseOptions(
        method=request.method, sparsity=target.value if target.kind == "sparsity" else None,
        pattern=Pattern.parse(target.pattern) if target.pattern else None, owl=request.owl, damp=request.damp,
    )  # fmt: skip
    if dry_run:
        return {}
    # Magnitude looks at no text; its quality is measured on some all the same.
    samples = () if request.method == "magnitude" else session.texts.statistics
    view, record = sparsify(
        session.source.checkpoint,
        samples,
        session.settings,
        options,
        session.work,
        progress=session.tell,
        stop=session.stop,
    )
    whole = Cut.whole(session.structure.layers)
    facts = {key: record[key] for key in ("zeros", "fallbacks", "download_bytes") if key in record}
    derived = Derived(
        view=view, recipe={"verb": "prune", **asked(session), "target": target.name, "sparse": record}, method=request.method,
        parameters={"target": target.name}, title=title, notices=SPEED, command=command(session, target),
    )  # fmt: skip
    outputs = plan_of(session.source, {"": derived}, verb="prune", dtype=request.dtype).outputs()[""]
    member = Member(
        target,
        Decision(whole),
        derived,
        in_words(whole, session),
        sum(o.elements for o in outputs),
        sum(o.nbytes for o in outputs),
    )
    member.quality = quality.compare(
        session.source.checkpoint, view, session.texts.held_out, session.settings, decoder=session.decoder,
        reference=session.reference,
    )  # fmt: skip
    pruned = sum(int(fact["elements"]) for fact in record["matrices"])
    share = facts["zeros"] / max(pruned, 1)
    member.remarks = [
        f"{facts['zeros']:,} zeros: {share:.1%} of the linear layers, {facts['zeros'] / max(member.parameters, 1):.1%} of all parameters",
        *([] if record.get("pattern_holds") is None else [f"{target.pattern} holds in every matrix" if record["pattern_holds"] else f"{target.pattern} does NOT hold in every matrix"]),
        f"expected speedup 1.0x: {SPEED[0]}",
        f"about {facts['download_bytes'] / 1e6:,.1f} MB to download when compressed",
        SPEED[1],
    ]  # fmt: skip
    if facts.get("fallbacks"):
        member.remarks.append(
            f"{len(facts['fallbacks'])} expert matrices saw too few tokens and went by magnitude"
        )
    return {"": member}
