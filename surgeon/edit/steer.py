"""Activation steering baked into a bias: a constant added to the residual stream of one layer.

"Activation Steering for Chain-of-Thought Compression" (ASC) adds gamma * u to the output of a layer while the
model generates, u = mean(concise) - mean(verbose). Added at every position, that is a bias: of the layer's down
projection for the layer's output, of its output projection for the stream between attention and FFN. It is not
quite ASC's rule, which leaves the tokens of the prompt alone, so gamma has to be found anew after baking.

Whether a stock model class has room for such a bias is decided by its config. The flags count for all layers,
so all other biases they bring are written as zeros. Qwen2 and Mistral have no such flag; where they compute
exactly what a Llama does, the result is labelled as one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.edit.edited_view import EditedView
from surgeon.errors import InputError, UsageError, Where

ALWAYS = "always"
"""The class has the bias whatever its config says."""


@dataclass(frozen=True)
class Room:
    """Which config flag gives a class the bias of its output projection, and of its down projection; None: none does."""

    attention: str | None
    ffn: str | None
    residual: str | None = None
    """Config key of a factor on everything a layer adds to the stream."""


ROOM: dict[str, Room] = {
    "llama": Room("attention_bias", "mlp_bias"),
    "granite": Room("attention_bias", "mlp_bias", "residual_multiplier"),
    "smollm3": Room("attention_bias", "mlp_bias"),
    "arcee": Room("attention_bias", "mlp_bias"),
    "nemotron": Room("attention_bias", "mlp_bias"),
    "seed_oss": Room("attention_out_bias", "mlp_bias"),
    "qwen3": Room("attention_bias", None),
    "qwen3_moe": Room("attention_bias", None),
    "olmoe": Room("attention_bias", None),
    "gemma": Room("attention_bias", None),
    "granitemoe": Room("attention_bias", None, "residual_multiplier"),
    "gpt_oss": Room("attention_bias", None),
    "deepseek_v2": Room("attention_bias", None),
    "deepseek_v3": Room("attention_bias", None),
    "phi": Room(ALWAYS, ALWAYS),
    "gpt2": Room(ALWAYS, ALWAYS),
}
"""Model classes whose biases reach the stream unchanged (transformers 5.23; a test builds them).

