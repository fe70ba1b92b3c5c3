"""Llama 4 with its vision model: the language model lies inside under names of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from surgeon.architectures import llama4_text
from surgeon.architectures.base import Part, Tensor
from surgeon.architectures.settings import Settings

INSIDE = "language_model."


def _head(settings: Settings) -> Iterator[Part]:
    for part in llama4_text.ARCHITECTURE.head(settings):
        assert isinstance(part, Tensor)  # the head has one storage
        yield replace(part, name=INSIDE + part.name)


ARCHITECTURE = replace(
    llama4_text.ARCHITECTURE,
    model_type="llama4",
    prefix=f"{INSIDE}model.",
    head=_head,
    ties=(("{prefix}embed_tokens.weight", f"{INSIDE}lm_head.weight"),),
    section="text_config",
    beside=("vision_model.", "multi_modal_projector."),
)
