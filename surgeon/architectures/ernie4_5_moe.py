"""ERNIE 4.5: routed and shared experts in a range of layers; the routing correction has a leading axis of one."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part, Tensor
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
    linear,
    norm,
    product,
    router,
)
from surgeon.architectures.prediction import prediction_layers, under
from surgeon.architectures.rules import (
    aliases_agree,
    heads_divide_hidden,
    key_values_divide_heads,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("moe_num_experts", "num_experts", "num_local_experts")
TOP_K = ("moe_k", "num_experts_per_tok")


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "moe_intermediate_size")
    sizes["two_hidden"] = Size(2 * sizes["hidden"].value, sizes["hidden"].keys)
    if settings.optional_integer("moe_num_shared_experts", minimum=0):
        sizes["shared_ffn"] = product(settings.size("moe_num_shared_experts"), sizes["expert_ffn"])
    return sizes


def _routed(settings: Settings, index: int) -> bool:
    last = settings.get("moe_layer_end_index")
    if last in (None, -1):
        last = settings.integer("num_hidden_layers") - 1
    return (index + 1) % settings.integer("moe_layer_interval") == 0 and settings.integer(
        "moe_layer_start_index", minimum=0
    ) <= index <= last


def _outer(settings: Settings) -> Iterator[Part]:
    yield from decoder_outer(settings)
    for number in range(prediction_layers(settings)):
        yield from under(f"mtp_block.{number}", _dense(settings))
        for name in ("mtp_emb_norm", "mtp_hidden_norm"):
            yield from under(f"{name}.{number}", (Tensor("weight", ("hidden",), "norm"),))
        joint = linear(str(number), "hidden", "two_hidden", "prediction", settings.flag("use_bias"))
        yield from under("mtp_linear_proj", joint)


def _dense(settings: Settings) -> Iterator[Part]:
    bias = settings.flag("use_bias")
    yield from norm("input_layernorm")
    yield from attention(bias=bias)
    yield from norm("post_attention_layernorm")
    yield from gated_mlp(bias=bias)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    bias = settings.flag("use_bias")
    if not _routed(settings, index):
        yield from _dense(settings)
        return
    yield from norm("input_layernorm")
    yield from attention(bias=bias)
    yield from norm("post_attention_layernorm")
    yield router()
    name = "moe_statics.e_score_correction_bias"
    correction = ("one", "experts")
    yield Alternatives(
        (
            (Tensor(f"mlp.{name}", correction, "router_correction"),),
            (Tensor(f"mlp.gate.{name}", correction, "router_correction"),),
        )
    )
    yield experts()
    if settings.optional_integer("moe_num_shared_experts", minimum=0):
        yield from gated_mlp("mlp.shared_experts", "shared_ffn", "shared_expert", bias=bias)


def _head(settings: Settings) -> Iterator[Tensor]:
    yield from causal_head(settings)
    name = settings.model_class()
    if settings.flag("use_bias") and (name.endswith("ForCausalLM") or not name):
        yield Tensor("lm_head.bias", ("vocab",), "head_bias", optional=not name)


ARCHITECTURE = Architecture(
    model_type="ernie4_5_moe",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=_head,
    ties=CAUSAL_TIES,
    default_tie=True,
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
    defaults={
        "num_key_value_heads": 4,
        "moe_intermediate_size": 1536,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS, chosen_by=TOP_K),
        aliases_agree(*EXPERTS),
    ),
)
