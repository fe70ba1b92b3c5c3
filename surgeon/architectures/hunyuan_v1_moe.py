"""Hunyuan-A13B: routed experts beside one shared MLP of the same width, queries and keys normalised per head."""

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
)
from surgeon.architectures.rules import (
    aliases_agree,
    heads_divide_hidden,
    key_values_divide_heads,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_experts", "num_local_experts")
TOP_K = ("moe_topk", "num_experts_per_tok")


def _sizes(settings: Settings) -> dict[str, Size]:
    return decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("self_attn.query_layernorm", "head_dim")
    yield from norm("self_attn.key_layernorm", "head_dim")
    yield from norm("post_attention_layernorm")
    yield router("mlp.gate.wg.weight")
    yield experts()
    yield from gated_mlp("mlp.shared_mlp", "expert_ffn", "shared_expert")


ARCHITECTURE = Architecture(
    model_type="hunyuan_v1_moe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={"num_experts": 1, "moe_topk": 1},
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS, chosen_by=TOP_K),
        aliases_agree(*EXPERTS),
    ),
)
