"""HEAPr for a target: channel scores, measured once a run, and the widths they lead to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from surgeon.calibrate.answers import answer_places
from surgeon.errors import InputError, SurgeonError
from surgeon.prune.experts import heapr, widths
from surgeon.prune.experts.decide import Choice
from surgeon.prune.experts.session import ExpertSession
from surgeon.prune.request import Target
from surgeon.structure.experts.check import alignment_notes
from surgeon.structure.experts.view import ExpertView


def check(session: ExpertSession, target: Target) -> None:
    """Refuse what no scores make possible, before anything is measured: the choice is made once with scores that say nothing.

    Raises:
        As `choose`.
    """
    experts = session.experts
    if session.request.criterion != "random":
        heapr.check_measurable(session.checkpoint, experts)
    found = _widths(session, target, heapr.without_measuring(experts), session.named)
    if found.refusal is None:
        ExpertView(session.checkpoint, experts, found.cut)


def choose(session: ExpertSession, target: Target) -> Choice:
    """Return the channels that stay.

    Raises:
        UsageError: E245, E269; InputError: E435-E437, E349 a layout no reader loads; what `ExpertView` raises.
    """
    request, experts = session.request, session.experts
    found = _widths(session, target, scores(session), session.protected)
    choice = Choice(found.cut, experts.count, deployable=found.refusal is None)
    choice.remarks = [*found.notes, *(alignment_notes(experts, found.cut) if choice.deployable else ())]
    if not choice.deployable:
        choice.remarks.append(f"evaluated only, nothing is written: {found.refusal}")
    choice.record = {"criterion": request.criterion or "heapr", "layout": found.layout, "removed": float(f"{found.removed:.6g}"),
                     "saved": float(f"{found.saved:.6g}")}  # fmt: skip
    choice.remarks.append(
        f"{found.removed:.1%} of expert channels go; the files do without {found.saved:.1%}"
    )
    for layer in experts.running:
        kept = [
            len(found.cut.channels.get((layer.index, e), range(experts.width))) for e in range(layer.count)
        ]
        choice.layers[layer.index] = {
            "widths": kept,
            "protected": sorted(session.protected.get(layer.index, ())),
        }
    return choice


def _widths(
    session: ExpertSession,
    target: Target,
    measured: heapr.ChannelScores,
    protected: Mapping[int, Collection[int]],
) -> widths.Widths:
    """Return the channels that stay by scores, in the layout of the request."""
    request, experts = session.request, session.experts
    idle = tuple(layer.index for layer in experts.layers if not layer.runs)
    without = idle if request.mtp == "drop" else ()
    sparsity, width = None, None
    if target.kind == "sparsity":
        sparsity = target.value
    elif request.layout == "uniform":
        size = {"size": "size", "params": "parameters"}[target.kind]
        width = widths.width_for(
            session.checkpoint, experts, round_to=request.round_to, without=without, **{size: target.value}
        )
    else:
        sparsity = _share(session, target)
    found = widths.choose(
        measured, experts, sparsity=sparsity, width=width, layout=request.layout, scope=request.scope,
        round_to=request.round_to, protected=protected, without=without,
    )  # fmt: skip
    if found.refusal is not None and request.layout != "ragged":
        raise InputError("E349", f"the {request.layout} layout cannot be written: {found.refusal}",
                         help="--layout uniform or padded is; --layout ragged only evaluates")  # fmt: skip
    return found


def _share(session: ExpertSession, target: Target) -> float:
    """Return the share of channels that has to go for a number of parameters or bytes of plain weights."""
    infos = session.checkpoint.tensors.values()
    total = sum(info.nbytes if target.kind == "size" else info.elements for info in infos)
    return widths.sparsity_of_total(1 - target.value / total, session.checkpoint, session.experts)


def scores(session: ExpertSession) -> heapr.ChannelScores:
    """Return channel scores by the request's criterion: kept from an earlier run, or measured now."""
    variant, seed = session.request.criterion or "heapr", session.request.seed
    samples = [s for s in session.texts.statistics if answer_places(s).stop > answer_places(s).start]
    about = heapr.about_of(session.checkpoint, samples, session.settings)
    file = session.work / "channels.safetensors"
    if variant != "random" and file.is_file():
        try:
            kept = heapr.ChannelScores.load(file)
            if kept.about == about:
                return kept.by(variant, seed)
        except SurgeonError:
            file.unlink()  # written by another version
    found = heapr.channel_scores(
        session.checkpoint, samples, session.settings, session.experts, variant=variant, about=about, seed=seed,
        progress=lambda done, total: session.tell("measuring channels", done, total), stop=session.stop, resume=True,
    )  # fmt: skip
    if variant != "random":
        session.work.mkdir(parents=True, exist_ok=True)
        found.save(file)
    return found
