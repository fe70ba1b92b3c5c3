"""Context length: what a merged model takes from one input so that it can be served like it.

Positions and their scaling belong together: 131,072 positions without the YaRN factor that
reaches them, or the factor without the positions, make a model that fails beyond what it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgeon.traits import text_section

LENGTHS = ("max_position_embeddings", "n_positions", "model_max_length")
_NOT_SCALING = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
"""Keys beside a scaling: its name, and what must be equal in all models that are merged."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a config allows, None when it does not say."""
    section = text_section(config)
    found = (section.get(key) for key in LENGTHS)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a config's rope scaling as {rope_type, ...} whichever version wrote it, None for plain rope.

    Rope settings by kind of layer (Gemma 3) come back as they are.
    """
    section = text_section(config)
    nested = section.get("rope_parameters")
    given = nested if isinstance(nested, Mapping) else section.get("rope_scaling")
    if not isinstance(given, Mapping):
        return None
    if _by_layer(given):
        return dict(given)
    plain = {k: v for k, v in given.items() if k not in _NOT_SCALING}
    kind = given.get("rope_type", given.get("type")) or "default"
    return {"rope_type": kind, **plain} if kind != "default" or plain else None


def _by_layer(settings: Mapping[str, Any] | None) -> bool:
    return isinstance(settings, Mapping) and any(isinstance(v, Mapping) for v in settings.values())


def context_edits(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return edits (dotted path -> value) that give config ``ours`` the context of ``theirs``.

    Lengths, and the rope scaling in the spelling that ``ours`` uses; rope_theta and rope settings by
    kind of layer stay, because models that differ there are not merged.
    """
    section, other = text_section(ours), text_section(theirs)
    path = next((f"{key}." for key in ours if section is not ours and ours[key] is section), "")
    edits = {path + key: other[key] for key in LENGTHS if key in other and section.get(key) != other[key]}
    wanted, nested = scaling(theirs), section.get("rope_parameters")
    if wanted == scaling(ours) or _by_layer(wanted) or _by_layer(nested):
        return edits
    if isinstance(nested, Mapping):
        kept = {k: v for k, v in nested.items() if k in {"rope_theta", "partial_rotary_factor"}}
        edits[path + "rope_parameters"] = {**kept, **(wanted or {"rope_type": "default"})}
    else:
        edits[path + "rope_scaling"] = wanted
    return edits
