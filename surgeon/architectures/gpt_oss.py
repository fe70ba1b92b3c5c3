"""gpt-oss: stacked experts with biases, gate and up interleaved; plain or in MXFP4 blocks."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    CAUSAL_TIES,
    attention,
    causal_head,
    decoder_outer,
    decoder_sizes,
    expert_sizes,
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

BLOCK = 32
"""Values that share one scale in MXFP4; sixteen bytes hold them."""

EXPERTS = ("num_local_experts", "num_experts")


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")
    hidden, width = sizes["hidden"], sizes["expert_ffn"]
    return sizes | {
        "hidden_blocks": Size(hidden.value // BLOCK, hidden.keys),
        "expert_ffn_blocks": Size(width.value // BLOCK, width.keys),
        "block_bytes": Size(BLOCK // 2, ()),
    }


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield Tensor("self_attn.sinks", ("heads",), "attention_sink")
    yield from norm("post_attention_layernorm")
    yield router("mlp.router.weight")
    yield Tensor("mlp.router.bias", ("experts",), "router_bias")
    path = "mlp.experts"
    up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
    yield Tensor(f"{up}_bias", ("experts", "expert_gate_up"), "expert_gate_up_bias")
    yield Tensor(f"{down}_bias", ("experts", "hidden"), "expert_down_bias")
    up_blocks, down_blocks = (
        ("experts", "expert_gate_up", "hidden_blocks"),
        ("experts", "hidden", "expert_ffn_blocks"),
    )
    yield Alternatives(
        (
            (
                Tensor(up, ("experts", "hidden", "expert_gate_up"), "expert_gate_up"),
                Tensor(down, ("experts", "expert_ffn", "hidden"), "expert_down"),
            ),
            (
                Tensor(f"{up}_blocks", (*up_blocks, "block_bytes"), "expert_gate_up"),
                Tensor(f"{up}_scales", up_blocks, "expert_gate_up_scale"),
                Tensor(f"{down}_blocks", (*down_blocks, "block_bytes"), "expert_down"),
                Tensor(f"{down}_scales", down_blocks, "expert_down_scale"),
            ),
        )
    )


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=("plain", "mxfp4"),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        layer_lists_fit,
    ),
)
