"""Granite 4: Mamba 2 and attention layers, each before routed experts (or none) and a shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from surgeon.architectures import granitemoe
from surgeon.architectures.base import Part
from surgeon.architectures.blocks import attention, decoder_sizes, norm, product, quotient
from surgeon.architectures.granitemoeshared import shared_expert, shared_sizes
from surgeon.architectures.hybrid import FULL, LINEAR, kind_of, kinds_are, mamba2, mamba2_sizes
from surgeon.architectures.rules import layer_lists_fit
from surgeon.architectures.settings import Settings, Size


def _sizes(settings: Settings) -> dict[str, Size]:
    routed = settings.optional_integer("num_local_experts", minimum=0)
    sizes = granitemoe.sizes(settings) if routed else decoder_sizes(settings)
    heads = settings.size("mamba_n_heads")
    if settings.get("mamba_d_head") == "auto":
        width = quotient(product(settings.size("mamba_expand"), sizes["hidden"]), heads)
    else:
        width = settings.size("mamba_d_head")
    groups, state = settings.size("mamba_n_groups"), settings.size("mamba_d_state")
    return sizes | shared_sizes(settings) | mamba2_sizes(heads, width, groups, state, settings.size("mamba_d_conv"))  # fmt: skip


def _mixer_fits(settings: Settings) -> str | None:
    """The heads of Mamba 2 fill mamba_expand times the residual stream."""
    heads, width = settings.optional_integer("mamba_n_heads"), settings.get("mamba_d_head")
    hidden, expand = settings.optional_integer("hidden_size"), settings.optional_integer("mamba_expand")
    if heads is None or hidden is None or expand is None or type(width) is not int:
        return None
    if heads * width == expand * hidden:
        return None
    return (
        f"mamba_n_heads = {heads} of mamba_d_head = {width} are not mamba_expand = {expand} times "
        f"hidden_size = {hidden}"
    )


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    if kind_of(settings, index) == FULL:
        yield from attention(bias=settings.flag("attention_bias"))
    else:
        yield from mamba2("mamba", settings.flag("mamba_proj_bias"), settings.flag("mamba_conv_bias"))
    yield from norm("post_attention_layernorm")
    if settings.optional_integer("num_local_experts", minimum=0):
        yield granitemoe.stacked_experts()
    yield from shared_expert(settings)


ARCHITECTURE = replace(
    granitemoe.ARCHITECTURE,
    model_type="granitemoehybrid",
    sizes=_sizes,
    layer=_layer,
    defaults={
        **granitemoe.ARCHITECTURE.defaults,
        "shared_intermediate_size": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_head": 64,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
    },
    rules=(
        *granitemoe.ARCHITECTURE.rules,
        layer_lists_fit,
        kinds_are(FULL, LINEAR),
        _mixer_fits,
    ),
    only_depth="its Mamba layers take their width from hidden_size",
)
