"""OLMoE: routed experts in every layer, queries and keys normalised over all heads at once."""

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


def _sizes(settings: Settings) -> dict[str, Size]:
    return decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("self_attn.q_norm", "query")
    yield from norm("self_attn.k_norm", "key_value")
    yield from norm("post_attention_layernorm")
    yield router()
    yield experts()


ARCHITECTURE = Architecture(
    model_type="olmoe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={"num_experts": 64, "num_experts_per_tok": 8},
    rules=(heads_divide_hidden(), key_values_divide_heads, top_k_fits(*EXPERTS), aliases_agree(*EXPERTS)),
)
