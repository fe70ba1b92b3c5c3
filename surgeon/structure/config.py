"""config.json of a cut model: every key that encodes a size, and what the library's classes can hold.

A uniform cut keeps the stock architecture with smaller numbers, if its class can say them. Traps (transformers 5):

- ``head_dim`` must be written, or it is taken for hidden_size / num_attention_heads, which head pruning changes.
  GPT-2 and BERT have no such key: their heads can only be cut together with the residual stream.
- Llama, Gemma 2 and 3 and DeepSeek V2 refuse a hidden_size that num_attention_heads does not divide, needed or
  not. A Llama without biases is exactly a Mistral without sliding window, whose class does not ask.
- Some norms are sized from hidden_size even where head_dim is set (OLMoE, Phi with qk_layernorm).

Whatever a stock class cannot hold gets ``block_configs``, one entry a layer, which `surgeon.deploy` gives a reader.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from surgeon import architectures
from surgeon.architectures.layered_config import relayer_config
from surgeon.architectures.prediction import PREDICTION_LAYERS
from surgeon.errors import InputError, SurgeonError, UsageError, Where
from surgeon.structure.check import is_uniform, shapes
from surgeon.structure.cut import Cut, LayerShape
from surgeon.structure.parts import Attention, Structure

Config = Mapping[str, Any]

HEADS = ("num_attention_heads", "n_head")
GROUPS = "num_key_value_heads"
FFN = ("intermediate_size", "n_inner")
HIDDEN = ("hidden_size", "n_embd")
OLD_NAMES = frozenset({"gpt2"})
"""Families whose own names are the second of each pair."""

DERIVED_HEAD_DIM = frozenset({"bert", "gpt2"})
"""Families whose class has no head_dim: a head has hidden_size / num_attention_heads numbers."""
DIVIDED_HIDDEN = frozenset({"llama", "gemma2", "gemma3_text", "deepseek_v2"})
"""Families whose configuration refuses a hidden_size that is no multiple of num_attention_heads."""
SCALED_EMBEDDING = frozenset({"gemma", "gemma2", "gemma3_text"})
"""Families that multiply embeddings by the root of hidden_size, with no key to say otherwise."""

Entries = list[dict[str, dict[str, Any]]]


def pruned_config(config: Config, structure: Structure, cut: Cut) -> dict[str, Any]:
    """Return the configuration of what a cut leaves: a stock one where its class can hold it, else with block_configs.

    Args:
        config: config.json of the source.
        structure: of the source.
        cut: a legal cut (`surgeon.structure.check.check`).

    Raises:
        InputError: E341 the layers that stay break a pattern their class cannot express, E368 the residual
            stream cannot be cut.
    """
    if stock_obstacle(config, structure, cut) is None:
        return stock_config(config, structure, cut)
    result = _common(config, structure, cut)
    heads = {shape.heads for shape in shapes(cut, structure)}
    if heads - {0} - {source.heads for source in structure.attention if source is not None}:
        _write_head_dim(result, structure)
    result["block_configs"] = _blocks(structure, cut)
    return result


def stock_config(config: Config, structure: Structure, cut: Cut) -> dict[str, Any]:
    """Return the configuration with which the library's own class loads the result strictly.

    Raises:
        UsageError: E263 the cut is not uniform.
        InputError: E367 the class cannot hold the number of heads, E341, E368 as `pruned_config`.
    """
    obstacle = stock_obstacle(config, structure, cut)
    if obstacle is not None:
        raise obstacle
    result = _common(config, structure, cut)
    attention, width = _left(structure, cut)
    source = next((found for found in structure.attention if found is not None), None)
    moved = cut.hidden is not None and len(cut.hidden) != structure.hidden
    if attention and source and (attention.heads, attention.groups) != (source.heads, source.groups):
        _write(result, structure, HEADS, attention.heads)
        if structure.model_type not in DERIVED_HEAD_DIM:
            result[GROUPS] = attention.groups
        _write_head_dim(result, structure)
        moved = True
    if width is not None and (moved or width not in {ffn.width for ffn in structure.ffn if ffn is not None}):
        _write(result, structure, FFN, width)  # GPT-2 takes four times the residual stream when it is absent
    hidden = structure.hidden if cut.hidden is None else len(cut.hidden)
    if moved and structure.model_type == "llama" and attention and hidden % attention.heads:
        relabelled = relabel_as_mistral(result)
        assert relabelled is not None  # stock_obstacle has asked
        return relabelled
    return result


def _left(structure: Structure, cut: Cut) -> tuple[LayerShape | None, int | None]:
    """Return the attention and the FFN width of a uniform cut, None where no kept layer has one to cut."""
    attention = width = None
    for layer, shape in zip(cut.kept_layers, shapes(cut, structure), strict=True):
        attention = shape if structure.attention[layer] is not None else attention
        width = shape.ffn if structure.ffn[layer] is not None else width
    return attention, width


def stock_obstacle(config: Config, structure: Structure, cut: Cut) -> SurgeonError | None:
    """Return why no stock class holds the result of a legal cut, None when one does."""
    if not is_uniform(cut, structure):
        return UsageError(
            "E263", f"layers of different sizes were chosen, which no stock {structure.model_type} class can hold",
            help="--layout per-layer writes a model with code of its own; --layout uniform cuts all layers alike",
        )  # fmt: skip
    hidden = len(cut.hidden) if cut.hidden is not None else structure.hidden
    attention, _ = _left(structure, cut)
    source = next((found for found in structure.attention if found is not None), None)
    if attention is None or source is None:
        heads = configured_heads(config, structure)
        if cut.hidden is not None and structure.model_type in DIVIDED_HIDDEN and hidden % heads:
            return _not_divided(structure, hidden, heads, ())
        return None
    heads = attention.heads
    if heads == source.heads and cut.hidden is None:
        return None
    if _fits(config, structure, source, heads, hidden):
        return None
    allowed = allowed_head_counts(config, structure, hidden=hidden)
    if structure.model_type in DIVIDED_HIDDEN and hidden % heads:
        return _not_divided(structure, hidden, heads, allowed)
    return InputError(
        "E367", f"the stock {structure.model_type} class sizes something of its attention as hidden_size / num_attention_heads, "
        f"so {heads} heads of {source.head_dim} do not fit a residual stream of {hidden}",
        help=f"{_named(allowed)} fit; or prune FFN channels and layers",
    )  # fmt: skip


def allowed_head_counts(
    config: Config, structure: Structure, *, hidden: int | None = None
) -> tuple[int, ...]:
    """Return the numbers of query heads that some legal cut leaves and a stock class holds, ascending.

    Args:
        config: config.json of the source.
        structure: of the source.
        hidden: size of the residual stream afterwards; default as it is.
    """
    source = next((found for found in structure.attention if found is not None), None)
    if source is None:
        return ()
    reachable = {
        groups * each for groups in range(1, source.groups + 1) for each in range(1, source.per_group + 1)
    }
    width = structure.hidden if hidden is None else hidden
    return tuple(sorted(n for n in reachable if _fits(config, structure, source, n, width)))


def relabel_as_mistral(config: Config) -> dict[str, Any] | None:
    """Return a Llama configuration as the Mistral one that computes the same; None where there is none.

    The classes differ in biases, in the sliding window (null: none), and in what they assume for absent keys.
    """
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    exact = (
        config.get("model_type") == "llama"
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
        and "auto_map" not in config
        and (config.get("pretraining_tp") or 1) == 1
        and all(isinstance(name, str) and name.startswith("Llama") for name in names)
    )
    if not exact:
        return None
    gone = {"attention_bias", "mlp_bias", "pretraining_tp"}
    result = {key: copy.deepcopy(value) for key, value in config.items() if key not in gone}
    result["model_type"] = "mistral"
    if names:
        result["architectures"] = ["Mistral" + name.removeprefix("Llama") for name in names]
    result["sliding_window"] = None
    result.setdefault("max_position_embeddings", 2048)
    if result.get(GROUPS) is None:
        result[GROUPS] = result["num_attention_heads"]
    return result


def check_hidden(cut: Cut, structure: Structure, config: Config) -> None:
    """Refuse to cut the residual stream where the family's class would compute something else with it (E368)."""
    assert cut.hidden is not None
    family, hidden = structure.model_type, len(cut.hidden)
    if hidden == structure.hidden:
        return
    if family in SCALED_EMBEDDING:
        raise _no_hidden(
            f"{family} multiplies embeddings by the root of hidden_size, which no key of its configuration sets"
        )
    record = architectures.get(family)
    assert record is not None
    if record.only_depth:
        raise _no_hidden(record.only_depth, "prune layers")
    if record.settings(config).flag("add_cross_attention"):
        raise _no_hidden(f"this {family} model has cross-attention")
    if family in DERIVED_HEAD_DIM:
        for layer, shape in zip(cut.kept_layers, shapes(cut, structure), strict=True):
            if shape.heads * shape.head_dim != hidden:
                raise _no_hidden(
                    f"a head of a {family} model has hidden_size / heads numbers, but layer {layer} would keep "
                    f"{shape.heads} heads of {shape.head_dim} and {hidden} channels of the residual stream",
                    f"keep {shape.heads * shape.head_dim} channels, or another number of heads",
                )


