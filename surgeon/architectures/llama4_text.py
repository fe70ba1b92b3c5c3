"""The language model of Llama 4: stacked experts [in, out] whose inputs are scaled, beside a shared expert."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    attention,
    causal_head,
    decoder_outer,
    decoder_sizes,
    expert_sizes,
    gated_mlp,
    norm,
    router,
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


def _sizes(settings: Settings) -> dict[str, Size]:
    return (
        decoder_sizes(settings, dense=False)
        | expert_sizes(settings, EXPERTS, "intermediate_size")
        | {"ffn": settings.size("intermediate_size_mlp")}
    )


def _routed(settings: Settings, index: int) -> bool:
    """Say whether a layer holds experts; a list of such layers wins over the step."""
    if settings.get("moe_layers") is not None:
        return index in settings.integers("moe_layers")
    step = settings.integer("interleave_moe_layer_step")
    return (index + 1) % step == 0


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("post_attention_layernorm")
    path = "feed_forward"
    if not _routed(settings, index):
        yield from gated_mlp(path)
        return
    yield router(f"{path}.router.weight")
    yield Tensor(f"{path}.experts.gate_up_proj", ("experts", "hidden", "expert_gate_up"), "expert_gate_up")
    yield Tensor(f"{path}.experts.down_proj", ("experts", "expert_ffn", "hidden"), "expert_down")
    yield from gated_mlp(f"{path}.shared_expert", "expert_ffn", "shared_expert")


ARCHITECTURE = Architecture(
    model_type="llama4_text",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    expert_layer_keys=("moe_layers", "interleave_moe_layer_step"),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        layer_lists_fit,
    ),
    only_depth="no key of the others sizes its dense layers alone",
)
