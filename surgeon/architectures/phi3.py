"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in another."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    causal_head,
    decoder_outer,
    decoder_sizes,
    linear,
    norm,
    total,
    twice,
)
from surgeon.architectures.rules import heads_divide_hidden, key_values_divide_heads
from surgeon.architectures.settings import Settings, Size


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings)
    return sizes | {"query_key_value": total(sizes["query"], twice(sizes["key_value"]))}


def _layer(settings: Settings, index: int) -> Iterator[Tensor]:
    yield from norm("input_layernorm")
    yield from linear("self_attn.qkv_proj", "query_key_value", "hidden", "attention_qkv")
    yield from linear("self_attn.o_proj", "hidden", "query", "attention_o")
    yield Tensor("self_attn.rotary_emb.inv_freq", None, "buffer", optional=True)
    yield from norm("post_attention_layernorm")
    yield from linear("mlp.gate_up_proj", "gate_up", "hidden", "ffn_gate_up")
    yield from linear("mlp.down_proj", "hidden", "ffn", "ffn_down")


ARCHITECTURE = Architecture(
    model_type="phi3",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    rules=(heads_divide_hidden(), key_values_divide_heads),
)
