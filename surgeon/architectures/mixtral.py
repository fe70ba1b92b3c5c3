"""Mixtral: every MLP is a set of routed experts, stored as w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part
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
from surgeon.architectures.rules import (
    aliases_agree,
    heads_divide_hidden,
    key_values_divide_heads,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_local_experts", "num_experts")


def _sizes(settings: Settings) -> dict[str, Size]:
    return decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention()
    yield from norm("post_attention_layernorm")
    yield experts("block_sparse_moe.experts", gate="w1", up="w3", down="w2", fused="mlp.experts")
    yield Alternatives(((router("block_sparse_moe.gate.weight"),), (router("mlp.gate.weight"),)))


ARCHITECTURE = Architecture(
    model_type="mixtral",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
    ),
)
