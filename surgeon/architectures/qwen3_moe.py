"""Qwen3-MoE: routed experts without a shared one; the expert count has two names."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    PER_EXPERT_OR_FUSED,
    attention,
    causal_head,
    decoder_outer,
    decoder_sizes,
    expert_sizes,
    experts,
    gated_mlp,
    norm,
    router,
    sparse_by_step,
)
from surgeon.architectures.rules import (
    aliases_agree,
    heads_divide_hidden,
    key_values_divide_heads,
    layer_lists_fit,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_local_experts", "num_experts")
"""Newer files write the first; where both are present, readers silently believe the first."""


def _sizes(settings: Settings) -> dict[str, Size]:
    return decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "moe_intermediate_size")


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("self_attn.q_norm", "head_dim")
    yield from norm("self_attn.k_norm", "head_dim")
    yield from norm("post_attention_layernorm")
    if not sparse_by_step(settings, index):
        yield from gated_mlp()
        return
    yield router()
    yield experts()


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("decoder_sparse_step", "mlp_only_layers"),
    defaults={
        "num_key_value_heads": 4,
        "decoder_sparse_step": 1,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        layer_lists_fit,
    ),
)
