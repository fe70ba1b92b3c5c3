"""LFM2-MoE: short gated convolutions and attention in turns; the first layers have a dense MLP."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    PER_EXPERT_OR_FUSED,
    attention,
    causal_head,
    decoder_sizes,
    expert_sizes,
    experts,
    linear,
    norm,
    router,
)
from surgeon.architectures.hybrid import FULL, convolution, kind_of, kinds_are
from surgeon.architectures.rules import (
    aliases_agree,
    heads_divide_hidden,
    key_values_divide_heads,
    layer_lists_fit,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_experts", "num_local_experts")


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "moe_intermediate_size")
    hidden = sizes["hidden"]
    return sizes | {
        "three_hidden": Size(3 * hidden.value, hidden.keys),
        "taps": settings.size("conv_L_cache"),
    }


def _outer(settings: Settings) -> Iterator[Tensor]:
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding")
    yield from norm("embedding_norm")


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("operator_norm")
    if kind_of(settings, index) == FULL:
        yield from attention(output="out_proj")
        yield from norm("self_attn.q_layernorm", "head_dim")
        yield from norm("self_attn.k_layernorm", "head_dim")
    else:
        bias = settings.flag("conv_bias")
        yield from convolution("conv.conv", "hidden", bias)
        yield from linear("conv.in_proj", "three_hidden", "hidden", "mixer_in", bias)
        yield from linear("conv.out_proj", "hidden", "hidden", "mixer_o", bias)
    yield from norm("ffn_norm")
    if index < settings.integer("num_dense_layers", minimum=0):
        yield from linear("feed_forward.w1", "ffn", "hidden", "ffn_gate")
        yield from linear("feed_forward.w3", "ffn", "hidden", "ffn_up")
        yield from linear("feed_forward.w2", "hidden", "ffn", "ffn_down")
        return
    yield router("feed_forward.gate.weight")
    if settings.flag("use_expert_bias"):
        yield Tensor("feed_forward.expert_bias", ("experts",), "router_correction")
    path = "feed_forward.experts"
    yield experts(path, gate="w1", up="w3", down="w2", fused=path)


ARCHITECTURE = Architecture(
    model_type="lfm2_moe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=True,
    tie_keys=("tie_embedding", "tie_word_embeddings"),
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("num_dense_layers",),
    defaults={
        "num_key_value_heads": 8,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
        "conv_L_cache": 3,
    },
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        layer_lists_fit,
        kinds_are(FULL, "conv"),
    ),
    branch_norms=(("operator_norm",), ("ffn_norm",)),
    only_depth="its convolutions are as wide as the residual stream and its dense layers have other names",
)
