"""Jamba: Mamba and attention in a fixed period, a dense MLP and routed experts in another."""

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
    gated_mlp,
    linear,
    norm,
    product,
    router,
    total,
)
from surgeon.architectures.hybrid import convolution
from surgeon.architectures.rules import (
    aliases_agree,
    heads_divide_hidden,
    key_values_divide_heads,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_experts", "num_local_experts")


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")
    inner = product(settings.size("mamba_expand"), sizes["hidden"])
    state = settings.size("mamba_d_state")
    if settings.get("mamba_dt_rank") == "auto":
        hidden = sizes["hidden"]
        rank = Size(-(-hidden.value // 16), hidden.keys)
    else:
        rank = settings.size("mamba_dt_rank")
    return sizes | {
        "mixer_inner": inner,
        "mixer_in": Size(2 * inner.value, inner.keys),
        "state": state,
        "time_rank": rank,
        "time_and_state": total(rank, state, state),
        "taps": settings.size("mamba_d_conv"),
    }


def _outer(settings: Settings) -> Iterator[Tensor]:
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding")
    yield from norm("final_layernorm")


def _mamba(settings: Settings) -> Iterator[Part]:
    bias = settings.flag("mamba_proj_bias")
    yield Tensor("mamba.A_log", ("mixer_inner", "state"), "mixer_state")
    yield Tensor("mamba.D", ("mixer_inner",), "mixer_state")
    yield from convolution("mamba.conv1d", "mixer_inner", settings.flag("mamba_conv_bias"))
    yield from linear("mamba.in_proj", "mixer_in", "hidden", "mixer_in", bias)
    yield from linear("mamba.x_proj", "time_and_state", "mixer_inner", "mixer_in")
    yield from linear("mamba.dt_proj", "mixer_inner", "time_rank", "mixer_in", bias=True)
    yield from linear("mamba.out_proj", "hidden", "mixer_inner", "mixer_o", bias)
    yield from norm("mamba.dt_layernorm", "time_rank")
    yield from norm("mamba.b_layernorm", "state")
    yield from norm("mamba.c_layernorm", "state")


def _falls(settings: Settings, index: int, what: str) -> bool:
    period = settings.integer(f"{what}_layer_period")
    return index % period == settings.integer(f"{what}_layer_offset", minimum=0)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention() if _falls(settings, index, "attn") else _mamba(settings)
    yield from norm("pre_ff_layernorm")
    path = "feed_forward"
    if _falls(settings, index, "expert") and settings.integer(*EXPERTS) > 1:
        yield router(f"{path}.router.weight")
        yield experts(f"{path}.experts", fused=f"{path}.experts")
    else:
        yield from gated_mlp(path)


ARCHITECTURE = Architecture(
    model_type="jamba",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("expert_layer_period", "expert_layer_offset"),
    defaults={
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 256,
        "mamba_conv_bias": True,
    },
    rules=(heads_divide_hidden(), key_values_divide_heads, top_k_fits(*EXPERTS), aliases_agree(*EXPERTS)),
    branch_norms=(("input_layernorm",), ("pre_ff_layernorm",)),
    only_depth="its Mamba layers take their width from hidden_size",
)
