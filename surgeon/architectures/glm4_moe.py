"""GLM-4.5 and later: grouped-query attention before DeepSeek V3's routing, and layers that predict further tokens."""

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
    product,
    router,
)
from surgeon.architectures.prediction import predicting, prediction_layers
from surgeon.architectures.rules import (
    aliases_agree,
    expert_groups_fit,
    heads_divide_hidden,
    key_values_divide_heads,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "moe_intermediate_size")
    hidden = sizes["hidden"]
    sizes["two_hidden"] = Size(2 * hidden.value, hidden.keys)
    sizes["shared_ffn"] = product(settings.size("n_shared_experts", minimum=0), sizes["expert_ffn"])
    return sizes


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    return predicting(settings, index, _block(settings, index))


def _block(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"), output_bias=False)
    if settings.flag("use_qk_norm"):
        yield from norm("self_attn.q_norm", "head_dim")
        yield from norm("self_attn.k_norm", "head_dim")
    yield from norm("post_attention_layernorm")
    if index < settings.integer("first_k_dense_replace", minimum=0):
        yield from gated_mlp()
        return
    yield router()
    yield Tensor("mlp.gate.e_score_correction_bias", ("experts",), "router_correction")
    yield experts()
    yield from gated_mlp("mlp.shared_experts", "shared_ffn", "shared_expert")


ARCHITECTURE = Architecture(
    model_type="glm4_moe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("first_k_dense_replace",),
    defaults={
        "num_key_value_heads": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
    },
    extra_layers=prediction_layers,
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        expert_groups_fit,
    ),
)
