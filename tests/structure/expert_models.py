"""Tiny random mixtures of experts of every family, saved as the library saves them, cached for the test run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

EXPERTS = 8
TOP_K = 2
WIDTH = 24
HIDDEN = 32

DECODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 67,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
WIDE = {**DECODER, "intermediate_size": WIDTH}
"""Of families whose experts are as wide as intermediate_size says."""
ROUTED = {"num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH}
LATENT = {
    **DECODER,
    **ROUTED,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 2,
    "topk_group": 1,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "shared_expert_intermediate_size": 20,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}

CONFIGS: dict[str, tuple[str, dict]] = {
    "mixtral": ("num_local_experts", {**WIDE, "num_experts_per_tok": TOP_K}),
    "phimoe": ("num_local_experts", {**WIDE, "num_experts_per_tok": TOP_K}),
    "minimax": (
        "num_local_experts",
        {
            **WIDE,
            "num_experts_per_tok": TOP_K,
            "head_dim": 8,
            "block_size": 16,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "mlp_alpha_factor": 1.3,
            "mlp_beta_factor": 0.8,
        },
    ),
    "minimax_m2": ("num_local_experts", {**WIDE, "num_experts_per_tok": TOP_K, "head_dim": 8}),
    "qwen2_moe": (
        "num_experts",
        {**DECODER, **ROUTED, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("num_experts", {**DECODER, **ROUTED, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3_next": ("num_experts", {**DECODER, **ROUTED, **LINEAR, "mlp_only_layers": [1]}),
    "qwen3_5_moe_text": (
        "num_experts",
        {**DECODER, **ROUTED, **LINEAR, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
    ),
    "qwen3_5_moe": (
        "num_experts",
        {
            "text_config": {
                **DECODER,
                **ROUTED,
                **LINEAR,
                "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
            },
            "vision_config": VISION,
        },
    ),
    "qwen3_vl_moe": (
        "num_experts",
        {
            "text_config": {**DECODER, **ROUTED, "head_dim": 8, "rope_parameters": MROPE},
            "vision_config": VISION,
        },
    ),
    "olmoe": ("num_experts", {**WIDE, "num_experts_per_tok": TOP_K}),
    "deepseek_v2": ("n_routed_experts", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("n_routed_experts", LATENT),
    "glm4_moe": (
        "n_routed_experts",
        {
            **DECODER,
            **ROUTED,
            "head_dim": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "ernie4_5_moe": (
        "moe_num_experts",
        {
            **DECODER,
            "moe_k": TOP_K,
            "moe_intermediate_size": WIDTH,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
    ),
    "hunyuan_v1_moe": ("num_experts", {**WIDE, "moe_topk": TOP_K, "head_dim": 8}),
    "lfm2_moe": (
        "num_experts",
        {
            **DECODER,
            **ROUTED,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "conv_L_cache": 3,
        },
    ),
    "jamba": (
        "num_experts",
        {
            **WIDE,
            "num_experts_per_tok": TOP_K,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "kimi_linear": (
        "num_experts",
        {
            **{key: value for key, value in LATENT.items() if key not in ("n_group", "n_shared_experts")},
            "num_experts_per_token": TOP_K,
            "num_expert_group": 2,
            "num_shared_experts": 1,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "linear_num_heads": 2,
            "linear_head_dim": 8,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "granitemoe": (
        "num_local_experts",
        {**WIDE, "num_experts_per_tok": TOP_K, "residual_multiplier": 0.6},
    ),
    "granitemoeshared": (
        "num_local_experts",
        {**WIDE, "num_experts_per_tok": TOP_K, "residual_multiplier": 0.6, "shared_intermediate_size": 20},
    ),
    "granitemoehybrid": (
        "num_local_experts",
        {
            **WIDE,
            **MAMBA,
            "num_experts_per_tok": TOP_K,
            "residual_multiplier": 0.6,
            "shared_intermediate_size": 20,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "gpt_oss": (
        "num_local_experts",
        {
            **WIDE,
            "num_experts_per_tok": TOP_K,
            "head_dim": 8,
            "rope_parameters": YARN,
            "max_position_embeddings": 64,
        },
    ),
    "llama4_text": (
        "num_local_experts",
        {**WIDE, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 8, "moe_layers": [0, 2]},
    ),
    "llama4": (
        "num_local_experts",
        {
            "text_config": {
                **WIDE,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 40,
                "head_dim": 8,
                "moe_layers": [0, 2],
            },
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "vision_output_dim": 16,
                "image_size": 28,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
        },
    ),
    "deepseek_v4": (
        "n_routed_experts",
        {
            **{key: value for key, value in DECODER.items() if key != "intermediate_size"},
            **ROUTED,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "qk_rope_head_dim": 8,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "n_shared_experts": 1,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_topk": 8,
            "layer_types": [
                "heavily_compressed_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "mlp_layer_types": ["moe", "moe", "moe"],
        },
    ),
    "jetmoe": (
        "num_local_experts",
        {**WIDE, "num_experts_per_tok": TOP_K, "kv_channels": 8},
    ),
    "nemotron_h": (
        "n_routed_experts",
        {
            **DECODER,
            **ROUTED,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 20,
        },
    ),
}
"""Family -> (key of the number of experts, configuration without it)."""

MORE: dict[str, tuple[str, dict]] = {
    "kimi_k25": (
        "n_routed_experts",
        {
            "text_config": {**LATENT, "model_type": "deepseek_v3"},
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
        },
    ),
    "glm4v_moe": (
        "n_routed_experts",
        {
            "text_config": {
                **DECODER,
                **ROUTED,
                "head_dim": 8,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "n_group": 2,
                "topk_group": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                    "partial_rotary_factor": 1.0,
                },
            },
            "vision_config": VISION,
        },
    ),
    "glm4_moe_lite": ("n_routed_experts", {**LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "deepseek_v32": (
        "n_routed_experts",
        {**LATENT, **INDEXER, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "glm_moe_dsa": (
        "n_routed_experts",
        {**LATENT, **INDEXER, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "dots1": (
        "n_routed_experts",
        {
            **DECODER,
            **ROUTED,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
    ),
    "solar_open": (
        "n_routed_experts",
        {**DECODER, **ROUTED, "head_dim": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    ),
    "exaone_moe": (
        "num_experts",
        {
            **DECODER,
            **ROUTED,
            "num_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "hy_v3": (
        "num_experts",
        {
            **DECODER,
            **ROUTED,
            "head_dim": 8,
            "num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "afmoe": (
        "num_experts",
        {**DECODER, **ROUTED, "head_dim": 8, "num_shared_experts": 1, "num_dense_layers": 1},
    ),
    "granitemoe_swa": (
        "num_local_experts",
        {**WIDE, "num_experts_per_tok": TOP_K, "residual_multiplier": 0.6, "shared_intermediate_size": 20},
    ),
}
"""Families that are laid out like one of the others but for a name or a rule."""

FAMILIES = tuple(CONFIGS)
MORE_FAMILIES = tuple(MORE)

_ROUTER = re.compile(r"(gate|router|wg|gate\.layer)\.weight$")
_CORRECTION = re.compile(r"(correction_bias|expert_bias)$")


def config_of(family: str, **overrides) -> transformers.PreTrainedConfig:
    """Return a tiny configuration with eight experts; overrides of a nested one go to its text part."""
    key, values = {**CONFIGS, **MORE}[family]
    if "text_config" in values:
        text = {**values["text_config"], key: EXPERTS, **overrides}
        return transformers.AutoConfig.for_model(family, **{**values, "text_config": text})
    values = {**values, key: EXPERTS, **overrides}
    return transformers.AutoConfig.for_model(family, **values)


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> torch.nn.Module:
    """Return a tiny random model in evaluation mode, with eager attention and experts.

    Routers spread over the experts, norms differ from 1 and correction biases (always float32) are small and
    differ from each other, so that a wrong row, a wrong bias or a wrong expert shows in the output.
    """
    config = config_of(family, **overrides)
    nested = getattr(config, "text_config", None) is not None
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    with _seeded(seed):
        model = auto.from_config(config, attn_implementation="eager").eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _fill(name, tensor.data)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.float32 and not _CORRECTION.search(name):
            tensor.data = tensor.data.to(dtype)
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # llama4 has none to choose from
            model.set_experts_implementation("eager")
    return model


def _fill(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    if _CORRECTION.search(name):
        tensor.copy_(0.05 * torch.randn(tensor.shape))
    elif _ROUTER.search(name) and "shared" not in name and "attn" not in name:
        tensor.copy_(0.4 * torch.randn(tensor.shape))
    elif ".experts." in name or "input_linear" in name or "output_linear" in name:
        tensor.copy_(0.25 * torch.randn(tensor.shape))
    elif name.endswith("norm.weight"):
        tensor.add_(0.2 * torch.randn(tensor.shape))
    elif name.endswith("router.bias"):
        tensor.copy_(0.3 * torch.randn(tensor.shape))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def moe_folder(
    family: str, *, storage: str = "hub", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides
) -> Path:
    """Return the folder of a saved tiny model; the same arguments give the same folder, so do not change it.

    Args:
        family: one of FAMILIES.
        storage: "hub" as the family is published, "fused" under the names the library has in memory.
        seed: of the weights; both storages of one seed hold the same weights.
        overrides: keys of the configuration (of its text part where it has one).
    """
    return _saved(family, storage, seed, dtype, json.dumps(overrides, sort_keys=True))


@functools.cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="surgeon-experts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _saved(family: str, storage: str, seed: int, dtype: torch.dtype, overrides: str) -> Path:
    assert storage in ("hub", "fused"), storage
    transformers.utils.logging.disable_progress_bar()
    model = build(family, seed=seed, dtype=dtype, **json.loads(overrides))
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-{storage}-", dir=_root()))
    model.save_pretrained(folder, save_original_format=storage == "hub")
    return folder
