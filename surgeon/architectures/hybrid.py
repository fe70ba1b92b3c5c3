"""Layers of several kinds in one model: which layer is what, and the mixers that are no attention."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.architectures.base import Part, Tensor
from surgeon.architectures.blocks import linear, norm, product, total
from surgeon.architectures.layered_config import implied_layer_type
from surgeon.architectures.rules import Rule
from surgeon.architectures.settings import Settings, Size
from surgeon.errors import InputError, Where

FULL, LINEAR = "full_attention", "linear_attention"

OLD_KINDS = {"attention": FULL, "mamba": LINEAR}
"""Names of kinds in older configurations."""


def kind_of(settings: Settings, index: int, key: str = "layer_types") -> str:
    """Return the kind of a layer, by its list or, where there is none, by the family's rule."""
    listed = settings.get(key)
    if listed is None:
        return implied_layer_type(settings.config, index)
    if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
        raise InputError(
            "E340", f"config.json sets {key} to {str(listed)[:60]!r}, which is not a list of kinds of layers",
            where=Where(file="config.json"), help=f'{key} names the kind of each layer, such as ["linear_attention", "full_attention"]',
        )  # fmt: skip
    kind = listed[min(index, len(listed) - 1)] if listed else FULL  # a wrong length is said by a rule
    return OLD_KINDS.get(kind, kind)


def kinds_are(*allowed: str, key: str = "layer_types") -> Rule:
    """Every entry of the list of kinds must be one that the family has."""

    def rule(settings: Settings) -> str | None:
        listed = settings.get(key)
        unknown = [
            kind
            for kind in listed or []
            if isinstance(kind, str) and OLD_KINDS.get(kind, kind) not in allowed
        ]
        return f"{key} names {unknown[0]!r}; a layer is one of {', '.join(allowed)}" if unknown else None

    return rule


def convolution(path: str, size: str, bias: bool) -> Iterator[Tensor]:
    """Yield a depthwise convolution over time [channels, 1, taps], and its bias."""
    yield Tensor(f"{path}.weight", (size, "one", "taps"), "mixer_conv")
    if bias:
        yield Tensor(f"{path}.bias", (size,), "mixer_conv_bias")


def mamba2_sizes(heads: Size, width: Size, groups: Size, state: Size, taps: Size) -> dict[str, Size]:
    """Return the sizes of a Mamba 2 mixer: heads of ``width`` channels, B and C of ``state`` numbers a group."""
    inner = product(heads, width)
    both = product(groups, Size(2 * state.value, state.keys))
    return {
        "mixer_heads": heads,
        "mixer_inner": inner,
        "mixer_conv": total(inner, both),
        "mixer_in": total(inner, inner, both, heads),
        "taps": taps,
    }


def mamba2(path: str, bias: bool, with_conv_bias: bool) -> Iterator[Part]:
    """Yield a Mamba 2 mixer: gate, states, B, C and time steps in one projection."""
    for name in ("A_log", "D", "dt_bias"):
        yield Tensor(f"{path}.{name}", ("mixer_heads",), "mixer_state")
    yield from convolution(f"{path}.conv1d", "mixer_conv", with_conv_bias)
    yield from linear(f"{path}.in_proj", "mixer_in", "hidden", "mixer_in", bias)
    yield from norm(f"{path}.norm", "mixer_inner")
    yield from linear(f"{path}.out_proj", "hidden", "mixer_inner", "mixer_o", bias)


def delta_net_sizes(settings: Settings) -> dict[str, Size]:
    """Return the sizes of a gated delta net: keys and values have heads of their own."""
    value_heads = settings.size("linear_num_value_heads")
    keys = product(settings.size("linear_num_key_heads"), settings.size("linear_key_head_dim"))
    values = product(value_heads, settings.size("linear_value_head_dim"))
    return {
        "delta_heads": value_heads,
        "delta_two_heads": Size(2 * value_heads.value, value_heads.keys),
        "delta_value": values,
        "delta_value_dim": settings.size("linear_value_head_dim"),
        "delta_qkv": total(keys, keys, values),
        "delta_qkvz": total(keys, keys, values, values),
        "taps": settings.size("linear_conv_kernel_dim"),
    }


def delta_net(path: str, together: bool) -> Iterator[Part]:
    """Yield a gated delta net.

    Args:
        path: its module.
        together: queries, keys, values and gate in one projection, both time parameters in another
            (Qwen3-Next); one projection each otherwise (Qwen3.5).
    """
    for name in ("A_log", "dt_bias"):
        yield Tensor(f"{path}.{name}", ("delta_heads",), "mixer_state")
    yield from convolution(f"{path}.conv1d", "delta_qkv", False)
    if together:
        yield from linear(f"{path}.in_proj_qkvz", "delta_qkvz", "hidden", "mixer_in")
        yield from linear(f"{path}.in_proj_ba", "delta_two_heads", "hidden", "mixer_in")
    else:
        yield from linear(f"{path}.in_proj_qkv", "delta_qkv", "hidden", "mixer_in")
        yield from linear(f"{path}.in_proj_z", "delta_value", "hidden", "mixer_in")
        yield from linear(f"{path}.in_proj_a", "delta_heads", "hidden", "mixer_in")
        yield from linear(f"{path}.in_proj_b", "delta_heads", "hidden", "mixer_in")
    yield from norm(f"{path}.norm", "delta_value_dim")
    yield from linear(f"{path}.out_proj", "hidden", "delta_value", "mixer_o")
