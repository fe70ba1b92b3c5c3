"""Llama: pre-norm decoder with grouped queries and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    attention,
    causal_head,
    decoder_outer,
    decoder_sizes,
    gated_mlp,
    norm,
)
from surgeon.architectures.rules import heads_divide_hidden, key_values_divide_heads
from surgeon.architectures.settings import Settings


def _layer(settings: Settings, index: int) -> Iterator[Tensor]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("post_attention_layernorm")
    yield from gated_mlp(bias=settings.flag("mlp_bias"))


ARCHITECTURE = Architecture(
    model_type="llama",
    prefix="model.",
    stack="layers",
    sizes=decoder_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    rules=(heads_divide_hidden(), key_values_divide_heads),
)
