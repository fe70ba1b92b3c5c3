"""Are base and long model swapped? The most common mistake in long-to-short merging, seen from the configs.

The base is the short model there: the long one's differences are added to it. A base that has
more context than every other model, or the only one that marks its thinking, is probably the long one.
Where a shortened model is merged onto the long one it came from (DLER, CoT-Valve), both have the same
context and the same template, and nothing is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.companions import GENERATION_FILE, read_chat_templates, read_generation_config
from surgeon.merge.context import context_length

MARKER = re.compile(
    r"</?think(ing)?>|◁/?think▷|<\|?/?(begin_of_|end_of_)?(thought|reasoning)\|?>|\[/?THINK\]|"
    r"\b(enable_thinking|thinking_budget|reasoning_content|reasoning_effort)\b"
)
"""What chat templates and generation settings of models that reason at length contain."""


@dataclass(frozen=True)
class Role:
    """What tells a long model from a short one.

    Attributes:
        label: how messages name the model.
        context: positions its config allows, None when it does not say.
        marker: (the marker, the file it was found in), None without one.
    """

    label: str
    context: int | None = None
    marker: tuple[str, str] | None = None


def read_role(checkpoint: Checkpoint) -> Role:
    """Read a model's config, chat templates and generation settings.

    Raises:
        InputError: E308 a file is broken.
    """
    context = context_length(checkpoint.config or {})
    folder = checkpoint.folder
    if folder is None:
        return Role(checkpoint.label, context)
    templates = read_chat_templates(folder)
    return Role(
        checkpoint.label, context,
        find_marker([templates.default or "", *templates.named.values()], read_generation_config(folder)),
    )  # fmt: skip


def find_marker(templates: Sequence[str], generation: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Return the first marker of thinking and where it stands, None when there is none."""
    for text, place in [
        *((t, "chat template") for t in templates),
        (json.dumps(generation or {}), GENERATION_FILE),
    ]:
        found = MARKER.search(text)
        if found:
            return found[0], place
    return None


def suspicious_roles(base: Role, others: Sequence[Role]) -> list[str]:
    """Return a warning when the base looks like the long model of a long-to-short merge.

    Args:
        base: the model that differences are added to.
        others: the models they come from.
    """
    reasons = []
    contexts = [other.context for other in others if other.context is not None]
    if base.context is not None and contexts and base.context > max(contexts):
        reasons.append(f"has the longest context ({base.context:,} positions, {max(contexts):,} elsewhere)")
    if base.marker is not None and others and all(other.marker is None for other in others):
        reasons.append(
            f"is the only one with a marker of thinking ({base.marker[0]} in its {base.marker[1]})"
        )
    if not reasons:
        return []
    return [
        f"{base.label} is the base here, but {' and '.join(reasons)}: for a long-to-short merge the base is the short "
        "model (the last one without --base); the two may be swapped"
    ]
