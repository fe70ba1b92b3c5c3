"""Tensor names as every checkpoint writes them: which layer of which stack a name belongs to.

Nothing here knows a model family. A layer number is the first integer component that
directly follows a container word (``layers``, ``h``, ``blocks`` ...), so expert numbers such
as the 3 in ``model.layers.0.mlp.experts.3.w1.weight`` are never taken for layers.

The configuration side of the same question (how many layers, which keys list them) is in
``layered_config``; its three functions are importable from here as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.architectures.layered_config import num_layers, per_layer_lists, relayer_config

__all__ = [
    "LayerName",
    "is_auxiliary",
    "layer_of",
    "main_stack",
    "num_layers",
    "per_layer_lists",
    "relayer",
    "relayer_config",
    "stacks",
]

CONTAINERS = frozenset(
    {
        "layers",
        "layer",
        "h",
        "blocks",
        "block",
        "resblocks",
        "encoder_layers",
        "decoder_layers",
        "transformer_layers",
    }
)
"""Module names that hold numbered layers."""

AUXILIARY = frozenset(
    {
        "adapter",
        "aligner",
        "audio",
        "audio_encoder",
        "audio_tower",
        "connector",
        "image_encoder",
        "merger",
        "mm_projector",
        "mtp",
        "multi_modal_projector",
        "projector",
        "resampler",
        "speech_encoder",
        "vision",
        "vision_encoder",
        "vision_model",
        "vision_tower",
        "visual",
    }
)
"""Module names that mark a stack beside the language model."""

LONGEST_NUMBER = 6
"""Digits a layer number may have; a longer one is part of some other scheme (or hostile)."""


@dataclass(frozen=True, order=True)
class LayerName:
    """One tensor name taken apart: ``{stack}.{index}.{rest}``.

    Attributes:
        stack: everything before the layer number, such as "model.layers".
        index: the layer number.
        rest: everything after it, such as "self_attn.q_proj.weight"; may be empty.
    """

    stack: str
    index: int
    rest: str

    def __str__(self) -> str:
        return f"{self.stack}.{self.index}.{self.rest}" if self.rest else f"{self.stack}.{self.index}"


def layer_of(name: str) -> LayerName | None:
    """Return the layer a tensor belongs to, or None for a tensor outside all stacks."""
    parts = name.split(".")
    for at in range(1, len(parts)):
        if parts[at - 1] in CONTAINERS and _is_number(parts[at]):
            return LayerName(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))
    return None


def relayer(name: str, new_index: int) -> str:
    """Return the name with its layer number replaced.

    Raises:
        ValueError: the name has no layer number, or the new one is negative.
    """
    place = layer_of(name)
    if place is None:
        raise ValueError(f"{name!r} has no layer number")
    if new_index < 0:
        raise ValueError(f"a layer number cannot be {new_index}")
    return str(LayerName(place.stack, new_index, place.rest))


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Return every stack of layers with its length, sorted by name.

    The length is the highest layer number plus one, so a missing layer in the middle does
    not make a stack look shorter than it is.
    """
    found: dict[str, int] = {}
    for name in names:
        place = layer_of(name)
        if place is not None:
            found[place.stack] = max(found.get(place.stack, 0), place.index + 1)
    return dict(sorted(found.items()))


def main_stack(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Return the stack of language-model layers that the configuration counts, or None.

    Stacks whose length is the configured number of layers come first, text before vision,
    then the longest, then alphabetical order. When none has that length, the only stack
    beside vision, audio and the like is returned, so that a wrong number can be reported
    against it; with several such stacks, or without any, the answer is None.
    """
    found = stacks(names)
    expected = num_layers(config)
    text = {stack: length for stack, length in found.items() if not is_auxiliary(stack)}
    for candidates in (text, found):
        matching = [stack for stack, length in candidates.items() if length == expected]
        if matching:
            return matching[0]
    if len(text) == 1:
        return next(iter(text))
    return None


def is_auxiliary(stack: str) -> bool:
    """Say whether a stack (or tensor name) lies in a vision, audio, projector or similar module."""
    return any(part in AUXILIARY for part in stack.split("."))


def _is_number(part: str) -> bool:
    """Say whether a component is a plain layer number: ASCII digits without leading zeros."""
    return (
        len(part) <= LONGEST_NUMBER
        and part.isascii()
        and part.isdigit()
        and (part == "0" or not part.startswith("0"))
    )
