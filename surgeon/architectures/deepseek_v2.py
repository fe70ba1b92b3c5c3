"""DeepSeek V2 and V2-Lite: latent attention, routed and shared experts."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part
from surgeon.architectures.blocks import CAUSAL_TIES, PER_EXPERT_OR_FUSED, causal_head, decoder_outer
from surgeon.architectures.latent_attention import EXPERTS, latent_layer, latent_sizes
from surgeon.architectures.rules import (
    aliases_agree,
    expert_groups_fit,
    heads_divide_hidden,
    top_k_fits,
)
from surgeon.architectures.settings import Settings


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from latent_layer(settings, index, mlp_bias=settings.flag("mlp_bias"))


ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    prefix="model.",
    stack="layers",
    sizes=latent_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("first_k_dense_replace",),
    defaults={
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 1407,
    },
    rules=(heads_divide_hidden(), top_k_fits(*EXPERTS), aliases_agree(*EXPERTS), expert_groups_fit),
)
