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
DELTA_NET = {
    "num_experts": 4,
    "head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
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
    "phimoe": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        **DECODER,
        **ROUTED,
        "n_routed_experts": 6,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 10,
    },
    "ernie4_5_moe": {
        **DECODER,
        "moe_intermediate_size": 20,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
    },
    "hunyuan_v1_moe": {**DECODER, "num_experts": 4, "moe_topk": 2, "head_dim": 10},
    "minimax_m2": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 10},
    "minimax": {
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "block_size": 8,
        "full_attn_alpha_factor": 0.7,
        "linear_attn_beta_factor": 1.3,
        "mlp_alpha_factor": 0.8,
    },
    "qwen3_next": {**DECODER, **ROUTED, **DELTA_NET, "mlp_only_layers": [2]},
    "qwen3_5_moe_text": {
        **{key: value for key, value in DECODER.items() if key != "intermediate_size"},
        **ROUTED,
        **DELTA_NET,
    },
    "lfm2_moe": {
        **DECODER,
        **ROUTED,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "jamba": {
        **DECODER,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 6,
        "mamba_d_conv": 3,
        "mamba_dt_rank": 5,
        "use_mamba_kernels": False,
    },
    "llama4_text": {
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "intermediate_size": 20,
        "intermediate_size_mlp": 48,
        "moe_layers": [1, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 8,
    },
    "granitemoeshared": {
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "granitemoehybrid": {
        **DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 6,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
    },
    "kimi_linear": {
        **DECODER,
        "moe_intermediate_size": 20,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_shared_experts": 2,
        "num_expert_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_head_dim": 6,
        "linear_num_heads": 4,
    },
    "kimi_k2": LATENT,
    "nemotron_h": {
        **{key: value for key, value in DECODER.items() if key != "num_hidden_layers"},
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "num_experts_per_tok": 2,
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 10,
        "ssm_state_size": 6,
        "mamba_num_heads": 8,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "chunk_size": 8,
    },
}

NESTED: dict[str, tuple[str, dict]] = {
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": FAMILIES["llama4_text"],
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": FAMILIES["qwen3_5_moe_text"],
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "num_position_embeddings": 16,
            },
        },
    ),
}
"""Models with a language model inside: their class and their configuration."""

LIBRARY = {"kimi_k2": "deepseek_v3"}
"""Types the library knows under another name only."""

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
    ("phimoe", "", {"attention_bias": True, "lm_head_bias": True}),
    ("glm4_moe", "", {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 0}),
    ("ernie4_5_moe", "", {"use_bias": True, "moe_num_shared_experts": 0, "moe_layer_interval": 2}),
    ("ernie4_5_moe", "", {"moe_layer_start_index": 0, "moe_layer_end_index": 1}),
    ("hunyuan_v1_moe", "", {"attention_bias": True, "moe_topk": [1, 2, 3]}),
    ("minimax", "", {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    ("minimax", "MiniMaxModel", {}),
    ("qwen3_next", "", {"attention_bias": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("qwen3_next", "", {"layer_types": None, "num_hidden_layers": 5}),
    ("qwen3_5_moe_text", "", {"attention_bias": True}),
    ("lfm2_moe", "", {"conv_bias": True, "use_expert_bias": False, "num_dense_layers": 0}),
    ("jamba", "", {"mamba_conv_bias": False, "mamba_proj_bias": True, "expert_layer_offset": 1}),
    ("jamba", "", {"num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": "auto"}),
    ("llama4_text", "", {"attention_bias": True, "moe_layers": None, "interleave_moe_layer_step": 2}),
    ("granitemoeshared", "", {"attention_bias": True, "shared_intermediate_size": 0}),
    ("granitemoehybrid", "", {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_d_head": "auto"}),
    ("granitemoehybrid", "", {"num_local_experts": 0, "layer_types": None}),
    ("kimi_linear", "", {"q_lora_rank": 18, "attention_bias": True, "num_shared_experts": 1}),
    ("nemotron_h", "", {"moe_latent_size": 14, "mlp_bias": True, "use_bias": True, "use_conv_bias": False}),
    ("nemotron_h", "NemotronHModel", {}),
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
    if family in NESTED:
        class_name, config = NESTED[family]
        config = {**config, "text_config": {**config["text_config"], **extra}}
        return getattr(transformers, class_name)(transformers.AutoConfig.for_model(family, **config))
    config = transformers.AutoConfig.for_model(LIBRARY.get(family, family), **{**FAMILIES[family], **extra})
    if class_name:
        return getattr(transformers, class_name)(config)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config)


def save(model, family: str, folder: Path, hub_names: bool = True) -> None:
    """Save a model the way the library does, under the type its files on the hub have."""
    model.save_pretrained(folder, save_original_format=hub_names)
    if family in LIBRARY:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": family}))


@functools.cache
def _saved(family: str, class_name: str, extra: str, hub_names: bool) -> tuple[str, Header]:
    transformers.utils.logging.disable_progress_bar()
    model = build(family, class_name, **json.loads(extra))
    with tempfile.TemporaryDirectory() as folder:
        save(model, family, Path(folder), hub_names)
        config = Path(folder, "config.json").read_text()
        return config, read_header(Path(folder, "model.safetensors"))


def saved(family: str, class_name: str = "", hub_names: bool = True, **extra) -> tuple[dict, Header]:
    """Return config.json and the header of a tiny model, as save_pretrained writes them."""
    config, header = _saved(family, class_name, json.dumps(extra), hub_names)
    return json.loads(config), dict(header)