def configured_heads(config: Config, structure: Structure) -> int:
    """Return the configured number of query heads."""
    record = architectures.get(structure.model_type)
    assert record is not None
    return record.settings(config).integer(*HEADS)


def _common(config: Config, structure: Structure, cut: Cut) -> dict[str, Any]:
    """Return the configuration with the kept layers and residual stream, heads and channels as they were."""
    result = relayer_config(config, cut.kept_layers)
    if len(cut.kept_layers) < structure.layers:
        _drop_prediction_layers(result, structure)
    if cut.hidden is not None and len(cut.hidden) != structure.hidden:
        check_hidden(cut, structure, config)
        _write(result, structure, HIDDEN, len(cut.hidden))
        _write_head_dim(result, structure)
    return result


def _write_head_dim(result: dict[str, Any], structure: Structure) -> None:
    """Say the size of a head, which would otherwise be taken for hidden_size / num_attention_heads."""
    source = next((found for found in structure.attention if found is not None), None)
    if source is not None and structure.model_type not in DERIVED_HEAD_DIM:
        result["head_dim"] = source.head_dim


def _drop_prediction_layers(result: dict[str, Any], structure: Structure) -> None:
    """Layers that predict further tokens read the last layer of the whole model; `views` leaves them out."""
    record = architectures.get(structure.model_type)
    assert record is not None
    stated = [key for key in PREDICTION_LAYERS if result.get(key)]
    for key in stated or (PREDICTION_LAYERS[:1] if record.extra_layers(record.settings(result)) else ()):
        result[key] = 0


