"""What no measurement makes possible, refused before the model is run: a cut that no reader loads, weights that cannot be read."""

from __future__ import annotations

import numpy as np

from surgeon.experts.select import select
from surgeon.prune.experts import decide
from surgeon.prune.experts.request import MERGING
from surgeon.prune.experts.session import ExpertSession
from surgeon.prune.request import Target
from surgeon.structure.experts.view import ExpertView
from surgeon.structure.experts.weights import refuse_quantized


def check(session: ExpertSession, target: Target | None) -> None:
    """Refuse a target that cannot be met, whatever a pass over text would show; None is that of a report.

    Raises:
        UsageError: E239, E243, E248, E258; InputError: E349, E404, E426, E435, E437, E442, E444, E408 an unusable report.
    """
    if target is None:
        ExpertView(session.checkpoint, session.experts, decide.reported(session).cut)
    elif session.request.method == "heapr":
        from surgeon.prune.experts import channels

        channels.check(session, target)
    else:
        keep = decide.keep_count(session, target)
        decide.view_of(session, keep)
        _protected_fit(session, keep)
        if session.request.method in MERGING:
            _mergeable(session, keep)
        if session.request.method == "naee":
            from surgeon.prune.experts.subsets import refuse_weighted_inputs

            refuse_weighted_inputs(session.experts)


def _protected_fit(session: ExpertSession, keep: int) -> None:
    """Refuse more experts named by the user than may stay; super experts are known only after a pass."""
    nothing = np.zeros(session.experts.count)
    for layer, ids in session.named.items():
        select(nothing, nothing, keep, groups=session.experts.groups, protected=ids, where=f"layer {layer}")


def _mergeable(session: ExpertSession, keep: int) -> None:
    """Refuse weights that cannot be averaged or compared, and a router row the family cannot have."""
    from surgeon.prune.experts.merged import check_router
    from surgeon.prune.experts.stun import AVERAGED

    for layer in session.experts.running:
        refuse_quantized(session.checkpoint, layer)
    router = session.request.router
    if router is not None and (session.request.method != "stun" or keep <= AVERAGED):
        check_router(router, session.experts.running)
