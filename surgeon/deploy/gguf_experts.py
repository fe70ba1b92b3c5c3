"""Experts in GGUF files: all of one layer and kind in one tensor, the router beside them in float32.

Mixtral is llama.cpp's architecture `llama` with experts, Qwen3-MoE its `qwen3moe`. Both graphs take a softmax over all
experts, keep the largest, and make their weights sum to one; every layer has experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.deploy.gguf_tensors import GgufTensor, Piece
from surgeon.errors import InputError, Where

NAMES = {
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
"""model_type -> (module of a layer, names of an expert's matrices)."""


def count(config: Mapping[str, Any]) -> int:
    """Return the experts of a layer.

    Raises:
        InputError: E365 the configuration does not say.
    """
    given = {int(config[key]) for key in ("num_local_experts", "num_experts") if config.get(key)}
    if len(given) != 1:
        raise InputError("E365", f"config.json gives {' and '.join(map(str, sorted(given))) or 'no number'} as the number of experts",
                         where=Where(file="config.json"), help="one of num_local_experts and num_experts says it, or both the same")  # fmt: skip
    return given.pop()


def width(config: Mapping[str, Any]) -> int:
    """Return the channels of an expert."""
    return int(
        config["moe_intermediate_size" if config["model_type"] == "qwen3_moe" else "intermediate_size"]
    )


def reason(config: Mapping[str, Any]) -> str:
    """Return why llama.cpp routes otherwise than the model does, "" where it does not."""
    if config["model_type"] != "qwen3_moe":
        return ""
    if not config.get("norm_topk_prob"):
        return "the weights of its chosen experts do not sum to one, in llama.cpp they do"
    if int(config.get("decoder_sparse_step") or 1) != 1 or config.get("mlp_only_layers"):
        return "some of its layers have no experts, in llama.cpp all have"
    return ""


def keys(config: Mapping[str, Any]) -> dict[str, int]:
    """Return what the file says of experts, keys without the architecture."""
    found = {"expert_count": count(config), "expert_used_count": int(config.get("num_experts_per_tok") or 2)}
    if config["model_type"] == "qwen3_moe":
        found["expert_feed_forward_length"] = width(config)
    return found


def tensors(config: Mapping[str, Any], layer: str, block: str) -> Iterator[GgufTensor]:
    """Yield the router and the stacks of one layer.

    Args:
        layer: beginning of the checkpoint's names, such as ``model.layers.3.``.
        block: of the file's, such as ``blk.3.``.
    """
    module, parts = NAMES[config["model_type"]]
    experts, hidden, channels = count(config), int(config["hidden_size"]), width(config)
    router = f"{layer}{module}.gate.weight"
    yield GgufTensor(f"{block}ffn_gate_inp.weight", (experts, hidden), (Piece(router, experts),), exact=True)
    for part, name in parts.items():
        rows, columns = (hidden, channels) if part == "down" else (channels, hidden)
        pieces = tuple(
            Piece(f"{layer}{module}.experts.{number}.{name}.weight", rows) for number in range(experts)
        )
        yield GgufTensor(f"{block}ffn_{part}_exps.weight", (experts, rows, columns), pieces)


def is_stacked(names: Iterable[str]) -> str | None:
    """Return why a checkpoint that keeps experts in stacks cannot be written, None where it does not."""
    stacked = next((name for name in names if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))), None)  # fmt: skip
    return stacked and f"{printable(stacked)} holds all experts of a layer, where each is expected by itself"
