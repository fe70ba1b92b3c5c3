"""Contradictions between configuration keys that the shapes of the tensors cannot show."""

from __future__ import annotations

from surgeon.architectures.base import Rule
from surgeon.architectures.settings import Settings


def heads_divide_hidden(
    hidden: tuple[str, ...] = ("hidden_size",), heads: tuple[str, ...] = ("num_attention_heads",)
) -> Rule:
    """Without an explicit head_dim, the hidden size must be a multiple of the number of heads."""

    def rule(settings: Settings) -> str | None:
        if settings.optional_integer("head_dim") is not None:
            return None
        width, count = settings.integer(*hidden), settings.integer(*heads)
        if width % count == 0:
            return None
        return f"{settings.named(*hidden)} = {width} is not a multiple of {settings.named(*heads)} = {count}"

    return rule


def key_values_divide_heads(settings: Settings) -> str | None:
    """Every key/value head must serve the same number of query heads."""
    heads = settings.integer("num_attention_heads")
    groups = settings.optional_integer("num_key_value_heads") or heads
    if heads % groups == 0:
        return None
    return f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}"


def top_k_fits(*experts: str, chosen_by: tuple[str, ...] = ("num_experts_per_tok",)) -> Rule:
    """A router cannot choose more experts than there are; the model loads and fails at its first step.

    Args:
        experts: names of the number of experts.
        chosen_by: names of the number that a router chooses, which may be a list with one entry a layer.
    """

    def rule(settings: Settings) -> str | None:
        count = settings.optional_integer(*experts, minimum=0)
        key = settings.named(*chosen_by)
        listed = settings.integers(key) if isinstance(settings.get(key), list) else ()
        chosen = max(listed, default=None) if listed else settings.optional_integer(*chosen_by)
        if not count or chosen is None or chosen <= count:
            return None
        return f"{key} = {chosen} is larger than {settings.named(*experts)} = {count}"

    return rule


def aliases_agree(*keys: str) -> Rule:
    """Two names of one setting must have one value; readers silently pick different ones."""

    def rule(settings: Settings) -> str | None:
        given = {key: settings.config[key] for key in keys if settings.config.get(key) is not None}
        if len(set(map(repr, given.values()))) <= 1:
            return None
        return " but ".join(f"{key} = {value!r}" for key, value in given.items())

    return rule


def expert_groups(
    experts: tuple[str, ...] = ("n_routed_experts",),
    groups: tuple[str, ...] = ("n_group",),
    chosen_by: tuple[str, ...] = ("num_experts_per_tok",),
) -> Rule:
    """Group-limited routing needs equal groups, and enough experts in the groups it keeps."""

    def rule(settings: Settings) -> str | None:
        count, parts = settings.optional_integer(*experts), settings.optional_integer(*groups)
        if count is None or parts is None:
            return None
        whole, part = settings.named(*experts), settings.named(*groups)
        if count % parts:
            return f"{whole} = {count} is not a multiple of {part} = {parts}"
        kept = settings.optional_integer("topk_group")
        if kept is None:
            return None
        if kept > parts:
            return f"topk_group = {kept} is larger than {part} = {parts}"
        chosen = settings.optional_integer(*chosen_by)
        if chosen is not None and kept * (count // parts) < chosen:
            return f"{settings.named(*chosen_by)} = {chosen} is larger than the {kept * (count // parts)} experts in topk_group = {kept} groups"
        return None

    return rule


expert_groups_fit = expert_groups()
"""The rule in DeepSeek's names."""


def layer_lists_fit(settings: Settings) -> str | None:
    """A list with one entry a layer must have as many entries as there are layers."""
    count = settings.optional_integer("num_hidden_layers")
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        value = settings.config.get(key)
        if isinstance(value, list) and count is not None and len(value) != count:
            return f"{key} has {len(value)} entries but num_hidden_layers = {count}"
    return None
