"""Gemma 3, the text model: Gemma 2 with normalised queries and keys."""

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
    yield from norm("pre_feedforward_layernorm")
    yield from gated_mlp()
    yield from norm("post_feedforward_layernorm")


ARCHITECTURE = Architecture(
    model_type="gemma3_text",
    offset_norms="norm",
    prefix="model.",
    stack="layers",
    sizes=decoder_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=True,
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    rules=(heads_divide_hidden(), key_values_divide_heads, layer_lists_fit),
    branch_norms=(
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
)
