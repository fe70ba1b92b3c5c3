"""DeepSeek V3 and R1: V2 with a routing correction and layers that predict further tokens."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    PER_EXPERT_OR_FUSED,
    causal_head,
    decoder_outer,
    grouped,
    linear,
    norm,
)
from surgeon.architectures.latent_attention import EXPERTS, latent_layer, latent_sizes
from surgeon.architectures.rules import aliases_agree, expert_groups_fit, top_k_fits
from surgeon.architectures.settings import Settings

PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Layers after the last one, on disk but not read by every library: present completely or not at all."""


def _prediction_layers(settings: Settings) -> int:
    return settings.optional_integer(*PREDICTION_LAYERS, minimum=0) or 0


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    block = latent_layer(settings, index, correction_bias=True)
    if index < settings.integer("num_hidden_layers"):
        yield from block
        return
    yield from grouped(block, "prediction")
    yield from grouped(_prediction(), "prediction")


def _prediction() -> Iterator[Tensor]:
    yield from norm("enorm")
    yield from norm("hnorm")
    yield from linear("eh_proj", "hidden", "two_hidden", "prediction")
    yield from norm("shared_head.norm")
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding", optional=True)
    yield Tensor("shared_head.head.weight", ("vocab", "hidden"), "head", optional=True)


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
    extra_layers=_prediction_layers,
    rules=(top_k_fits(*EXPERTS), aliases_agree(*EXPERTS), expert_groups_fit),
)
