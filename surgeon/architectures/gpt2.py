"""GPT-2: learned positions, one matrix for queries, keys and values; weights stored [in, out]."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Architecture, Tensor
from surgeon.architectures.blocks import labels, linear, norm, quotient, twice
from surgeon.architectures.rules import aliases_agree, heads_divide_hidden
from surgeon.architectures.settings import Settings, Size

HIDDEN = ("n_embd", "hidden_size")
HEADS = ("n_head", "num_attention_heads")
LAYERS = ("n_layer", "num_hidden_layers")
POSITIONS = ("n_positions", "max_position_embeddings")


def _sizes(settings: Settings) -> dict[str, Size]:
    hidden, heads = settings.size(*HIDDEN), settings.size(*HEADS)
    inner = settings.optional_integer("n_inner")
    return {
        "vocab": settings.size("vocab_size"),
        "positions": settings.size(*POSITIONS),
        "hidden": hidden,
        "heads": heads,
        "groups": heads,
        "head_dim": quotient(hidden, heads),
        "query": hidden,
        "two_queries": twice(hidden),
        "query_key_value": Size(3 * hidden.value, hidden.keys),
        "ffn": Size(inner, ("n_inner",)) if inner else Size(4 * hidden.value, ("n_inner", *hidden.keys)),
        "one": Size(1, ()),
        "two": Size(2, ()),
    } | labels(settings)


def _outer(settings: Settings) -> Iterator[Tensor]:
    yield Tensor("wte.weight", ("vocab", "hidden"), "embedding")
    yield Tensor("wpe.weight", ("positions", "hidden"), "position_embedding")
    yield from norm("ln_f", bias=True)


def _projection(name: str, rows: str, columns: str, kind: str) -> Iterator[Tensor]:
    """Yield a weight in the family's own order [in, out], and its bias."""
    yield Tensor(f"{name}.weight", (columns, rows), kind)
    yield Tensor(f"{name}.bias", (rows,), f"{kind}_bias")


def _layer(settings: Settings, index: int) -> Iterator[Tensor]:
    yield from norm("ln_1", bias=True)
    yield from _projection("attn.c_attn", "query_key_value", "hidden", "attention_qkv")
    yield from _projection("attn.c_proj", "hidden", "query", "attention_o")
    yield Tensor("attn.bias", None, "buffer", optional=True)
    yield Tensor("attn.masked_bias", None, "buffer", optional=True)
    if settings.flag("add_cross_attention"):
        yield from norm("ln_cross_attn", bias=True)
        yield from _projection("crossattention.c_attn", "two_queries", "hidden", "cross_attention_kv")
        yield from _projection("crossattention.q_attn", "query", "hidden", "cross_attention_q")
        yield from _projection("crossattention.c_proj", "hidden", "query", "cross_attention_o")
        yield Tensor("crossattention.bias", None, "buffer", optional=True)
        yield Tensor("crossattention.masked_bias", None, "buffer", optional=True)
    yield from norm("ln_2", bias=True)
    yield from _projection("mlp.c_fc", "ffn", "hidden", "ffn_up")
    yield from _projection("mlp.c_proj", "hidden", "ffn", "ffn_down")


def _head(settings: Settings) -> Iterator[Tensor]:
    name = settings.model_class()
    if name.endswith("ForSequenceClassification"):
        yield Tensor("score.weight", ("labels", "hidden"), "head")
    elif name.endswith("ForTokenClassification"):
        yield from linear("classifier", "labels", "hidden", "head", bias=True)
    elif name.endswith("ForQuestionAnswering"):
        yield from linear("qa_outputs", "two", "hidden", "head", bias=True)
    elif name.endswith(("LMHeadModel", "DoubleHeadsModel", "ForCausalLM")) or not name:
        yield Tensor("lm_head.weight", ("vocab", "hidden"), "head", optional=not name)
    if name.endswith("DoubleHeadsModel"):
        yield from linear("multiple_choice_head.summary", "one", "hidden", "head", bias=True)


ARCHITECTURE = Architecture(
    model_type="gpt2",
    prefix="transformer.",
    stack="h",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=_head,
    ties=(("{prefix}wte.weight", "lm_head.weight"),),
    default_tie=True,
    layer_keys=LAYERS,
    defaults={"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    rules=(
        heads_divide_hidden(HIDDEN, HEADS),
        aliases_agree(*HIDDEN),
        aliases_agree(*LAYERS),
        aliases_agree(*POSITIONS),
        aliases_agree(*HEADS),
    ),
    branch_norms=(("ln_1",), ("ln_2",)),
)
