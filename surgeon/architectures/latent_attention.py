"""What DeepSeek V2 and V3 share: attention through a latent, and which layers hold experts."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Part, Tensor
from surgeon.architectures.blocks import (
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
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def latent_sizes(settings: Settings) -> dict[str, Size]:
    """Return the sizes of a model with latent attention and routed experts.

    Queries and keys have a part with and a part without position; values have a width of
    their own. Keys and values are expanded from kv_lora_rank numbers a token.
    """
    hidden = settings.size("hidden_size")
    heads = settings.size("num_attention_heads")
    rope = settings.size("qk_rope_head_dim")
    plain = settings.size("qk_nope_head_dim")
    value = settings.size("v_head_dim")
    latent = settings.size("kv_lora_rank")
    sizes = {
        "vocab": settings.size("vocab_size"),
        "hidden": hidden,
        "two_hidden": Size(2 * hidden.value, hidden.keys),
        "ffn": settings.size("intermediate_size"),
        "query": product(heads, total(plain, rope)),
        "output": product(heads, value),
        "latent": latent,
        "latent_rope": total(latent, rope),
        "key_value": product(heads, total(plain, value)),
    }
    if settings.get("q_lora_rank") is not None:
        sizes["query_latent"] = settings.size("q_lora_rank")
    sizes |= expert_sizes(settings, EXPERTS, "moe_intermediate_size") | labels(settings)
    if settings.optional_integer("n_shared_experts", minimum=0):
        sizes["shared_ffn"] = product(settings.size("n_shared_experts"), sizes["expert_ffn"])
    return sizes


def latent_attention(settings: Settings) -> Iterator[Tensor]:
    """Yield the projections of latent attention; queries go through a latent where q_lora_rank is set."""
    bias = settings.flag("attention_bias")
    if settings.get("q_lora_rank") is None:
        yield from linear("self_attn.q_proj", "query", "hidden", "attention_q")
    else:
        yield from linear("self_attn.q_a_proj", "query_latent", "hidden", "attention_q_down", bias)
        yield from norm("self_attn.q_a_layernorm", "query_latent")
        yield from linear("self_attn.q_b_proj", "query", "query_latent", "attention_q_up")
    yield from linear("self_attn.kv_a_proj_with_mqa", "latent_rope", "hidden", "attention_kv_down", bias)
    yield from norm("self_attn.kv_a_layernorm", "latent")
    yield from linear("self_attn.kv_b_proj", "key_value", "latent", "attention_kv_up")
    yield from linear("self_attn.o_proj", "hidden", "output", "attention_o", bias)
    yield Tensor("self_attn.rotary_emb.inv_freq", None, "buffer", optional=True)


def latent_layer(
    settings: Settings, index: int, mlp_bias: bool = False, correction_bias: bool = False
) -> Iterator[Part]:
    """Yield one decoder layer; the first first_k_dense_replace layers have a dense MLP."""
    yield from norm("input_layernorm")
    yield from latent_attention(settings)
    yield from norm("post_attention_layernorm")
    if index < settings.integer("first_k_dense_replace", minimum=0):
        yield from gated_mlp(bias=mlp_bias)
        return
    yield router()
    if correction_bias:
        yield Tensor("mlp.gate.e_score_correction_bias", ("experts",), "router_correction")
    yield experts()
    if settings.optional_integer("n_shared_experts", minimum=0):
        yield from gated_mlp("mlp.shared_experts", "shared_ffn", "shared_expert", bias=mlp_bias)
