"""Nemotron-H: one mixer a layer, each a Mamba 2 mixer, attention, a dense MLP or routed experts without gates."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Alternatives, Architecture, Part, Tensor
from surgeon.architectures.blocks import (
    causal_head,
    decoder_sizes,
    expert_sizes,
    linear,
    norm,
    router,
)
from surgeon.architectures.hybrid import FULL, LINEAR, OLD_KINDS, kinds_are, mamba2, mamba2_sizes
from surgeon.architectures.prediction import under
from surgeon.architectures.rules import (
    aliases_agree,
    expert_groups_fit,
    key_values_divide_heads,
    top_k_fits,
)
from surgeon.architectures.settings import Settings, Size
from surgeon.errors import InputError, Where

EXPERTS = ("n_routed_experts", "num_local_experts")
LETTERS: dict[str, str] = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
OLD_SIZES = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv"}
"""Names of sizes in older configurations, which win where present."""


def _kinds(settings: Settings, lists: str, pattern: str) -> tuple[str, ...]:
    """Return the kinds of layers from a list, from a pattern of one letter a layer, or by default."""
    listed, letters = settings.config.get(lists), settings.config.get(pattern)
    if listed is None and letters is None:
        listed = settings.defaults.get(lists)
    if isinstance(listed, list) and listed and all(isinstance(kind, str) for kind in listed):
        return tuple(OLD_KINDS.get(str(kind), str(kind)) for kind in listed)
    if listed is None and isinstance(letters, str) and letters and set(letters) <= LETTERS.keys():
        return tuple(LETTERS[letter] for letter in letters)
    raise InputError(
        "E340", f"config.json does not say what the layers are: {lists} is {str(listed)[:40]}, {pattern} is {str(letters)[:40]}",
        where=Where(file="config.json"), help=f"{pattern} has one of {' '.join(LETTERS)} for every layer",
    )  # fmt: skip


def _layers(settings: Settings) -> tuple[str, ...]:
    return _kinds(settings, "layers_block_type", "hybrid_override_pattern")


def _old(settings: Settings, key: str) -> Size:
    return settings.size(OLD_SIZES[key] if OLD_SIZES[key] in settings.config else key)


def _sizes(settings: Settings) -> dict[str, Size]:
    sizes = decoder_sizes(settings) | expert_sizes(settings, EXPERTS, "moe_intermediate_size")
    hidden = sizes["hidden"]
    latent = settings.optional_integer("moe_latent_size")
    sizes |= mamba2_sizes(
        settings.size("mamba_num_heads"),
        settings.size("mamba_head_dim"),
        _old(settings, "n_groups"),
        settings.size("ssm_state_size"),
        _old(settings, "conv_kernel"),
    )
    return sizes | {
        "shared_ffn": settings.size("moe_shared_expert_intermediate_size"),
        "expert_hidden": Size(latent, ("moe_latent_size",)) if latent else hidden,
        "two_hidden": Size(2 * hidden.value, hidden.keys),
    }


def _outer(settings: Settings) -> Iterator[Part]:
    yield Tensor("embeddings.weight", ("vocab", "hidden"), "embedding")
    yield from norm("norm_f")


def _mlp(path: str, width: str, kind: str, bias: bool) -> Iterator[Tensor]:
    yield from linear(f"{path}.up_proj", width, "hidden", f"{kind}_up", bias)
    yield from linear(f"{path}.down_proj", "hidden", width, f"{kind}_down", bias)


def _routed(settings: Settings) -> Iterator[Part]:
    path, bias = "mixer.experts", settings.flag("mlp_bias")
    yield router("mixer.gate.weight")
    yield Tensor("mixer.gate.e_score_correction_bias", ("experts",), "router_correction")
    yield Alternatives(
        (
            (
                Tensor(f"{path}.{{expert}}.up_proj.weight", ("expert_ffn", "expert_hidden"), "expert_up"),
                Tensor(f"{path}.{{expert}}.down_proj.weight", ("expert_hidden", "expert_ffn"), "expert_down"),
            ),
            (
                Tensor(f"{path}.up_proj", ("experts", "expert_ffn", "expert_hidden"), "expert_up"),
                Tensor(f"{path}.down_proj", ("experts", "expert_hidden", "expert_ffn"), "expert_down"),
            ),
        )
    )
    yield from _mlp("mixer.shared_experts", "shared_ffn", "shared_expert", bias)
    if settings.optional_integer("moe_latent_size"):
        yield from linear("mixer.fc1_latent_proj", "expert_hidden", "hidden", "expert_latent", bias)
        yield from linear("mixer.fc2_latent_proj", "hidden", "expert_hidden", "expert_latent_o", bias)


def _block(settings: Settings, kind: str) -> Iterator[Part]:
    yield from norm("norm")
    if kind == LINEAR:
        bias, conv = settings.flag("use_bias"), "mamba_conv_bias"
        yield from mamba2("mixer", bias, settings.flag(conv if conv in settings.config else "use_conv_bias"))
    elif kind == FULL:
        for name, rows in (("q", "query"), ("k", "key_value"), ("v", "key_value")):
            yield from linear(f"mixer.{name}_proj", rows, "hidden", f"attention_{name}")
        yield from linear("mixer.o_proj", "hidden", "query", "attention_o")
    elif kind == "moe":
        yield from _routed(settings)
    else:
        yield from _mlp("mixer", "ffn", "ffn", settings.flag("mlp_bias"))


def _layer(settings: Settings, index: int) -> Iterator[Part]:
    return _block(settings, _layers(settings)[index])


def _head(settings: Settings) -> Iterator[Part]:
    """Yield the head, and the steps that predict further tokens: a short stack of layers each."""
    yield from causal_head(settings)
    steps = settings.optional_integer("num_nextn_predict_layers", minimum=0) or 0
    if not steps:
        return
    kinds = _kinds(settings, "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    for number, kind in enumerate(kinds * steps):
        path, place = f"mtp.layers.{number}", number % len(kinds)
        yield from under(path, _block(settings, kind))
        if place == 0:
            yield from under(path, (*norm("enorm"), *norm("hnorm"), *linear("eh_proj", "hidden", "two_hidden", "prediction")))  # fmt: skip
        if place == len(kinds) - 1:
            yield from under(path, norm("final_layernorm"))


ARCHITECTURE = Architecture(
    model_type="nemotron_h",
    prefix="backbone.",
    stack="layers",
    sizes=_sizes,
    outer=_outer,
    layer=_layer,
    head=_head,
    ties=(),
    default_tie=False,
    layer_keys=("layers_block_type", "hybrid_override_pattern"),
    count=lambda settings: len(_layers(settings)),
    storages=("per expert", "fused"),
    expert_layer_keys=("layers_block_type", "hybrid_override_pattern"),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 21504,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "n_routed_experts": 8,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "mtp_layers_block_type": [FULL, "moe"],
    },
    rules=(
        key_values_divide_heads,
        top_k_fits(*EXPERTS),
        aliases_agree(*EXPERTS),
        expert_groups_fit,
        kinds_are(FULL, LINEAR, "moe", "mlp", key="layers_block_type"),
    ),
    branch_norms=((), ()),
    other_prefixes=("model.",),
    only_depth="its layers hold one mixer each",
)
