"""Phi-3.5-MoE: Mixtral's tensors, with layer norms that have a shift."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    PER_EXPERT_OR_FUSED,
    attention,
    causal_head,
    decoder_sizes,
    expert_sizes,
    experts,
    norm,
    router,
)
from surgeon.architectures.rules import heads_divide_hidden, key_values_divide_heads, top_k_fits
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_local_experts",)


def _sizes(settings: Settings) -> dict[str, Size]:
    return decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")


def _outer(settings: Settings) -> Iterator[Tensor]:
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding")
    yield from norm("norm", bias=True)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm", bias=True)
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("post_attention_layernorm", bias=True)
    yield experts("block_sparse_moe.experts", gate="w1", up="w3", down="w2", fused="mlp.experts")
    yield Alternatives(((router("block_sparse_moe.gate.weight"),), (router("mlp.router.weight"),)))


def _head(settings: Settings) -> Iterator[Tensor]:
    yield from causal_head(settings)
    name = settings.model_class()
    if settings.flag("lm_head_bias") and (name.endswith("ForCausalLM") or not name):
        yield Tensor("lm_head.bias", ("vocab",), "head_bias", optional=not name)


ARCHITECTURE = Architecture(
    model_type="phimoe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={"num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2},
    rules=(heads_divide_hidden(), key_values_divide_heads, top_k_fits(*EXPERTS)),
)
