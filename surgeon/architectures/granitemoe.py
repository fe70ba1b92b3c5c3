"""Granite MoE: published with stacked experts under names of its own."""

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
from surgeon.architectures.rules import heads_divide_hidden, key_values_divide_heads, top_k_fits
from surgeon.architectures.settings import Settings, Size


def sizes(settings: Settings) -> dict[str, Size]:
    """Return the sizes of a Granite decoder with routed experts."""
    return decoder_sizes(settings) | expert_sizes(settings, ("num_local_experts",), "intermediate_size")


def _stacked(path: str, gate_up: str, down: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{path}.{gate_up}", ("experts", "expert_gate_up", "hidden"), "expert_gate_up"),
        Tensor(f"{path}.{down}", ("experts", "hidden", "expert_ffn"), "expert_down"),
    )


def stacked_experts() -> Alternatives:
    """Return experts and router, as published and as the library names them in memory."""
    moe = "block_sparse_moe"
    return Alternatives(
        (
            (
                *_stacked(moe, "input_linear.weight", "output_linear.weight"),
                router(f"{moe}.router.layer.weight"),
            ),
            (
                *_stacked(f"{moe}.experts", "gate_up_proj", "down_proj"),
                router(f"{moe}.router.weight"),
            ),
        )
    )


def layer(settings: Settings, index: int) -> Iterator[Part]:
    """Yield one decoder layer."""
    yield from norm("input_layernorm")
    yield from attention(bias=settings.flag("attention_bias"))
    yield from norm("post_attention_layernorm")
    yield stacked_experts()


ARCHITECTURE = Architecture(
    model_type="granitemoe",
    prefix="model.",
    stack="layers",
    sizes=sizes,
    outer=decoder_outer,
    layer=layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=("published", "in memory"),
    defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    rules=(heads_divide_hidden(), key_values_divide_heads, top_k_fits("num_local_experts")),
)
