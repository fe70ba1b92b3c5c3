"""DeepSeek V3 and R1: V2 with a routing correction and layers that predict further tokens."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part
from surgeon.architectures.blocks import CAUSAL_TIES, PER_EXPERT_OR_FUSED, causal_head, decoder_outer
from surgeon.architectures.latent_attention import EXPERTS, latent_layer, latent_sizes
from surgeon.architectures.prediction import predicting, prediction_layers
from surgeon.architectures.rules import aliases_agree, expert_groups_fit, top_k_fits
from surgeon.architectures.settings import Settings


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    return predicting(settings, index, latent_layer(settings, index, correction_bias=True))


ARCHITECTURE = Architecture(
    model_type="deepseek_v3",
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
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "num_nextn_predict_layers": 1,
    },
    extra_layers=prediction_layers,
    rules=(top_k_fits(*EXPERTS), aliases_agree(*EXPERTS), expert_groups_fit),
)
