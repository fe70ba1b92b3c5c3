"""Qwen3: queries and keys are normalised per head, and head_dim is a size of its own."""

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
from surgeon.architectures.rules import heads_divide_hidden, key_values_divide_heads, layer_lists_fit
from surgeon.architectures.settings import Settings


def _layer(settings: Settings, index: int) -> Iterator[Tensor]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("self_attn.q_norm", "head_dim")
    yield from norm("self_attn.k_norm", "head_dim")
    yield from norm("post_attention_layernorm")
    yield from gated_mlp()


ARCHITECTURE = Architecture(
    model_type="qwen3",
    prefix="model.",
    stack="layers",
    sizes=decoder_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    rules=(heads_divide_hidden(), key_values_divide_heads, layer_lists_fit),
)
