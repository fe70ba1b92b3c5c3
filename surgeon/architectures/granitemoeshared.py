"""Granite MoE with a shared expert beside the routed ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from surgeon.architectures import granitemoe
from surgeon.architectures.base import Part
from surgeon.architectures.blocks import linear, twice
from surgeon.architectures.settings import Settings, Size


def shared_sizes(settings: Settings) -> dict[str, Size]:
    """Return the width of the shared expert; nothing where it is 0, which means that there is none."""
    if not settings.optional_integer("shared_intermediate_size", minimum=0):
        return {}
    width = settings.size("shared_intermediate_size")
    return {"shared_ffn": width, "shared_gate_up": twice(width)}


def shared_expert(settings: Settings) -> Iterator[Part]:
    """Yield the shared expert, gate and up in one matrix."""
    if settings.optional_integer("shared_intermediate_size", minimum=0):
        yield from linear("shared_mlp.input_linear", "shared_gate_up", "hidden", "shared_expert_gate_up")
        yield from linear("shared_mlp.output_linear", "hidden", "shared_ffn", "shared_expert_down")


def _sizes(settings: Settings) -> dict[str, Size]:
    return granitemoe.sizes(settings) | shared_sizes(settings)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from granitemoe.layer(settings, index)
    yield from shared_expert(settings)


ARCHITECTURE = replace(
    granitemoe.ARCHITECTURE,
    model_type="granitemoeshared",
    sizes=_sizes,
    layer=_layer,
    defaults={**granitemoe.ARCHITECTURE.defaults, "shared_intermediate_size": 0},
)
