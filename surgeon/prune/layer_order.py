"""Rankings of layers for one session, kept in its work folder for later targets and runs."""

from __future__ import annotations

import json

from surgeon.errors import UsageError
from surgeon.prune import depth
from surgeon.prune.depth_ranking import DepthRanking
from surgeon.prune.session import Session


def ranked(session: Session, name: str, most: int | None) -> DepthRanking:
    """Return which layers go first, up to the first of those that are protected.

    Args:
        name: a depth criterion.
        most: layers that may have to go; None for as many as can.

    Raises:
        UsageError: E267 the first layer that would go is protected.
    """
    ranking = _all(session, name, most)
    protected = set(session.request.protect_layers)
    if not protected:
        return ranking
    first = next((k for k, drop in enumerate(ranking.drops) if protected & set(drop)), len(ranking.drops))
    if first < 2:
        raise UsageError("E267", f"{name} drops a layer of --protect-layers first",
                         help="protect other layers, or take another --criterion")  # fmt: skip
    return DepthRanking(ranking.method, ranking.layers, ranking.drops[:first], ranking.scores[:first],
                        ranking.importance, ranking.notes)  # fmt: skip


def _all(session: Session, name: str, most: int | None) -> DepthRanking:
    file = session.work / f"layers-{name}.json"
    try:
        kept = json.loads(file.read_bytes())
        ranking = DepthRanking.from_document(kept["ranking"])
        if kept["key"] == session.key and most is not None and len(ranking.drops) > most:
            return ranking
    except (OSError, ValueError, KeyError, TypeError):
        pass  # of another run, or damaged: ranked again
    chosen = depth.get(name)
    ranking = chosen.rank(
        session.source.checkpoint, list(session.texts.search) if chosen.needs_text else [], session.settings, drop=most,
        progress=lambda done, total: session.tell("ranking layers", done, total), stop=session.stop,
    )  # fmt: skip
    session.keep(file.name, {"key": session.key, "ranking": ranking.document()})
    return ranking