Gemma 2 and 3, OLMo 2 and 3 have a norm behind the projection: a bias would be rescaled token by token.
"""

RELABELLED = ("qwen2", "mistral")

_MODULES = {
    "attention_bias": r"self_attn\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|kv_a_proj_with_mqa)",
    "attention_out_bias": r"self_attn\.o_proj",
    "mlp_bias": r"mlp\.(gate_proj|up_proj|down_proj)",
}
_TARGETS = {
    "attention": ("self_attn.o_proj", "self_attn.dense", "attn.c_proj"),
    "ffn": ("mlp.down_proj", "mlp.fc2", "mlp.c_proj"),
}
_LAYER = re.compile(r"^(?P<stack>(?:[^.]+\.)*(?:layers|h)\.)(?P<number>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Baked:
    """A model with a constant shift.

    Attributes:
        view: the model.
        bias: the tensor that holds it.
        zeros: biases that are zero because the flag brings them.
        relabelled: what the model was called before, "" when it keeps its name.
        notes: sentences for the user.
    """

    view: EditedView
    bias: str
    zeros: tuple[str, ...]
    relabelled: str
    notes: tuple[str, ...]


def bake(
    checkpoint: Checkpoint, layer: int, shift: np.ndarray, *, part: str = "ffn", relabel: bool = True
) -> Baked:
    """Return the model with ``shift`` added to its stream by a bias.

    Args:
        checkpoint: the model.
        layer: number of the layer.
        shift: float64 [hidden].
        part: "ffn": the layer's output; "attention": between attention and FFN.
        relabel: whether a Qwen2 or Mistral may become a Llama.

    Raises:
        InputError: E418 the class has no room for the bias; E419 no such matrix in the layer.
        UsageError: E299 the shift is not finite.
    """
    if not np.isfinite(shift).all():
        raise UsageError("E299", "the shift is not finite", help="--gamma is a finite number")
    config = dict(checkpoint.config or {})
    before = str(config.get("model_type", ""))
    relabelled, notes = "", []
    if before in RELABELLED:
        config = _as_llama(checkpoint, config, relabel)
        relabelled = before
        notes.append(
            f"the result is labelled llama: a {before} class has no room for the bias, and both compute the same"
        )
    room = ROOM.get(str(config.get("model_type")))
    flag = None if room is None else room.attention if part == "attention" else room.ffn
    if room is None or flag is None:
        raise _no_room(checkpoint, before, room, part)
    weight = _target(checkpoint, layer, part)
    bias = weight.removesuffix(".weight") + ".bias"
    factor = float(config.get(room.residual, 1.0)) if room.residual else 1.0
    shift = shift / factor
    needed: list[str] = []
    if flag == ALWAYS:
        _require(checkpoint, bias)
    else:
        needed = _set_flags(checkpoint, config, {flag, *(("attention_bias",) if relabelled else ())})
    additions: dict[str, tuple[np.ndarray, str]] = {}
    for name in needed:
        info = checkpoint.tensors[name.removesuffix(".bias") + ".weight"]
        additions[name] = (shift if name == bias else np.zeros(info.shape[0]), info.dtype)
    shifts = {} if bias in additions else {bias: shift}
    view = EditedView(checkpoint, {}, shifts=shifts, additions=additions, config=config)
    return Baked(view, bias, tuple(sorted(set(additions) - {bias})), relabelled, tuple(notes))


def _set_flags(checkpoint: Checkpoint, config: dict[str, Any], flags: set[str]) -> list[str]:
    """Turn flags on and return the biases they bring and the checkpoint lacks."""
    found: list[str] = []
    for flag in sorted(flags):
        config[flag] = True
        wanted = re.compile(_MODULES[flag] + r"\.weight")
        for name in checkpoint.tensors:
            place = _LAYER.match(name)
            bias = name.removesuffix(".weight") + ".bias"
            if place is not None and wanted.fullmatch(place["rest"]) and bias not in checkpoint.tensors:
                found.append(bias)
    return found


def _target(checkpoint: Checkpoint, layer: int, part: str) -> str:
    """Return the matrix whose bias shifts the stream."""
    layers: set[int] = set()
    for name, info in checkpoint.tensors.items():
        place = _LAYER.match(name)
        if place is None:
            continue
        layers.add(int(place["number"]))
        rest = place["rest"].removesuffix(".weight")
        if int(place["number"]) == layer and rest in _TARGETS[part] and len(info.shape) == 2:
            return name
    if layer not in layers:
        raise UsageError("E299", f"there is no layer {layer}", help=f"layers 0 to {max(layers, default=0)}")
    raise InputError("E419", f"layer {layer} of {checkpoint.label} has no single matrix that writes its FFN's output",
                     where=Where(checkpoint.label),
                     help="an expert's bias would be weighted by the router; --site attn shifts the stream before the experts")  # fmt: skip


def _require(checkpoint: Checkpoint, bias: str) -> None:
    if bias not in checkpoint.tensors:
        raise InputError("E419", f"{checkpoint.label} lacks {printable(bias)}", where=Where(tensor=printable(bias)),
                         help="the checkpoint is incomplete: surgeon verify")  # fmt: skip


def _no_room(checkpoint: Checkpoint, model_type: str, room: Room | None, part: str) -> InputError:
    other = (
        "--site attn puts it on the output projection, "
        if room is not None and part == "ffn" and room.attention
        else ""
    )
    return InputError("E418", f"the {printable(model_type)} class has no bias there that could hold the shift",
                      where=Where(checkpoint.label), help=f"{other}--control-vector FILE.gguf needs no bias (llama.cpp)")  # fmt: skip


# ---- Qwen2 and Mistral as Llama --------------------------------------------------------------------


def _as_llama(checkpoint: Checkpoint, config: dict[str, Any], allowed: bool) -> dict[str, Any]:
    """Return the config under which a Llama computes what this model does.

    Raises:
        InputError: E418 it is not allowed, or the two would not compute the same.
    """
    kind = str(config["model_type"])
    reason = _differs(config) if allowed else "--relabel never keeps it from being labelled llama"
    if reason is not None:
        raise InputError("E418", f"a {kind} class has no bias that could hold the shift, and {reason}",
                         where=Where(checkpoint.label), help="--control-vector FILE.gguf needs no bias (llama.cpp)")  # fmt: skip
    found = {k: v for k, v in config.items() if k not in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")}  # fmt: skip
    found |= {k: v for k, v in _effective(config).items() if k not in found}
    found |= {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
    names = config.get("architectures")
    if isinstance(names, list):
        found["architectures"] = [
            re.sub(r"^(Qwen2|Mistral)(?=For|Model)", "Llama", str(name)) for name in names
        ]
    if kind == "qwen2":  # a folder whose tokenizer_config names no class would get Llama's
        found.setdefault("tokenizer_class", "Qwen2Tokenizer")
    return found


def _differs(config: Mapping[str, Any]) -> str | None:
    """Say why a Llama would not compute the same, None when it would."""
    kinds = config.get("layer_types") or []
    sliding = "sliding_attention" in kinds
    if config["model_type"] == "qwen2":
        sliding = sliding or bool(config.get("use_sliding_window", False))
    else:  # the class assumes a window of 4096 where the key is missing
        sliding = sliding or config.get("sliding_window", 4096) is not None
    if sliding:
        return "it uses a sliding window, which a llama class does not"
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or hidden % heads:
        return "its hidden size is not a multiple of its heads, which a llama class requires"
    return None


def _effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the class assumes for keys that config.json leaves out, since a Llama assumes other things."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    clean = {
        k: v for k, v in config.items() if k not in ("auto_map", "_name_or_path", "dtype", "torch_dtype")
    }
    parsed: Any = CONFIG_MAPPING[str(config["model_type"])].from_dict(clean)
    keys = ("hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "num_key_value_heads",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout")  # fmt: skip
    found = {key: getattr(parsed, key) for key in keys if hasattr(parsed, key)}
    found["head_dim"] = getattr(parsed, "head_dim", None) or parsed.hidden_size // parsed.num_attention_heads
    if "rope_parameters" not in config and "rope_theta" not in config:
        found["rope_theta"] = parsed.rope_parameters["rope_theta"]
    return found
