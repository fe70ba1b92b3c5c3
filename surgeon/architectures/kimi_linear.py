"""Kimi Linear: Kimi delta attention and latent attention in turns, routing as in DeepSeek V3."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    causal_head,
    decoder_outer,
    expert_sizes,
    experts,
    gated_mlp,
    labels,
    linear,
    norm,
    product,
    router,
    total,
)
from surgeon.architectures.hybrid import FULL, LINEAR, kind_of, kinds_are
from surgeon.architectures.latent_attention import latent_attention
from surgeon.architectures.rules import aliases_agree, expert_groups, layer_lists_fit, top_k_fits
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SHARED = ("num_shared_experts", "n_shared_experts")
TOP_K = ("num_experts_per_token", "num_experts_per_tok")
GROUPS = ("num_expert_group", "n_group")

LINEAR_KEYS = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
"""Sizes of Kimi delta attention, and their names inside linear_attn_config, which win."""


def _linear_size(settings: Settings, key: str) -> Size:
    nested = settings.get("linear_attn_config")
    if isinstance(nested, dict) and LINEAR_KEYS[key] in nested:
        return Settings(nested).size(LINEAR_KEYS[key])
    return settings.size(key)


def _sizes(settings: Settings) -> dict[str, Size]:
    hidden, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    rope, plain = settings.size("qk_rope_head_dim"), settings.size("qk_nope_head_dim")
    value, latent = settings.size("v_head_dim"), settings.size("kv_lora_rank")
    delta_heads, delta_width = _linear_size(settings, "linear_num_heads"), _linear_size(settings, "linear_head_dim")  # fmt: skip
    sizes = {
        "vocab": settings.size("vocab_size"),
        "hidden": hidden,
        "ffn": settings.size("intermediate_size"),
        "query": product(heads, total(plain, rope)),
        "output": product(heads, value),
        "latent": latent,
        "latent_rope": total(latent, rope),
        "key_value": product(heads, total(plain, value)),
        "delta_heads": delta_heads,
        "delta_width": delta_width,
        "delta": product(delta_heads, delta_width),
        "taps": _linear_size(settings, "linear_conv_kernel_dim"),
        "one": Size(1, ()),
    }
    if settings.get("q_lora_rank") is not None:
        sizes["query_latent"] = settings.size("q_lora_rank")
    sizes |= expert_sizes(settings, EXPERTS, "moe_intermediate_size") | labels(settings)
    sizes["shared_ffn"] = product(settings.size(*SHARED), sizes["expert_ffn"])
    delta = sizes["delta"]
    return sizes | {"three_delta": Size(3 * delta.value, delta.keys)}


def _kind(settings: Settings, index: int) -> str:
    nested = settings.get("linear_attn_config")
    if settings.get("layer_types") is None and isinstance(nested, dict) and "full_attn_layers" in nested:
        return FULL if index + 1 in Settings(nested).integers("full_attn_layers") else LINEAR
    return kind_of(settings, index)


def _sparse(settings: Settings, index: int) -> bool:
    listed = settings.get("mlp_layer_types")
    if isinstance(listed, list) and index < len(listed):
        return listed[index] == "sparse"
    return index >= settings.integer("first_k_dense_replace", minimum=0)


def _delta_attention() -> Iterator[Part]:
    """Yield Kimi delta attention; the library keeps its gate in a module of its own and joins the convolutions."""
    path = "self_attn"
    for name in ("q", "k", "v"):
        yield from linear(f"{path}.{name}_proj", "delta", "hidden", "mixer_in")
    taps = ("delta", "one", "taps")
    apart = tuple(Tensor(f"{path}.{name}_conv1d.weight", taps, "mixer_conv") for name in ("q", "k", "v"))
    joined = (Tensor(f"{path}.conv1d.weight", ("three_delta", "one", "taps"), "mixer_conv"),)
    stored, memory = (_forget_gate(place) for place in (path, f"{path}.forget_gate"))
    yield Alternatives(((*apart, *stored), (*apart, *stored), (*joined, *memory)))
    yield from linear(f"{path}.b_proj", "delta_heads", "hidden", "mixer_in")
    yield from linear(f"{path}.g_a_proj", "delta_width", "hidden", "mixer_in")
    yield from linear(f"{path}.g_b_proj", "delta", "delta_width", "mixer_in")
    yield from norm(f"{path}.o_norm", "delta_width")
    yield from linear(f"{path}.o_proj", "hidden", "delta", "mixer_o")


def _forget_gate(path: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{path}.A_log", ("one", "one", "delta_heads", "one"), "mixer_state"),
        Tensor(f"{path}.dt_bias", ("delta",), "mixer_state"),
        *linear(f"{path}.f_a_proj", "delta_width", "hidden", "mixer_in"),
        *linear(f"{path}.f_b_proj", "delta", "delta_width", "mixer_in"),
    )


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    if _kind(settings, index) == FULL:
        yield from latent_attention(settings)
    else:
        yield from _delta_attention()
    yield from norm("post_attention_layernorm")
    if not _sparse(settings, index):
        # Published beside the experts' module; the library writes it under their name.
        yield Alternatives(tuple(tuple(gated_mlp(path)) for path in ("mlp", "block_sparse_moe", "mlp")))
        return
    path = "block_sparse_moe"
    stored, memory = _routing(path), _routing("mlp")
    yield Alternatives((stored, stored, memory))
    each, stacked = experts(f"{path}.experts", gate="w1", up="w3", down="w2").options
    yield Alternatives((each, each, stacked))


def _routing(path: str) -> tuple[Tensor, ...]:
    correction = Tensor(f"{path}.gate.e_score_correction_bias", ("experts",), "router_correction")
    shared = gated_mlp(f"{path}.shared_experts", "shared_ffn", "shared_expert")
    return (router(f"{path}.gate.weight"), correction, *shared)


ARCHITECTURE = Architecture(
    model_type="kimi_linear",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=(),
    default_tie=False,
    storages=("published", "as the library writes it", "fused"),
    expert_layer_keys=("mlp_layer_types", "first_k_dense_replace"),
    defaults={
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "num_expert_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 1024,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
        "first_k_dense_replace": 1,
    },
    rules=(
        top_k_fits(*EXPERTS, chosen_by=TOP_K),
        aliases_agree(*EXPERTS),
        expert_groups(EXPERTS, GROUPS, TOP_K),
        layer_lists_fit,
        kinds_are(FULL, LINEAR),
    ),
    only_depth="its linear attention has heads of its own",
)
