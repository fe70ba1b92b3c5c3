"""Qwen3-Next: gated delta nets and gated attention in turns, each before routed experts with a shared one."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    PER_EXPERT_OR_FUSED,
    causal_head,
    decoder_outer,
    decoder_sizes,
    expert_sizes,
    experts,
    gated_mlp,
    linear,
    norm,
    router,
    sparse_by_step,
)
from surgeon.architectures.hybrid import FULL, LINEAR, delta_net, delta_net_sizes, kind_of, kinds_are
from surgeon.architectures.prediction import under
from surgeon.architectures.rules import key_values_divide_heads, layer_lists_fit, top_k_fits
from surgeon.architectures.settings import Settings, Size

EXPERTS = ("num_experts", "num_local_experts")

ONLY_DEPTH = "its queries carry a gate of their own and its linear attention has other heads"


def sizes(settings: Settings, dense: bool = True) -> dict[str, Size]:
    """Return the sizes of Qwen3-Next and Qwen3.5; the latter has no dense layers and no width for them."""
    found = decoder_sizes(settings, dense=dense)
    query, hidden = found["query"], found["hidden"]
    return (
        found
        | expert_sizes(settings, EXPERTS, "moe_intermediate_size")
        | delta_net_sizes(settings)
        | {
            "shared_ffn": settings.size("shared_expert_intermediate_size"),
            "gated_query": Size(2 * query.value, query.keys),
            "two_hidden": Size(2 * hidden.value, hidden.keys),
        }
    )


def gated_attention(settings: Settings) -> Iterator[Part]:
    """Yield attention whose query projection makes an output gate too, head by head."""
    bias = settings.flag("attention_bias")
    yield from linear("self_attn.q_proj", "gated_query", "hidden", "attention_q", bias)
    yield from linear("self_attn.k_proj", "key_value", "hidden", "attention_k", bias)
    yield from linear("self_attn.v_proj", "key_value", "hidden", "attention_v", bias)
    yield from linear("self_attn.o_proj", "hidden", "query", "attention_o", bias)
    yield from norm("self_attn.q_norm", "head_dim")
    yield from norm("self_attn.k_norm", "head_dim")


def routed_experts() -> Iterator[Part]:
    """Yield routed experts beside a gated shared expert."""
    yield router()
    yield experts()
    yield from gated_mlp("mlp.shared_expert", "shared_ffn", "shared_expert")
    yield Tensor("mlp.shared_expert_gate.weight", ("one", "hidden"), "shared_expert_router")


def head(settings: Settings) -> Iterator[Part]:
    """Yield the head, and the block that predicts a further token: on disk, ignored by the library."""
    yield from causal_head(settings)
    for name in ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"):
        yield from under(name, (Tensor("weight", ("hidden",), "norm"),))
    yield from under("mtp.fc", (Tensor("weight", ("hidden", "two_hidden"), "prediction"),))
    block = (
        *norm("input_layernorm"),
        *gated_attention(settings),
        *norm("post_attention_layernorm"),
        *routed_experts(),
    )
    yield from under("mtp.layers.0", block)


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    if kind_of(settings, index) == LINEAR:
        yield from delta_net("linear_attn", together=True)
    else:
        yield from gated_attention(settings)
    yield from norm("post_attention_layernorm")
    if sparse_by_step(settings, index):
        yield from routed_experts()
    else:
        yield from gated_mlp()


OFFSET_NORMS = r"(?<!linear_attn\.)norm\.weight$"
"""All norms but the gated one of linear attention."""

ARCHITECTURE = Architecture(
    model_type="qwen3_next",
    offset_norms=OFFSET_NORMS,
    prefix="model.",
    stack="layers",
    sizes=sizes,
    outer=decoder_outer,
    layer=_layer,
    head=head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    expert_layer_keys=("decoder_sparse_step", "mlp_only_layers"),
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 256,
        "intermediate_size": 5632,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    rules=(
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        layer_lists_fit,
        kinds_are(FULL, LINEAR),
    ),
    only_depth=ONLY_DEPTH,
)
