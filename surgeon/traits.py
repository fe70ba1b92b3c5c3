"""What a checkpoint is, as far as its config.json and its tensor names say: tied, quantized, which part is which."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgeon.architectures import get, naming
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable

_SCALES = re.compile(
    r"(\.|_)(weight_scale|weight_scale_inv|input_scale|weight_packed|qweight|qzeros|g_idx|absmax|quant_map|SCB|"
    r"scale_inv|weight_zero_point|weight_shape|quant_state\..*)$"
)
_HEADS = (
    "lm_head.weight",
    "output.weight",
    "embed_out.weight",
    "model.lm_head.weight",
    "language_model.lm_head.weight",
)
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")

PARTS = ("embedding", "attention", "mlp", "router", "expert", "norm", "head", "other")
"""The parts of a model that `part_of` tells apart."""

_EMBEDDING = re.compile(r"(embed|^wte\.|\.wte\.|\.wpe\.|^wpe\.)")
_NORM = re.compile(r"(norm|(^|\.)ln(_\w+|\d)?\.|LayerNorm)", re.IGNORECASE)
_ROUTER = re.compile(r"(\.router\.|\.gate\.(weight|e_score_correction_bias|wg)|\.router$|shared_expert_gate)")
_ATTENTION = re.compile(r"(attn|attention|\.[qkvo]_proj\.|\.sinks$)", re.IGNORECASE)
_MLP = re.compile(
    r"(mlp|ffn|feed_forward|intermediate|\.output\.dense|fc\d|c_fc|gate_proj|up_proj|down_proj|\.w[123]\.)"
)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def quantized(checkpoint: Checkpoint) -> str | None:
    """Say how a checkpoint is quantized, or None; by config, by stored types, by companion names."""
    config = checkpoint.config or {}
    for section in (config, text_section(config)):
        entry = section.get("quantization_config") or section.get("compression_config")
        if isinstance(entry, dict):
            return printable(str(entry.get("quant_method", "quantization_config in config.json")))
    coded = [n for n, t in checkpoint.tensors.items() if DTYPES[t.dtype].family == "coded"]
    if coded:
        return f"{checkpoint.tensors[coded[0]].dtype} values in {printable(coded[0])}"
    scales = [n for n in checkpoint.tensors if _SCALES.search(n)]
    if scales:
        return f"companion {printable(scales[0])}"
    return None


def is_tied(checkpoint: Checkpoint) -> bool | None:
    """Say whether a checkpoint ties its output head to its embedding; None when it cannot be known."""
    config = checkpoint.config
    if config is None:
        return None
    flag = config.get("tie_word_embeddings", text_section(config).get("tie_word_embeddings"))
    if isinstance(flag, bool):
        return flag
    record = get(config.get("model_type"))
    return record.default_tie if record is not None else None


def head_name(names: Iterable[str]) -> str | None:
    """Return the name of the output head among tensor names, if it is stored."""
    present = names if isinstance(names, (Mapping, set, frozenset)) else set(names)
    return next((h for h in _HEADS if h in present), None)


def embedding_name(names: Iterable[str]) -> str | None:
    """Return the name of the token embedding."""
    found = [n for n in names if _EMBEDDINGS.search(n) and "visual" not in n and "vision" not in n]
    return min(found, key=len) if found else None


def part_of(name: str) -> str:
    """Return which of `PARTS` a tensor belongs to, by its name alone."""
    if name in _HEADS:
        return "head"
    if naming.layer_of(name) is None and _EMBEDDING.search(name) and not _NORM.search(name):
        return "embedding"
    if _ROUTER.search(name):
        return "router"
    if _NORM.search(name):
        return "norm"
    if ".experts." in name or ".block_sparse_moe." in name:
        return "expert"
    if _ATTENTION.search(name) and not re.search(r"\.attn\.c_fc|\.mlp\.", name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"
