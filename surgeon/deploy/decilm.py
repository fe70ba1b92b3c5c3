"""DeciLM directories (Llama-Nemotron): per-layer shapes that vLLM and TensorRT-LLM have a class for.

Tensor names are those of Llama, so only the configuration differs: each layer says its key/value heads
through ``n_heads_in_group`` and its FFN through ``ffn_mult``, from which engines compute the width as
int(2 * ffn_mult * hidden_size / 3), rounded up to a multiple of 256. Query heads are the same everywhere.
The rules were read in the sources of vLLM (nemotron_nas) and TensorRT-LLM (PyTorch backend).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgeon.deploy import per_layer
from surgeon.deploy.gguf_layout import slides
from surgeon.errors import InputError, UsageError, Where

MULTIPLE = 256
MODEL_TYPE = "nemotron-nas"
CODE_FILES = (*per_layer.CODE_FILES, "configuration_decilm.py", "modeling_decilm.py")


def rounded_width(ffn_mult: float, hidden: int) -> int:
    """Return the FFN width that engines compute from ``ffn_mult``."""
    return -(-int(2 * ffn_mult * hidden / 3) // MULTIPLE) * MULTIPLE


def multiplier(width: int, hidden: int) -> float:
    """Return the ``ffn_mult`` for an FFN width that is a multiple of 256."""
    return 3 * width / (2 * hidden)


def obstacles(config: Mapping[str, Any]) -> list[str]:
    """Return why a configuration cannot be written as DeciLM, one sentence each; empty when it can."""
    family = per_layer.base_type(config)
    if family not in ("llama", "mistral"):
        return [f"DeciLM computes what Llama computes; this is a {family} model"]
    found = []
    if config.get("attention_bias") or config.get("mlp_bias"):
        found.append("DeciLM has no biases in TensorRT-LLM, and one on the output projection in vLLM")
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"DeciLM computes SiLU, not {config['hidden_act']}")
    if slides(config):
        found.append("DeciLM has no sliding window here")
    shapes = per_layer.block_shapes(config)
    heads = int(config["num_attention_heads"])
    other = {number: shape.heads for number, shape in enumerate(shapes) if shape.heads not in (0, heads)}
    if other:
        found.append(f"DeciLM has {heads} query heads in every layer; {_layers(other)}")
    if not shapes[0].heads:
        found.append("the first layer must have attention: vLLM takes the residual from it")
    uneven = {number: shape.ffn for number, shape in enumerate(shapes) if shape.ffn % MULTIPLE}
    if uneven:
        found.append(f"FFN widths must be multiples of {MULTIPLE}; {_layers(uneven)}")
    hidden = int(config["hidden_size"])
    wrong = {
        n: s.ffn
        for n, s in enumerate(shapes)
        if n not in uneven and rounded_width(multiplier(s.ffn, hidden), hidden) != s.ffn
    }
    if wrong:
        found.append(f"ffn_mult does not round to the width; {_layers(wrong)}")
    return found


def finish(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Return config.json of a DeciLM directory and the code files with which transformers loads it.

    Args:
        config: uniform, or with ``block_configs``, of a Llama or Mistral model.

    Raises:
        UsageError: E286 the shapes cannot be said; every obstacle is named with its layers.
        InputError: E324 block_configs are malformed.
    """
    reasons = obstacles(config)
    if reasons:
        raise UsageError("E286", f"the model cannot be written as DeciLM: {reasons[0]}", where=Where(file="config.json"),
                         help="--layout per-layer writes a directory for transformers, with any shapes",
                         others=[InputError("E286", reason, help="--layout per-layer holds it") for reason in reasons[1:]])  # fmt: skip
    result = per_layer.stock_config(config)
    for key in ("sliding_window", "layer_types"):
        result.pop(key, None)
    heads, hidden = int(result["num_attention_heads"]), int(result["hidden_size"])
    result["model_type"] = MODEL_TYPE
    result["architectures"] = ["DeciLMForCausalLM"]
    result["head_dim"] = per_layer.head_dim(config)
    result["auto_map"] = {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    }
    result["block_configs"] = []
    for shape in per_layer.block_shapes(config):
        attention: dict[str, Any] = {"no_op": not shape.heads, "replace_with_linear": False}
        ffn: dict[str, Any] = {"no_op": not shape.ffn, "replace_with_linear": False}
        if shape.heads:
            attention["n_heads_in_group"] = heads // shape.groups
        if shape.ffn:  # a key with null in it stops vLLM
            ffn["ffn_mult"] = multiplier(shape.ffn, hidden)
        result["block_configs"].append({"attention": attention, "ffn": ffn})
    return result, per_layer.companions(CODE_FILES)


def _layers(sizes: Mapping[int, int]) -> str:
    shown = ", ".join(f"layer {number} has {size}" for number, size in list(sizes.items())[:4])
    return shown + (f" and {len(sizes) - 4} more differ" if len(sizes) > 4 else "")