def _blocks(structure: Structure, cut: Cut) -> Entries:
    entries: Entries = []
    for layer, shape in zip(cut.kept_layers, shapes(cut, structure), strict=True):
        attention: dict[str, Any] = {"no_op": False}
        ffn: dict[str, Any] = {"no_op": False}
        if structure.attention[layer] is not None:
            attention = {
                "no_op": shape.heads == 0,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.groups,
            }
        if structure.ffn[layer] is not None:
            ffn = {"no_op": shape.ffn == 0, "intermediate_size": shape.ffn}
        entries.append({"attention": attention, "ffn": ffn})
    return entries


def _write(result: dict[str, Any], structure: Structure, keys: tuple[str, str], value: int) -> None:
    """Set every name of a size that the configuration uses, the family's own where it uses none."""
    own = keys[1] if structure.model_type in OLD_NAMES else keys[0]
    readable = keys if structure.model_type in OLD_NAMES else keys[:1]
    for key in [key for key in readable if key in result] or [own]:
        result[key] = value


def _fits(config: Config, structure: Structure, source: Attention, heads: int, hidden: int) -> bool:
    """Say whether a stock class holds this many heads of the source's size beside this residual stream."""
    family = structure.model_type
    if heads * source.head_dim == hidden:
        return True
    if family in DERIVED_HEAD_DIM or source.norms:
        return False
    if family == "phi" and config.get("qk_layernorm"):
        return hidden // heads == source.head_dim
    if family == "phi3" and _has_rope_factors(config):
        return hidden // heads == source.head_dim
    if family in DIVIDED_HIDDEN and hidden % heads:
        return relabel_as_mistral(config) is not None
    return True


def _has_rope_factors(config: Config) -> bool:
    """Say whether Phi-3 lists one rope factor per pair, whose number its configuration checks."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return isinstance(scaling, Mapping) and bool(scaling.get("short_factor") or scaling.get("long_factor"))


def _not_divided(structure: Structure, hidden: int, heads: int, allowed: tuple[int, ...]) -> InputError:
    return InputError(
        "E367", f"the stock {structure.model_type} class refuses {heads} heads: they do not divide hidden_size = {hidden}",
        where=Where(file="config.json"),
        help=f"{_named(allowed)} load; a Llama without biases is relabelled as Mistral and may have any number",
    )  # fmt: skip


def _named(allowed: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, allowed))} heads" if allowed else "no number of heads would"


def _no_hidden(reason: str, way_out: str = "prune heads, FFN channels or layers") -> InputError:
    return InputError("E368", f"the residual stream cannot be cut: {reason}", help=way_out)
