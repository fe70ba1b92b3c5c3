"""The language model of Qwen3.5-MoE: Qwen3-Next with separate projections in its delta nets, experts everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures import qwen3_next
from surgeon.architectures.base import Architecture, Part
from surgeon.architectures.blocks import CAUSAL_TIES, PER_EXPERT_OR_FUSED, decoder_outer, norm
from surgeon.architectures.hybrid import FULL, LINEAR, delta_net, kind_of, kinds_are
from surgeon.architectures.rules import key_values_divide_heads, layer_lists_fit, top_k_fits
from surgeon.architectures.settings import Settings, Size


def _sizes(settings: Settings) -> dict[str, Size]:
    return qwen3_next.sizes(settings, dense=False)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    if kind_of(settings, index) == LINEAR:
        yield from delta_net("linear_attn", together=False)
    else:
        yield from qwen3_next.gated_attention(settings)
    yield from norm("post_attention_layernorm")
    yield from qwen3_next.routed_experts()


ARCHITECTURE = Architecture(
    model_type="qwen3_5_moe_text",
    offset_norms=qwen3_next.OFFSET_NORMS,
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=qwen3_next.head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    rules=(
        key_values_divide_heads,
        top_k_fits(*qwen3_next.EXPERTS),
        layer_lists_fit,
        kinds_are(FULL, LINEAR),
    ),
    only_depth=qwen3_next.ONLY_DEPTH,
)
