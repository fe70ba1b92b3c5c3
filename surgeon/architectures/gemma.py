"""Gemma: tied embeddings and a head_dim of its own."""

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
    yield from gated_mlp()


ARCHITECTURE = Architecture(
    model_type="gemma",
    offset_norms="norm",
    prefix="model.",
    stack="layers",
    sizes=decoder_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=True,
    defaults={"num_key_value_heads": 16, "head_dim": 256},
    rules=(heads_divide_hidden(), key_values_divide_heads),
)
