"""MiniMax-M2: Mixtral's expert names, sigmoid routing with a correction that lies beside the router."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    PER_EXPERT_OR_FUSED,
    attention,
    causal_head,
    decoder_outer,
    decoder_sizes,
    expert_sizes,
    experts,
    norm,
    router,
)
from surgeon.architectures.rules import aliases_agree, key_values_divide_heads, top_k_fits
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_local_experts", "num_experts")


def _sizes(settings: Settings) -> dict[str, Size]:
    return decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")


def _routing(path: str) -> tuple[Tensor, ...]:
    correction = Tensor(f"{path}.e_score_correction_bias", ("experts",), "router_correction")
    return (router(f"{path}.gate.weight"), correction)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention()
    yield from norm("self_attn.q_norm", "query")
    yield from norm("self_attn.k_norm", "key_value")
    yield from norm("post_attention_layernorm")
    yield Alternatives((_routing("block_sparse_moe"), _routing("mlp")))
    yield experts("block_sparse_moe.experts", gate="w1", up="w3", down="w2", fused="mlp.experts")


ARCHITECTURE = Architecture(
    model_type="minimax_m2",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    rules=(key_values_divide_heads, top_k_fits(*EXPERTS), aliases_agree(*EXPERTS)),
)
