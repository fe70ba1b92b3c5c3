"""What may be chosen for the experts of a model: schemes that all their matrices can have, and what has to share one.

Asked before any text is read: a format whose readers load all experts of a layer as one leaves nothing to choose by expert.
"""

from __future__ import annotations

from surgeon.errors import InputError, UsageError, Where
from surgeon.formats.compressed_runtimes import Choice
from surgeon.formats.scheme import Scheme
from surgeon.quantize import wishes
from surgeon.quantize.decide import widths_of
from surgeon.quantize.session import Session
from surgeon.structure.experts.find import experts_of


def expert_menu(session: Session) -> list[Scheme]:
    """Return the integers that every expert's matrix can be stored as, one for each width.

    Raises:
        UsageError: E217 a width that the form does not store.
        InputError: E477 a width that was asked for, or none at all, fits the experts.
    """
    widths = widths_of(session)
    menu = [scheme for scheme in wishes.menu(session, widths) if scheme is not None and scheme.kind == "int"]
    allowed = [set(choice.schemes) for choice in _choices(session, menu)]
    found: dict[int, Scheme] = {}
    for scheme in menu:
        if all(scheme in schemes for schemes in allowed):
            found.setdefault(scheme.bits, scheme)
    missing = [width for width in session.request.bits if width not in found]
    if missing or not found:
        what = f"of {missing[0]} bits" if missing else "of any width in the menu"
        form = session.form
        raise InputError("E477", f"{form.name} for {form.reader.runtime} stores no experts of this model in integers {what}",
                         where=Where(session.source.path), help="choose other widths with --bits, or a --group-size that divides the experts' width")  # fmt: skip
    return list(found.values())


def expert_ties(session: Session) -> list[tuple[str, ...]]:
    """Return the matrices of experts that readers of the form want stored alike, single ones left out."""
    menu: list[Scheme] = []
    return [choice.names for choice in _choices(session, menu) if len(choice.names) > 1]


def _choices(session: Session, menu: list[Scheme]) -> list[Choice]:
    shapes = {m.tensor: (m.rows, m.columns) for m in session.linear.matrices if m.routed}
    return (session.form.choices(shapes, [*menu, None]) or [[]])[0]


def check(session: Session) -> None:
    """Refuse what cannot be chosen for experts, before anything is measured.

    Raises:
        UsageError: E217 patterns that name experts; E488 a granularity finer than what readers of the form tell apart.
        InputError: E477 see `expert_menu`; what finding experts raises.
    """
    request = session.request
    option = "--drop-experts" if request.drop_experts else "--allocation pmq"
    routed = {m.tensor for m in session.linear.matrices if m.routed}
    named = sorted(routed & wishes.wishes(session).fixed.keys())
    if named:
        raise UsageError("E217", f"--scheme names {named[0]}, but {option} chooses how experts are stored",
                         help="give patterns that leave experts out, such as 're:.*self_attn.*=W8A16'")  # fmt: skip
    _ = expert_menu(session)
    if not request.drop_experts:
        _check_granularity(session)


def _check_granularity(session: Session) -> None:
    form, wanted = session.form, session.request.granularity
    experts = experts_of(session.checkpoint)
    place = {
        t.name: (layer.index, t.expert, t.role == "down") for layer in experts.layers for t in layer.tensors
    }
    across = {"layers": False, "projections": False, "experts": False}
    for tie in expert_ties(session):
        for name, held in zip(
            ("layers", "experts", "projections"), zip(*(place[n] for n in tie), strict=True), strict=True
        ):
            across[name] |= len(set(held)) > 1
    who = f"{form.name} for {form.reader.runtime}" if form.folder else form.name
    if across["layers"]:
        raise UsageError("E488", f"{who} has one scheme for all experts of a model, so there is nothing to choose",
                         help="--format auto-round stores each expert by itself; for one width, name it with --scheme")  # fmt: skip
    if across["projections"] and wanted != "layer":
        raise UsageError("E488", f"--granularity {wanted}: {who} has one scheme for all experts of a layer",
                         help="--granularity layer")  # fmt: skip
    if across["experts"] and wanted == "expert":
        raise UsageError("E488", f"--granularity expert: {who} has one type for a projection of all experts of a layer",
                         help="--granularity projection, or layer")  # fmt: skip
