"""MiniMax-Text-01: full and lightning attention in turns, each before Mixtral's experts; residuals are normalised."""

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
    linear,
    norm,
    router,
)
from surgeon.architectures.hybrid import FULL, LINEAR, kind_of, kinds_are
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
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "intermediate_size")
    query = sizes["query"]
    return sizes | {"three_query": Size(3 * query.value, query.keys), "block": settings.size("block_size")}


def _lightning() -> Iterator[Part]:
    """Yield lightning attention. How fast each head forgets is stored, because it depends on the layer's number."""
    yield from linear("self_attn.qkv_proj", "three_query", "hidden", "mixer_in")
    yield from linear("self_attn.output_gate", "query", "hidden", "mixer_in")
    yield from norm("self_attn.norm", "query")
    yield from linear("self_attn.out_proj", "hidden", "query", "mixer_o")
    for name, axes in (
        ("slope_rate", ("heads", "one", "one")),
        ("query_decay", ("heads", "block", "one")),
        ("key_decay", ("heads", "block", "one")),
        ("diagonal_decay", ("one", "heads", "block", "block")),
    ):
        yield Tensor(f"self_attn.{name}", axes, "mixer_state")


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    yield from norm("input_layernorm")
    yield from attention() if kind_of(settings, index) == FULL else _lightning()
    yield from norm("post_attention_layernorm")
    yield Alternatives(((router("block_sparse_moe.gate.weight"),), (router("mlp.gate.weight"),)))
    yield experts("block_sparse_moe.experts", gate="w1", up="w3", down="w2", fused="mlp.experts")


ARCHITECTURE = Architecture(
    model_type="minimax",
    prefix="model.",
    stack="layers",
    sizes=_sizes,
    outer=decoder_outer,
    layer=_layer,
    head=causal_head,
    ties=CAUSAL_TIES,
    default_tie=False,
    storages=PER_EXPERT_OR_FUSED,
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "block_size": 256,
    },
    rules=(
        heads_divide_hidden(),
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        layer_lists_fit,
        kinds_are(FULL, LINEAR),
    ),
    post_norm=True,
    only_depth="lightning attention has the same heads as full attention and decays stored per head",
)
