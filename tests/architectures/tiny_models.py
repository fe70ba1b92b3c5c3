"""Tiny random models of every family, saved as the library saves them, cached for the test run."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from pathlib import Path

import torch
import transformers

DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **DECODER,
    **ROUTED,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 2,
    "topk_group": 1,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 67, "n_positions": 40}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}

FAMILIES: dict[str, dict] = {
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 10},
    "gemma": {**DECODER, "head_dim": 10},
    "gemma2": {**DECODER, "head_dim": 10},
    "gemma3_text": {**DECODER, "head_dim": 10},
    "phi": DECODER,
    "phi3": DECODER,
    "gpt2": GPT2,
    "bert": {
        **{key: value for key, value in DECODER.items() if key != "num_key_value_heads"},
        "type_vocab_size": 3,
    },
    "mixtral": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **DECODER,
        **ROUTED,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {**DECODER, **ROUTED, "num_experts": 4, "head_dim": 10, "mlp_only_layers": [1]},
    "olmoe": {**DECODER, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "granitemoe": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "rope_parameters": YARN,
    },
}

VARIANTS: list[tuple[str, str, dict]] = [
    *((family, "", {"tie_word_embeddings": tied}) for family in FAMILIES for tied in (False, True)),
    ("llama", "", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    ("llama", "LlamaModel", {}),
    ("llama", "LlamaForSequenceClassification", {"num_labels": 3}),
    ("llama", "LlamaForTokenClassification", {"num_labels": 4}),
    ("mistral", "MistralModel", {}),
    ("mistral", "", {"num_key_value_heads": 4, "head_dim": 6}),
    ("qwen3", "", {"attention_bias": True}),
    ("qwen3", "Qwen3Model", {}),
    ("gemma2", "", {"attention_bias": True}),
    ("gemma3_text", "Gemma3TextModel", {}),
    ("phi", "", {"qk_layernorm": True}),
    ("gpt2", "GPT2Model", {}),
    ("gpt2", "GPT2ForSequenceClassification", {"num_labels": 3}),
    ("gpt2", "GPT2ForTokenClassification", {"num_labels": 3}),
    ("gpt2", "GPT2ForQuestionAnswering", {}),
    ("gpt2", "GPT2DoubleHeadsModel", {"num_labels": 1}),
    ("gpt2", "", {"n_inner": 50, "add_cross_attention": True}),
    ("bert", "BertModel", {}),
    ("bert", "BertForPreTraining", {}),
    ("bert", "BertForSequenceClassification", {"num_labels": 3}),
    ("bert", "BertForTokenClassification", {"num_labels": 5}),
    ("bert", "BertForQuestionAnswering", {}),
    ("bert", "BertForMultipleChoice", {}),
    ("bert", "BertForNextSentencePrediction", {}),
    ("bert", "BertLMHeadModel", {"is_decoder": True, "add_cross_attention": True}),
    ("mixtral", "", {"head_dim": 6}),
    ("qwen2_moe", "", {"qkv_bias": False, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("qwen3_moe", "", {"attention_bias": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("olmoe", "", {"attention_bias": True}),
    ("deepseek_v2", "", {"q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0}),
    ("deepseek_v2", "", {"mlp_bias": True}),
    ("deepseek_v3", "", {"q_lora_rank": None, "first_k_dense_replace": 2}),
    ("deepseek_v3", "", {"attention_bias": True, "first_k_dense_replace": 3}),
    ("granitemoe", "", {"attention_bias": True}),
    ("gpt_oss", "", {"attention_bias": False}),
]

Header = dict[str, tuple[str, tuple[int, ...]]]


def label(variant: tuple[str, str, dict]) -> str:
    family, class_name, extra = variant
    return "-".join([family, class_name or "default", *(f"{key}={value}" for key, value in extra.items())])


def read_header(file: Path) -> Header:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}


def build(family: str, class_name: str = "", **extra) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **extra})
    if class_name:
        return getattr(transformers, class_name)(config)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config)


@functools.cache
def _saved(family: str, class_name: str, extra: str, hub_names: bool) -> tuple[str, Header]:
    transformers.utils.logging.disable_progress_bar()
    model = build(family, class_name, **json.loads(extra))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=hub_names)
        config = Path(folder, "config.json").read_text()
        return config, read_header(Path(folder, "model.safetensors"))


def saved(family: str, class_name: str = "", hub_names: bool = True, **extra) -> tuple[dict, Header]:
    """Return config.json and the header of a tiny model, as save_pretrained writes them."""
    config, header = _saved(family, class_name, json.dumps(extra), hub_names)
    return json.loads(config), dict(header)
