"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside a gated shared expert."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part, Tensor
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
    heads_divide_hidden,
    key_values_divide_heads,
    layer_lists_fit,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size


def _sizes(settings: Settings) -> dict[str, Size]:
    return (
        decoder_sizes(settings)
        | expert_sizes(settings, ("num_experts",), "moe_intermediate_size")
        | {"shared_ffn": settings.size("shared_expert_intermediate_size")}
    )


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("qkv_bias"), output_bias=False)
    yield from norm("post_attention_layernorm")
    if not sparse_by_step(settings, index):
        yield from gated_mlp()
        return
    yield router()
    yield experts()
    yield from gated_mlp("mlp.shared_expert", "shared_ffn", "shared_expert")
    yield Tensor("mlp.shared_expert_gate.weight", ("one", "hidden"), "shared_expert_router")


ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
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
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    rules=(heads_divide_hidden(), key_values_divide_heads, top_k_fits("num_experts"), layer_lists_fit),
)
