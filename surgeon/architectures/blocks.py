"""Parts that many families share: attention, gated MLP, experts, embeddings, heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from surgeon.architectures.base import Alternatives, Part, Tensor
from surgeon.architectures.settings import Settings, Size

CAUSAL_TIES = (("{prefix}embed_tokens.weight", "lm_head.weight"),)
PER_EXPERT_OR_FUSED = ("per expert", "fused")


def decoder_sizes(settings: Settings, dense: bool = True) -> dict[str, Size]:
    """Return the sizes of a decoder with grouped queries and, where it is ``dense``, a gated MLP.

    head_dim is hidden_size / num_attention_heads unless set; num_key_value_heads equals
    num_attention_heads unless set.
    """
    hidden = settings.size("hidden_size")
    heads = settings.size("num_attention_heads")
    groups = settings.optional_integer("num_key_value_heads")
    key_value = Size(groups, ("num_key_value_heads",)) if groups else heads
    given = settings.optional_integer("head_dim")
    head = Size(given, ("head_dim",)) if given else quotient(hidden, heads)
    sizes = {
        "vocab": settings.size("vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "groups": key_value,
        "head_dim": head,
        "query": product(heads, head),
        "key_value": product(key_value, head),
        "one": Size(1, ()),
    }
    if dense:
        ffn = settings.size("intermediate_size")
        sizes |= {"ffn": ffn, "gate_up": twice(ffn)}
    return sizes | labels(settings)


def expert_sizes(settings: Settings, count: tuple[str, ...], width: str) -> dict[str, Size]:
    """Return the number of experts (under any of its names) and their width."""
    each = settings.size(width)
    return {"experts": settings.size(*count), "expert_ffn": each, "expert_gate_up": twice(each)}


def labels(settings: Settings) -> dict[str, Size]:
    """Return the number of labels of a classification head: num_labels, else id2label, else 2."""
    named = settings.config.get("id2label")
    if isinstance(named, dict) and named:
        return {"labels": Size(len(named), ("id2label",))}
    count = settings.optional_integer("num_labels")
    return {"labels": Size(2 if count is None else count, ("num_labels",))}


def product(first: Size, second: Size) -> Size:
    """Return the product of two sizes, decided by the keys of both."""
    return Size(first.value * second.value, tuple(dict.fromkeys(first.keys + second.keys)))


def quotient(first: Size, second: Size) -> Size:
    """Return the whole quotient of two sizes, decided by the keys of both."""
    return Size(first.value // second.value, tuple(dict.fromkeys(first.keys + second.keys)))


def total(*sizes: Size) -> Size:
    """Return the sum of sizes, decided by the keys of all."""
    keys = tuple(dict.fromkeys(key for size in sizes for key in size.keys))
    return Size(sum(size.value for size in sizes), keys)


def twice(size: Size) -> Size:
    """Return the double of a size: gate and up rows in one matrix."""
    return Size(2 * size.value, size.keys)


def linear(name: str, rows: str, columns: str, kind: str, bias: bool = False) -> Iterator[Tensor]:
    """Yield the weight [rows, columns] of a linear layer, and its bias."""
    yield Tensor(f"{name}.weight", (rows, columns), kind)
    if bias:
        yield Tensor(f"{name}.bias", (rows,), f"{kind}_bias")


def norm(name: str, width: str = "hidden", bias: bool = False) -> Iterator[Tensor]:
    """Yield the scale of a normalisation, and its shift."""
    yield Tensor(f"{name}.weight", (width,), "norm")
    if bias:
        yield Tensor(f"{name}.bias", (width,), "norm_bias")


def attention(
    bias: bool = False, output_bias: bool | None = None, output: str = "o_proj"
) -> Iterator[Tensor]:
    """Yield grouped-query attention with separate projections.

    Args:
        bias: whether queries, keys and values have one.
        output_bias: whether the output projection has one; as ``bias`` when not given.
        output: name of the output projection.
    """
    yield from linear("self_attn.q_proj", "query", "hidden", "attention_q", bias)
    yield from linear("self_attn.k_proj", "key_value", "hidden", "attention_k", bias)
    yield from linear("self_attn.v_proj", "key_value", "hidden", "attention_v", bias)
    with_bias = bias if output_bias is None else output_bias
    yield from linear(f"self_attn.{output}", "hidden", "query", "attention_o", with_bias)
    yield Tensor("self_attn.rotary_emb.inv_freq", None, "buffer", optional=True)


def gated_mlp(
    path: str = "mlp", width: str = "ffn", kind: str = "ffn", bias: bool = False
) -> Iterator[Tensor]:
    """Yield gate, up and down projections."""
    yield from linear(f"{path}.gate_proj", width, "hidden", f"{kind}_gate", bias)
    yield from linear(f"{path}.up_proj", width, "hidden", f"{kind}_up", bias)
    yield from linear(f"{path}.down_proj", "hidden", width, f"{kind}_down", bias)


def experts(
    path: str = "mlp.experts",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    fused: str = "mlp.experts",
) -> Alternatives:
    """Return the routed experts: one matrix each, or stacked as newer libraries hold them in memory."""
    return Alternatives(
        (
            (
                Tensor(f"{path}.{{expert}}.{gate}.weight", ("expert_ffn", "hidden"), "expert_gate"),
                Tensor(f"{path}.{{expert}}.{up}.weight", ("expert_ffn", "hidden"), "expert_up"),
                Tensor(f"{path}.{{expert}}.{down}.weight", ("hidden", "expert_ffn"), "expert_down"),
            ),
            (
                Tensor(f"{fused}.gate_up_proj", ("experts", "expert_gate_up", "hidden"), "expert_gate_up"),
                Tensor(f"{fused}.down_proj", ("experts", "hidden", "expert_ffn"), "expert_down"),
            ),
        )
    )


def sparse_by_step(settings: Settings, index: int) -> bool:
    """Say whether a layer holds experts: every decoder_sparse_step-th one not in mlp_only_layers."""
    if index in settings.integers("mlp_only_layers"):
        return False
    return (index + 1) % settings.integer("decoder_sparse_step") == 0


def router(name: str = "mlp.gate.weight") -> Tensor:
    """Return the matrix that scores the experts."""
    return Tensor(name, ("experts", "hidden"), "router")


def grouped(parts: Iterable[Part], group: str) -> Iterator[Part]:
    """Yield the parts as one optional group: present together or not at all."""
    for part in parts:
        if isinstance(part, Alternatives):
            options = (tuple(replace(tensor, group=group) for tensor in option) for option in part.options)
            yield Alternatives(tuple(options))
        else:
            yield part if part.optional else replace(part, group=group)


def decoder_outer(settings: Settings) -> Iterator[Tensor]:
    """Yield token embeddings and the final norm."""
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding")
    yield from norm("norm")
    yield Tensor("rotary_emb.inv_freq", None, "buffer", optional=True)


def causal_head(settings: Settings) -> Iterator[Tensor]:
    """Yield the head of the class named in config.json; a language-model head may be absent where
    no class is named."""
    name = settings.model_class()
    if name.endswith("ForSequenceClassification"):
        yield Tensor("score.weight", ("labels", "hidden"), "head")
    elif name.endswith("ForTokenClassification"):
        yield from linear("score", "labels", "hidden", "head", bias=True)
    elif name.endswith(("ForCausalLM", "LMHeadModel")) or not name:
        yield Tensor("lm_head.weight", ("vocab", "hidden"), "head", optional=not name)
