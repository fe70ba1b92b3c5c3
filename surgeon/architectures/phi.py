"""Phi-1, Phi-1.5 and Phi-2: parallel attention and MLP after one norm, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    attention,
    causal_head,
    decoder_sizes,
    linear,
    norm,
)
from surgeon.architectures.rules import heads_divide_hidden, key_values_divide_heads
from surgeon.architectures.settings import Settings


def _outer(settings: Settings) -> Iterator[Tensor]:
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding")
    yield from norm("final_layernorm", bias=True)
    yield Tensor("rotary_emb.inv_freq", None, "buffer", optional=True)


def _layer(settings: Settings, index: int) -> Iterator[Tensor]:
    yield from norm("input_layernorm", bias=True)
    yield from attention(bias=True, output="dense")
    if settings.flag("qk_layernorm"):
        yield from norm("self_attn.q_layernorm", "head_dim", bias=True)
        yield from norm("self_attn.k_layernorm", "head_dim", bias=True)
    yield from linear("mlp.fc1", "ffn", "hidden", "ffn_up", bias=True)
    yield from linear("mlp.fc2", "hidden", "ffn", "ffn_down", bias=True)


def _head(settings: Settings) -> Iterator[Tensor]:
    for tensor in causal_head(settings):
        yield tensor
        if tensor.name == "lm_head.weight":
            yield Tensor("lm_head.bias", ("vocab",), "head_bias", optional=tensor.optional)


ARCHITECTURE = Architecture(
    model_type="phi",
    prefix="model.",
    stack="layers",
    sizes=decoder_sizes,
    outer=_outer,
    layer=_layer,
    head=_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    rules=(heads_divide_hidden(), key_values_divide_heads),
    branch_norms=((), ()),  # one norm feeds both
)
